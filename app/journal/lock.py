"""One service to a state directory."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from app.journal.database import make, prepare
from app.journal.held import FILE, LOCK


class StateDirInUse(Exception):
    """Another service works on this state directory."""

    def __init__(self, state_dir: Path) -> None:
        super().__init__(f"another blockjobd serves from {state_dir}; stop it, or give this one a state_dir of its own")
        self.state_dir = state_dir


@contextmanager
def locked(state_dir: Path, *, new: bool = True) -> Generator[None]:
    """Hold the state directory, which is made if it is missing, for one service.

    The journal itself is locked too, as somebody may have removed the lock's file; with `new` it is made if it is
    missing. The kernel lets go of the locks when the process ends, however it ends. Raises `StateDirInUse`, what
    `app.journal.database.connect` raises, or `OSError` where the directory can't be made or written.
    """
    prepare(state_dir)
    with ExitStack() as stack:
        handle = os.open(state_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, handle)
        _lock(handle, state_dir)
        if new:
            make(state_dir)
        with suppress(FileNotFoundError):
            # Closed after every connection to the file: that drops the locks of the whole process (fcntl(2)).
            handle = os.open(state_dir / FILE, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, handle)
            _lock(handle, state_dir)
        yield


def _lock(handle: int, state_dir: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StateDirInUse(state_dir) from None
