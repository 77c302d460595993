"""One service to a state directory."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from app.journal.database import prepare


class StateDirInUse(Exception):
    """Another service works on this state directory."""

    def __init__(self, state_dir: Path) -> None:
        super().__init__(f"another blockjobd serves from {state_dir}; stop it, or give this one a state_dir of its own")
        self.state_dir = state_dir


@contextmanager
def locked(state_dir: Path) -> Generator[None]:
    """Hold the state directory, which is made if it is missing, for one service.

    The kernel lets go of the lock when the process ends, however it ends. Raises `StateDirInUse`, or `OSError` where
    the directory can't be made or written.
    """
    prepare(state_dir)
    handle = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateDirInUse(state_dir) from None
        yield
    finally:
        os.close(handle)
