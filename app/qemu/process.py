"""Processes as /proc shows them: which QEMU it is, whether it still runs, and where its files are."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from app.core.job import Process


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot (proc(5), stat field 22); None where it can't be seen."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def is_stopped(pid: int) -> bool:
    """Whether the process is stopped by a signal or a debugger, so that it answers nobody."""
    fields = _stat(pid)
    return fields is not None and fields[0] in ("T", "t")


def alive(process: Process) -> bool | None:
    """Whether that very process still runs; None where it can't be seen from here. A zombie has ended."""
    if process.pid is None or process.started is None:
        return None
    fields = _stat(process.pid)
    return fields is not None and fields[0] not in ("Z", "X") and int(fields[19]) == process.started


def _stat(pid: int) -> list[str] | None:
    with suppress(OSError):
        # The second field, the command in parentheses, may hold anything, also spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return None


def as_seen_by(path: str, process: Process | None) -> str:
    """The path under which this service finds the file that the process calls `path`.

    A process in a container has another root; its files are found below /proc/PID/root (proc(5)).
    """
    if process is None or process.pid is None or not path.startswith("/"):
        return path
    root = f"/proc/{process.pid}/root"
    with suppress(OSError):
        if os.path.samestat(os.stat(root), os.stat("/")):
            return path
        return root + path
    return path


def open_folder(path: str, process: Process | None) -> int:
    """The open folder of the file that the process calls `path`; raises OSError.

    Below another root no links are followed: the kernel resolves an absolute one, and `..`, from the service's own
    root (path_resolution(7)), so that the process could lead the service anywhere.
    """
    if as_seen_by(path, process) == path or process is None:
        return os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    folder = os.open(f"/proc/{process.pid}/root", os.O_RDONLY | os.O_DIRECTORY)
    for name in filter(None, os.path.dirname(path).split("/")):
        above = folder
        try:
            if name == "..":
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
        finally:
            os.close(above)
    return folder


def place_of(file: int) -> str:
    """Where an open file or folder really is. Unlike a path that is resolved, it can't change before it is used."""
    return os.readlink(f"/proc/self/fd/{file}")


def folder_of(process: Process) -> str | None:
    """The process's working directory, which its relative paths start from; None where it can't be seen."""
    with suppress(OSError):
        return os.readlink(f"/proc/{process.pid}/cwd")
    return None
