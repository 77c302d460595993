"""The epoch of a journal: which life of the state directory the ids of its events belong to.

A journal that was restored from a backup knows nothing of the events after the backup, and would give their ids again.
So the number of the epoch stands in a file of its own, which a restore doesn't replace, and is part of each id: the ids
of an epoch begin above all those of the epochs before.

At each start the file and the journal get the same new number (`start`). A journal with another one was put back by
hand, and begins a new epoch. The file names the number before the journal has it, so a start that is killed in between
begins none.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from app.engine.ports.journal import JournalError
from app.journal.database import transaction
from app.journal.files import write_private

FILE: Final = "epoch"

IDS: Final = 1 << 40
"""Ids that an epoch has. They stay exact in JSON's numbers (2^53) for 8,191 epochs."""

EPOCHS: Final = (1 << 53) // IDS - 1

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Epoch:
    """The number of the epoch, and the numbers of starts that its journal may have."""

    number: int
    starts: tuple[int, ...]


def load(state_dir: Path) -> Epoch | None:
    """What the file says; None: there is none that can be read."""
    try:
        told = json.loads((state_dir / FILE).read_text(encoding="utf-8"))
        return Epoch(number=int(told["epoch"]), starts=tuple(int(each) for each in told["starts"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store(state_dir: Path, epoch: Epoch) -> None:
    """Write the file, durably; raises `OSError`."""
    text = json.dumps({"epoch": epoch.number, "starts": epoch.starts})
    write_private(state_dir / FILE, f"{text}\n")


def begin(state_dir: Path, connection: sqlite3.Connection) -> None:
    """Take up the epoch at a service's start, or begin a new one where the journal is not the one of before.

    Where nothing can be written, all stays as it is: a file system that is full must not keep a service from its jobs.
    Raises `JournalError` where a new epoch can't be written: ids would be given twice.
    """
    kept = load(state_dir)
    before = _value(connection, "start")
    last = connection.execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'events'").fetchone()[0]
    number = last // IDS
    # A journal of a release before this one has no number yet, and no file beside it.
    another = kept is not None and before not in kept.starts
    if another and kept is not None:
        number = min(max(number, kept.number) + 1, EPOCHS)
        log.warning("another journal than before", state_dir=str(state_dir), epoch=number)
    start = secrets.randbits(62)
    try:
        if not another:
            store(state_dir, Epoch(number=number, starts=(start,) if before is None else (before, start)))
        with transaction(connection):
            connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES ('start', ?)", (start,))
            if another:
                _raise_ids(connection, number * IDS)
        store(state_dir, Epoch(number=number, starts=(start,)))
    except (JournalError, OSError) as error:
        if another:
            raise
        log.warning("epoch not written", error=str(error))


def _raise_ids(connection: sqlite3.Connection, first: int) -> None:
    # All that was told before belongs to another epoch: who comes with an id of it reads everything anew.
    connection.execute("UPDATE meta SET value = max(value, ?) WHERE key = 'pruned'", (first,))
    if not connection.execute("UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = 'events'", (first,)).rowcount:
        connection.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('events', ?)", (first,))


def _value(connection: sqlite3.Connection, key: str) -> int | None:
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return None if row is None else int(row[0])
