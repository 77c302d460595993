"""The SQLite file of a state directory: opening it, bringing its schema up to date, and transactions on it."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Final

from app.engine.ports.journal import JournalFull
from app.journal.upgrade import STEPS

FILE: Final = "journal.sqlite3"

BUSY_TIMEOUT: Final = 5.0
"""Seconds to wait for another process, such as a `token` command, that is writing."""

UNWRITABLE: Final = frozenset(
    {
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
    }
)
"""SQLite's primary result codes for a file that can't be written now; any other code is a mistake of ours."""


class JournalUnusable(Exception):
    """The journal can't be opened: it is no journal, is damaged, or was written by a newer release."""


def prepare(state_dir: Path) -> None:
    """Make the state directory, for its owner only, if it is missing; raises `OSError`."""
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)


def connect(state_dir: Path) -> sqlite3.Connection:
    """A connection that may write, to a file that exists afterwards and has the newest schema.

    It may be handed from thread to thread, and used by one at a time. Raises `JournalUnusable`, `JournalFull` where
    the schema has to be written and can't be, and `OSError`.
    """
    prepare(state_dir)
    path = state_dir / FILE
    try:
        with _alone(state_dir):
            return _connect(path)
    except sqlite3.Error as error:
        no_room = getattr(error, "sqlite_errorcode", 0) & 0xFF in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}
        hint = "; its file system may be full" if no_room else ""
        raise JournalUnusable(f"{path} can't be opened: {error}{hint}") from error


def connect_to_read(state_dir: Path) -> sqlite3.Connection:
    """A connection that can't write, to a file that `connect` has opened before."""
    connection = _open(state_dir / FILE)
    connection.execute("PRAGMA query_only = ON")
    return connection


@contextmanager
def _alone(folder: Path) -> Generator[None]:
    """Let one process at a time in: SQLite's busy timeout does not hold for turning a new file into a WAL one."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _connect(path: Path) -> sqlite3.Connection:
    # SQLite would make the file readable for all; its -wal and -shm files get the mode of this one. A file that exists
    # is not touched: closing it again would drop the locks that this process's other connections hold (fcntl(2)).
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    connection = _open(path)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # A promise that was made outlives a power failure.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        _migrate(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)


@contextmanager
def transaction(connection: sqlite3.Connection) -> Generator[None]:
    """All that is written inside is stored durably, or nothing is.

    Raises `JournalFull` where the file can't be written; the connection can be used again once it can.
    """
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("COMMIT")
    except BaseException as error:
        # After some failures SQLite has rolled back by itself; where it can't, the next BEGIN tells.
        if connection.in_transaction:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        # The code is missing from errors of the Python module's own making.
        if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in UNWRITABLE:
            raise JournalFull(f"the journal can't be written: {error}; nothing was stored") from error
        raise


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Run the migrations that this file has not seen, forward only, each with its number in one transaction."""
    scripts = sorted(
        (int(file.name.split("_")[0]), file) for file in files("app.journal").joinpath("migrations").iterdir()
    )
    newest = scripts[-1][0]
    if _version(connection) == newest:
        # Nothing to write, so that a service on a full file system still starts.
        return
    with transaction(connection):
        version = _version(connection)
        if version > newest:
            raise JournalUnusable(
                f"{path} has schema {version}, and this release knows schemas up to {newest}: "
                "a newer blockjobd wrote it. Use that release, or another state_dir."
            )
        for number, file in scripts:
            if number > version:
                for statement in _statements(file.read_text(encoding="utf-8")):
                    connection.execute(statement)
                if number in STEPS:
                    STEPS[number](connection)
                connection.execute(f"PRAGMA user_version = {number}")


def _version(connection: sqlite3.Connection) -> int:
    with closing(connection.execute("PRAGMA user_version")) as cursor:
        (version,) = cursor.fetchone()
    return int(version)


def _statements(script: str) -> Iterator[str]:
    # Connection.executescript() commits first, which would leave half a migration behind after a crash.
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
