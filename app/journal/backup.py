"""Copies of a journal: made while a service works on it, and put back while none does."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

from app.journal import epoch
from app.journal.database import (
    FILE,
    RESTORED,
    connect_to_read,
    damage,
    damaged,
    make,
    newest_schema,
    schema_of,
)
from app.journal.files import sync_folder
from app.journal.held import LOCK
from app.journal.lock import locked

KEPT: Final = f"{FILE}.before-restore"
"""What the journal was that a restore has replaced, with its log beside it."""

PAGES: Final = 1000
"""Pages that are copied at a time, so that the service writes in between."""


class BackupError(Exception):
    """A copy that can't be made or put back; the message says why, for a person. Nothing has changed."""


def backup(state_dir: Path, target: Path) -> int:
    """Write a copy of the journal as it is at one moment to a new file; its size in bytes.

    The copy is one file, readable by its owner only, and there whole or not at all. Raises `BackupError` where the
    target is there already or the journal is missing or damaged, and `OSError`.
    """
    if not (state_dir / FILE).exists():
        raise BackupError(f"there is no journal in {state_dir}")
    if target.exists():
        raise BackupError(f"{target} is there already; choose a new name")
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        try:
            with closing(connect_to_read(state_dir)) as source, closing(sqlite3.connect(draft)) as copy:
                source.backup(copy, pages=PAGES)
                copy.execute("PRAGMA journal_mode = DELETE")
                # So that it is known for a copy, also where somebody puts it back by hand.
                with copy:
                    copy.execute("DELETE FROM meta WHERE key = 'start'")
                found = damage(copy)
        except sqlite3.Error as error:
            raise BackupError(f"{state_dir / FILE} can't be copied to {target}: {error}") from error
        if found is not None:
            raise BackupError(str(damaged(state_dir / FILE, found)))
        _sync(draft)
        # Fails where somebody else has made a file of that name meanwhile.
        os.link(draft, target)
        sync_folder(target.parent)
    finally:
        draft.unlink(missing_ok=True)
    return target.stat().st_size


def restore(state_dir: Path, source: Path) -> Path | None:
    """Put a copy in the place of the journal, and begin a new epoch; where the one before was kept, if there was one.

    Cut short at any moment, it has either not happened, or is finished by the next start. Raises `BackupError` where
    the file is no journal, is damaged, or is of a newer release, `StateDirInUse` while a service runs, and `OSError`.
    """
    with locked(state_dir, new=False):
        draft = state_dir / f".{RESTORED}"
        _copy(source, draft)
        kept = _keep_old(state_dir)
        known = epoch.load(state_dir)
        # No journal has this number, so the next start begins a new epoch.
        epoch.store(state_dir, epoch.Epoch(number=known.number if known else 0, starts=()))
        draft.replace(state_dir / RESTORED)
        sync_folder(state_dir)
        # Alone in the folder: a `token` command would finish it, too.
        make(state_dir)
        _give(state_dir)
        return kept


def _give(state_dir: Path) -> None:
    """Let the files belong to whom the folder belongs: root may restore what a user's service reads."""
    owner = state_dir.stat()
    if os.geteuid() == 0:
        for name in (FILE, KEPT, f"{KEPT}-wal", epoch.FILE, LOCK):
            with suppress(FileNotFoundError):
                os.chown(state_dir / name, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _copy(source: Path, draft: Path) -> None:
    """A checked copy of a journal's file, without what is in a log beside it: a backup has none."""
    draft.unlink(missing_ok=True)
    if source.with_name(source.name + "-wal").exists():
        raise BackupError(
            f"{source} has a log beside it, so it is the file of a service and no backup; make one with "
            "`blockjobd journal backup FILE`"
        )
    os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        with draft.open("wb") as copy, source.open("rb") as original:
            while block := original.read(1 << 20):
                copy.write(block)
        if (why := _why_not(draft)) is not None:
            raise BackupError(f"{source} {why}")  # noqa: TRY301 - the draft goes, whatever it is
        _sync(draft)
    except sqlite3.Error as error:
        draft.unlink(missing_ok=True)
        raise BackupError(f"{source} is no journal of blockjobd: {error}") from error
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _why_not(file: Path) -> str | None:
    """Why a file can't become the journal; None: it can. Raises `sqlite3.Error` where it is no database."""
    with closing(sqlite3.connect(f"file:{_quoted(file)}?mode=ro&immutable=1", uri=True)) as connection:
        schema = schema_of(connection)
        if schema == 0:
            return "is no journal of blockjobd"
        if schema > newest_schema():
            return f"has schema {schema}: a newer blockjobd wrote it; use that release"
        found = damage(connection)
        return None if found is None else f"is damaged ({found})"


def _keep_old(state_dir: Path) -> Path | None:
    """Give what is there a second name each: a restore of the wrong file must not cost the right one."""
    path, kept = state_dir / FILE, state_dir / KEPT
    if not path.exists():
        return None
    for suffix in ("", "-wal"):
        with suppress(FileNotFoundError):
            kept.with_name(kept.name + suffix).unlink()
        with suppress(FileNotFoundError):
            os.link(path.with_name(path.name + suffix), kept.with_name(kept.name + suffix))
    return kept


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _quoted(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
