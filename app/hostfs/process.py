"""Processes as /proc shows them: which QEMU it is, whether it still runs, and where its files are."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Final

from app.core.chain import Identity
from app.core.evidence import Process, same_view
from app.core.sameness import Sameness
from app.hostfs.opening import seen_from

PIDFD_GETFD: Final = 438
"""The number of pidfd_getfd(2), for which Python has no function; it is the same on all of today's architectures."""

DELETED: Final = " (deleted)"
"""What the kernel adds to the name of an open file that has been unlinked (proc(5))."""

_libc: Final = ctypes.CDLL(None, use_errno=True)


@cache
def boot_id() -> str:
    """What tells this boot of the host from every other one (random(4)); raises OSError."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


@cache
def own_view() -> str:
    """Where the numbers of processes hold that this service sees; raises OSError."""
    machine = ""
    # The second one, which anybody may read, is another one in a container, or none.
    for file in ("/sys/class/dmi/id/product_uuid", "/etc/machine-id"):
        with suppress(OSError, ValueError):
            machine = machine or Path(file).read_text(encoding="ascii").strip()
    return f"{machine.replace('/', '')}/{boot_id()}/{os.stat('/proc/self/ns/pid').st_ino}"


def pid_here(process: Process | None) -> int | None:
    """The process's pid, as this service sees processes; None where it can't be seen from here."""
    if process is None or same_view(process.view, own_view()) is not Sameness.SAME:
        return None
    return process.pid


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot (proc(5), stat field 22); None where it can't be seen."""
    with suppress(OSError):
        fields = _stat(pid)
        return int(fields[19]) if fields else None
    return None


def is_stopped(pid: int) -> bool:
    """Whether the process is stopped by a signal or a debugger, so that it answers nobody."""
    with suppress(OSError):
        fields = _stat(pid)
        return fields is not None and fields[0] in ("T", "t")
    return False


def alive(process: Process) -> bool | None:
    """Whether that very process still runs; None where it can't be seen from here. A zombie has ended.

    An error while looking (no descriptor left, no right to look) says nothing of the process, and neither does a number
    that holds in another pid namespace.
    """
    if same_view(process.view, own_view()) is Sameness.OTHER:
        return False
    pid = pid_here(process)
    if pid is None or process.started is None:
        return None
    try:
        fields = _stat(pid)
    except OSError:
        return None
    if fields is not None:
        return fields[0] not in ("Z", "X") and int(fields[19]) == process.started
    try:
        # A /proc that is mounted with hidepid shows others' processes as if they were not there.
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return None
    return None


def _stat(pid: int) -> list[str] | None:
    """The fields of the process from the third on; None if there is no such process. Raises OSError."""
    try:
        # The second field, the command in parentheses, may hold anything, also spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def as_seen_by(path: str, process: Process | None) -> str:
    """The path under which this service finds the file that the process calls `path`.

    A process in a container has another root, or other mounts below the same one; its files are found below
    /proc/PID/root (proc(5)). Once it has ended nothing leads there any more, and its pid may be another's: the path is
    the service's own then, and may be another file's. Who relies on a file compares its identity.
    """
    root = _other_root(process) if path.startswith("/") else None
    return path if root is None else root + path


def stat_of(path: str, process: Process | None) -> os.stat_result:
    """What the file system says of the file that the process calls `path`, links followed. Raises OSError."""
    with opened_path(path, process) as file:
        return os.fstat(file)


@contextmanager
def opened_path(path: str, process: Process | None) -> Generator[int]:
    """The file (O_PATH: nothing is done to it) that the process calls `path`, links followed. Raises OSError."""
    root = _other_root(process) if path.startswith("/") else None
    if root is not None:
        with seen_from(root, path) as file:
            yield file
        return
    file = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        yield file
    finally:
        os.close(file)


def _other_root(process: Process | None) -> str | None:
    """Where the process's root is, if its paths lead elsewhere than the service's own."""
    pid = pid_here(process)
    if process is None or pid is None:
        return None
    there = f"/proc/{pid}"
    with suppress(OSError):
        same_root = os.path.samestat(os.stat(f"{there}/root"), os.stat("/"))
        same_mounts = os.readlink(f"{there}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
        # Asked last: what was read before is that very process's only if it has not ended since.
        if not (same_root and same_mounts) and alive(process) is not False:
            return f"{there}/root"
    return None


FILES: Final = frozenset({stat.S_IFREG, stat.S_IFBLK, stat.S_IFCHR})
"""What an image can be; a QEMU has many more sockets, pipes and descriptors of the kernel's own."""


def open_files(process: Process) -> frozenset[Identity] | None:
    """The identities of the files that the process has open, none if it has ended; None where that can't be seen."""
    found: set[Identity] | None = None
    with suppress(OSError):
        files = list(os.scandir(f"/proc/{pid_here(process)}/fd"))
        seen: set[Identity] = set()
        for file in files:
            try:
                status = file.stat()
                if stat.S_IFMT(status.st_mode) not in FILES:
                    continue
                link = file.stat(follow_symlinks=False)
            except FileNotFoundError:
                # It was closed meanwhile.
                continue
            # The rights of the link are those with which the file is open (proc(5)): none for O_PATH, which takes none.
            if link.st_mode & (stat.S_IRUSR | stat.S_IWUSR):
                seen.add((status.st_dev, status.st_ino))
        found = seen
    if alive(process) is False:
        return frozenset()
    return None if found is None else frozenset(found)


def files_seen_open(process: Process | None) -> frozenset[Identity]:
    """The files that the process can be seen to have open; none where it, or what it has, can't be seen."""
    if process is None or pid_here(process) is None:
        return frozenset()
    return open_files(process) or frozenset()


def unlinked_files(process: Process) -> frozenset[str] | None:
    """What the files were called that the process has open and that have no name any more; None: it can't be seen."""
    try:
        files = list(os.scandir(f"/proc/{pid_here(process)}/fd"))
    except OSError:
        return None
    found: set[str] = set()
    for file in files:
        with suppress(OSError):
            name = os.readlink(file.path)
            if name.endswith(DELETED) and file.stat().st_nlink == 0:
                found.add(name.removesuffix(DELETED))
    return frozenset(found)


@contextmanager
def borrowed(process: Process, wanted: Identity) -> Generator[int]:
    """The process's own open file (not another opening of it) of that identity, for as long as the block lasts.

    Raises OSError where the process has no such file open, or lets nobody have it (ptrace(2), "access mode checking").
    """
    pid = pid_here(process)
    if pid is None:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    pidfd = os.pidfd_open(pid)
    try:
        # Asked now: the process that is held here can't give its pid to another one.
        if not alive(process):
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        file = _duplicate(pidfd, _number_of(pid, wanted))
    finally:
        os.close(pidfd)
    try:
        found = os.fstat(file)
        if (found.st_dev, found.st_ino) != wanted:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        yield file
    finally:
        os.close(file)


def _number_of(pid: int, wanted: Identity) -> int:
    with os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with suppress(OSError):
                found = entry.stat()
                if (found.st_dev, found.st_ino) == wanted:
                    return int(entry.name)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def _duplicate(pidfd: int, number: int) -> int:
    file = _libc.syscall(PIDFD_GETFD, pidfd, number, 0)
    if file < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(file)


def open_folder(path: str, process: Process | None) -> int:
    """The open folder of the file that the process calls `path`; raises OSError.

    Below another root no links are followed: the kernel resolves an absolute one, and `..`, from the service's own
    root (path_resolution(7)), so that the process could lead the service anywhere.
    """
    root = _other_root(process)
    if root is None:
        return os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
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
        return os.readlink(f"/proc/{pid_here(process)}/cwd")
    return None
