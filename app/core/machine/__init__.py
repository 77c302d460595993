"""How a job moves: what comes in (`inputs`), the table, and its handlers (`reports`, `controls`)."""
