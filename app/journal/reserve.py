"""Room on the file system that is kept for the journal's own start.

SQLite needs some pages for its log and the index of that before anything can be read. On a file system that is full a
service could not start, while a job waits in QEMU for a person.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

FILE: Final = "reserve"

BYTES: Final = 1 << 20
"""Enough for SQLite's files and some hundred small transactions."""


def keep(state_dir: Path) -> bool:
    """See to it that the reserve is there; whether it is. Never raises for want of room."""
    path = state_dir / FILE
    with suppress(OSError):
        if path.stat().st_blocks * 512 >= BYTES:
            return True
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        return False
    try:
        os.posix_fallocate(handle, 0, BYTES)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            # What little it has got would be missing elsewhere.
            path.unlink(missing_ok=True)
        return False
    finally:
        os.close(handle)
    return True


def give_up(state_dir: Path) -> bool:
    """Make room; whether there was a reserve."""
    try:
        (state_dir / FILE).unlink()
    except OSError:
        return False
    return True
