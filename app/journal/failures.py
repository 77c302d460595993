"""What an error of SQLite says of the journal."""

from __future__ import annotations

import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from app.core.errors import Code
from app.engine.ports.journal import JournalError

FSYNC: Final = frozenset({sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC})
"""Extended codes of a commit whose frames stand whole in the log, from where a recovery would replay them.

A write that failed leaves the last frame, which alone makes a commit of them, out or cut short.
"""

_WRITING: Final = {
    sqlite3.SQLITE_FULL: Code.JOURNAL_FULL,
    sqlite3.SQLITE_IOERR: Code.JOURNAL_FULL,
    sqlite3.SQLITE_READONLY: Code.JOURNAL_FULL,
    sqlite3.SQLITE_CANTOPEN: Code.JOURNAL_FULL,
    sqlite3.SQLITE_PERM: Code.JOURNAL_FULL,
    sqlite3.SQLITE_BUSY: Code.JOURNAL_BUSY,
    sqlite3.SQLITE_CORRUPT: Code.JOURNAL_DAMAGED,
    sqlite3.SQLITE_NOTADB: Code.JOURNAL_DAMAGED,
}
"""By SQLite's primary result code, why a write has failed. Any other code is a mistake of ours."""

_READING: Final = dict.fromkeys(_WRITING, Code.JOURNAL_UNREADABLE) | {
    sqlite3.SQLITE_BUSY: Code.JOURNAL_BUSY,
    sqlite3.SQLITE_CORRUPT: Code.JOURNAL_DAMAGED,
    sqlite3.SQLITE_NOTADB: Code.JOURNAL_DAMAGED,
}

BUSY: Final = "another program has the journal locked"


def _primary(error: BaseException) -> int:
    # The code is missing from errors of the Python module's own making.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def has_no_room(error: sqlite3.Error) -> bool:
    """Whether the file system may be full."""
    return _primary(error) in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file is no database, or one that has been damaged."""
    return _primary(error) in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def may_have_left_frames(error: BaseException) -> bool:
    """Whether a commit that has failed so may stand whole in the log."""
    return getattr(error, "sqlite_errorcode", 0) in FSYNC


def failed_write(error: sqlite3.Error) -> JournalError | None:
    """Why a write that has stored nothing failed; None: by a mistake of ours."""
    code = _WRITING.get(_primary(error))
    if code is None:
        return None
    why = f"{BUSY} ({error})" if code is Code.JOURNAL_BUSY else f"the journal can't be written: {error}"
    return JournalError(code, f"{why}; nothing was stored")


def uncertain(error: sqlite3.Error) -> JournalError:
    """A commit that has failed, and that could not be made undone on the disk either."""
    return JournalError(
        Code.JOURNAL_UNCERTAIN,
        f"the journal can't be written: {error}; nothing is stored now, but after a power failure or a crash it may "
        "turn out to be stored: repeat the request under the same key",
    )


@contextmanager
def reading() -> Generator[None]:
    """Raise `JournalError` where SQLite can't read the file."""
    try:
        yield
    except sqlite3.Error as error:
        code = _READING.get(_primary(error))
        if code is None:
            raise
        if code is Code.JOURNAL_BUSY:
            raise JournalError(code, f"{BUSY} ({error})") from error
        raise JournalError(code, f"the journal can't be read: {error}") from error
