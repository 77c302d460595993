"""The SQLite file of a state directory: opening it, bringing its schema up to date, and transactions on it."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

from app.journal import held, reserve
from app.journal.failures import failed_write, has_no_room, is_damage, may_have_left_frames, uncertain
from app.journal.files import sync_folder
from app.journal.upgrade import STEPS

FILE: Final = held.FILE

DRAFT: Final = f".{FILE}.new"
"""Where a new journal is made, so that it is there whole or not at all."""

RESTORED: Final = f"{FILE}.restored"
"""A journal that takes the place of the one that is there, as soon as somebody opens that."""

BUSY_S: Final = 1.0
"""Seconds to wait for another process, such as a `token` command, that is writing."""

LOG_LIMIT: Final = 16 << 20
"""Bytes that SQLite's log keeps on the disk once all that is in it stands in the file."""


class JournalUnusable(Exception):
    """The journal can't be opened: it is no journal, is damaged, or was written by a newer release."""


def prepare(state_dir: Path) -> None:
    """Make the state directory, for its owner only, if it is missing; raises `OSError`."""
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)


def connect(state_dir: Path) -> sqlite3.Connection:
    """A connection that may write, to a file that exists afterwards and has the newest schema.

    It may be handed from thread to thread, and used by one at a time. Raises `JournalUnusable`, `JournalError` where
    the schema has to be written and can't be, and `OSError`.
    """
    make(state_dir)
    path = state_dir / FILE
    try:
        with _alone(state_dir):
            try:
                return _connect(path)
            except sqlite3.Error as error:
                if not has_no_room(error) or not reserve.give_up(state_dir):
                    raise
            return _connect(path)
    except sqlite3.Error as error:
        if is_damage(error):
            raise damaged(path, str(error)) from error
        hint = "; its file system may be full" if has_no_room(error) else ""
        raise JournalUnusable(f"{path} can't be opened: {error}{hint}") from error


def make(state_dir: Path) -> None:
    """See to it that there is a journal: finish a restore that was cut short, or make a new one.

    Raises as `connect` does. A file without a byte is no new journal: something has cut it off.
    """
    prepare(state_dir)
    path = state_dir / FILE
    with _alone(state_dir):
        finish_restore(state_dir)
        if not path.exists():
            draft = state_dir / DRAFT
            _remove(draft)
            try:
                os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                with closing(_connect(draft)):
                    pass
            except sqlite3.Error as error:
                hint = "; its file system may be full" if has_no_room(error) else ""
                raise JournalUnusable(f"{path} can't be made: {error}{hint}") from error
            draft.replace(path)
            sync_folder(state_dir)
        elif path.stat().st_size == 0:
            raise JournalUnusable(
                f"{path} has no byte: it was cut off, and is no new journal. Restore a backup with `blockjobd journal "
                "restore FILE`; where this service has never done anything, remove the file"
            )


def finish_restore(state_dir: Path) -> None:
    """Let a restored journal take its place. The log of the one before would be replayed into it, so it goes first."""
    restored, path = state_dir / RESTORED, state_dir / FILE
    if restored.exists():
        for part in (held.LOG, held.INDEX):
            (state_dir / part).unlink(missing_ok=True)
        restored.replace(path)
        sync_folder(state_dir)


def damaged(path: Path, found: str) -> JournalUnusable:
    """The error of a journal that is damaged, in a line for a person."""
    return JournalUnusable(
        f"journal-damaged: {path} is damaged ({found}); nothing was changed. Keep a copy of the file, then restore a "
        "backup with `blockjobd journal restore FILE`"
    )


def damage(connection: sqlite3.Connection) -> str | None:
    """What SQLite's own check finds wrong with the file, in a line; None: nothing. Reads all of it."""
    try:
        found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(3)")]
    except sqlite3.DatabaseError as error:
        return str(error)
    return None if found == ["ok"] else " ".join("; ".join(found).split())


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm", "-journal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


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
    # The -wal and -shm files get the mode of this one.
    connection = _open(path)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # A promise that was made outlives a power failure.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA journal_size_limit = {LOG_LIMIT}")
        connection.execute("PRAGMA foreign_keys = ON")
        _migrate(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)


@contextmanager
def transaction(connection: sqlite3.Connection) -> Generator[None]:
    """All that is written inside is stored durably, or nothing is.

    Raises `JournalError` where the file can't be written; the connection can be used again once it can.
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
        if isinstance(error, sqlite3.Error):
            if may_have_left_frames(error) and not _write_over(connection):
                raise uncertain(error) from error
            if (failure := failed_write(error)) is not None:
                raise failure from error
        raise


def _write_over(connection: sqlite3.Connection) -> bool:
    """Write something else where a failed commit's frames may stand in the log; whether that is on the disk.

    SQLite goes on as if they were not there. A recovery, after a crash, reads what is there, and would replay them. The
    next commit takes their place.
    """
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE meta SET value = value + 1 WHERE key = 'checks'")
        connection.execute("COMMIT")
    except sqlite3.Error:
        if connection.in_transaction:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        return False
    return True


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Run the migrations that this file has not seen, forward only, each with its number in one transaction."""
    newest = newest_schema()
    if schema_of(connection) == newest:
        # Nothing to write, so that a service on a full file system still starts.
        return
    with transaction(connection):
        version = schema_of(connection)
        if version > newest:
            raise JournalUnusable(
                f"{path} has schema {version}, and this release knows schemas up to {newest}: "
                "a newer blockjobd wrote it. Use that release, or another state_dir."
            )
        for number, file in _scripts():
            if number > version:
                for statement in _statements(file.read_text(encoding="utf-8")):
                    connection.execute(statement)
                if number in STEPS:
                    STEPS[number](connection)
                connection.execute(f"PRAGMA user_version = {number}")


def _scripts() -> list[tuple[int, Traversable]]:
    return sorted(
        (int(file.name.split("_")[0]), file) for file in files("app.journal").joinpath("migrations").iterdir()
    )


def newest_schema() -> int:
    """The newest schema that this release knows."""
    return _scripts()[-1][0]


def schema_of(connection: sqlite3.Connection) -> int:
    """The schema that a file has; 0: none of a journal."""
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
