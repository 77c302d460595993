"""Who listens at a unix socket."""

from __future__ import annotations

import os
import re
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

from app.hostfs.process import start_time

SO_PEERPIDFD: Final = 77
"""Asks for a descriptor of the peer's process instead of a number (Linux 6.5; include/uapi/asm-generic/socket.h)."""

SLACK_S: Final = 2.0
"""Seconds by which the times of files and of processes may differ: the kernel keeps them by different clocks."""


def listener(sock: socket.socket, path: str) -> int | None:
    """The pid of the process that made the listening socket at `path`; None where nobody vouches for it.

    A listener that has ended leaves its number, which another process may have by now (unix(7), SO_PEERCRED). So the
    kernel's own descriptor of the process has to name it, or, where there is none, the process has to be of the same
    user and older than the socket.
    """
    pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if not pid:
        # It is in a pid namespace that can't be seen from here.
        return None
    known = _by_descriptor(sock)
    if known is not None:
        return pid if known == pid else None
    return pid if _is_plausible(pid, uid, path) else None


def _by_descriptor(sock: socket.socket) -> int | None:
    """The pid of the peer; -1 once it has ended, None where the kernel has no descriptor for it."""
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except ProcessLookupError:
        return -1
    except OSError:
        return None
    try:
        found = re.search(r"^Pid:\s*(-?\d+)$", Path(f"/proc/self/fdinfo/{pidfd}").read_text(), re.MULTILINE)
    except OSError:
        return None
    finally:
        os.close(pidfd)
    return int(found.group(1)) if found else None


def _is_plausible(pid: int, uid: int, path: str) -> bool:
    with suppress(OSError):
        effective = re.search(r"^Uid:\s*\d+\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        started = start_time(pid)
        if effective is None or started is None or int(effective.group(1)) != uid:
            return False
        # A process can't have made what was there before it.
        booted = re.search(r"^btime (\d+)$", Path("/proc/stat").read_text(), re.MULTILINE)
        made = Path(path).stat().st_ctime
        return booted is not None and int(booted.group(1)) + started / os.sysconf("SC_CLK_TCK") <= made + SLACK_S
    return False
