"""Cutting a connection that two other processes hold."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Final

PIDFD_GETFD: Final = 438
"""pidfd_getfd(2) has the same number on all architectures; Python has no name for it."""


def cut(pid: int, path: Path) -> int:
    """Shut down every connection that the process `pid` has taken at its unix socket `path`; how many there were.

    Both sides see the end of the connection, and nothing else happens to them. Raises `OSError` where one process may
    not take another's sockets.
    """
    wanted = {f"socket:[{inode}]" for inode in _connected(path)}
    libc = ctypes.CDLL(None, use_errno=True)
    done = 0
    process = os.pidfd_open(pid)
    try:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                if str(file.readlink()) not in wanted:
                    continue
                mine = libc.syscall(PIDFD_GETFD, process, int(file.name), 0)
                if mine < 0 and ctypes.get_errno() == errno.EBADF:
                    # The other side has just ended, and this one with it.
                    continue
                if mine < 0:
                    raise OSError(ctypes.get_errno(), "pidfd_getfd")
                with socket.socket(fileno=mine) as taken, suppress(OSError):
                    taken.shutdown(socket.SHUT_RDWR)
                    done += 1
    finally:
        os.close(process)
    return done


def _connected(path: Path) -> list[str]:
    """Inodes of the connected sockets on the listener's side (proc(5), /proc/net/unix)."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return [row[6] for row in rows if len(row) > 7 and row[7] == str(path) and row[5] == "03"]
