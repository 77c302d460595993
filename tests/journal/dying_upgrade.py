"""Brings a journal up to date and kills itself with SIGKILL right before one of its statements.

Arguments: state directory, the number of the statement (0: none). Prints how many statements there were.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

from app.journal.database import connect

real = sqlite3.connect
seen: list[str] = []
doomed = int(sys.argv[2])


def count(statement: str) -> None:
    """Called by SQLite before it begins with a statement."""
    seen.append(statement)
    if len(seen) == doomed:
        os.kill(os.getpid(), signal.SIGKILL)


def watched(*arguments: Any, **options: Any) -> sqlite3.Connection:
    """A connection whose statements are counted."""
    connection = real(*arguments, **options)
    connection.set_trace_callback(count)
    return connection


sqlite3.connect = watched
connect(Path(sys.argv[1])).close()
sys.stdout.write(f"{len(seen)}\n")
