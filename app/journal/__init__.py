"""What is kept over restarts, in SQLite."""
