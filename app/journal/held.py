"""Whether the journal's paths still lead to the files that are open.

A file that is removed or replaced stays open, and takes writes that nobody will ever find again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from app.core.errors import Code
from app.engine.ports.journal import JournalError

LOCK: Final = "lock"
FILE: Final = "journal.sqlite3"
LOG: Final = f"{FILE}-wal"
INDEX: Final = f"{FILE}-shm"
PARTS: Final = (FILE, LOG, INDEX, LOCK)
"""The file, SQLite's log and the index of that, and the lock that keeps a second service out."""


CRAMPED: Final = 256 << 10
"""Bytes of room below which a write of a moment ago proves nothing any more."""


class HeldFiles:
    """The files of a state directory as they were when the journal was opened."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._known = {
            state_dir / name: identity for name in PARTS if (identity := _identity(state_dir / name)) is not None
        }

    def check(self) -> dict[str, int]:
        """The size in bytes of the `file` and the `log`. Raises `JournalError` where a path leads elsewhere."""
        sizes: dict[str, int] = {}
        for path, known in self._known.items():
            try:
                found = path.stat()
            except OSError as error:
                raise self._replaced(path, f"is not there any more ({error.strerror})") from error
            if (found.st_dev, found.st_ino) != known:
                raise self._replaced(path, "is another file than when the service started")
            if path.name == FILE:
                sizes["file"] = found.st_size
            elif path.name == LOG:
                sizes["log"] = found.st_size
        return sizes

    def is_cramped(self) -> bool:
        """Whether so little room is left, or the file system is read-only by now, that the next write may fail."""
        found = os.statvfs(self._state_dir)
        return found.f_bavail * found.f_frsize < CRAMPED or bool(found.f_flag & os.ST_RDONLY)

    def _replaced(self, path: Path, how: str) -> JournalError:
        return JournalError(
            Code.JOURNAL_REPLACED,
            f"{path} {how}: what is written now would be lost, so nothing is. Put the files of {self._state_dir} back, "
            "or stop the service and restore a backup",
        )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
