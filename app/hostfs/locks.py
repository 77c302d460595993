"""The locks by which QEMU keeps others from an image (block/file-posix.c), as the kernel lists them."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from app.core.chain import Identity
from app.core.evidence import Process
from app.hostfs.process import alive, borrowed, opened_path, pid_here

WRITE: Final = 101
UNSHARED_WRITE: Final = 201
"""The bytes that QEMU locks: "I write", and "nobody else may write"."""

LOCKS: Final = Path("/proc/locks")

FLOCK: Final = "hhqqi4x"
"""How `struct flock` is laid out (fcntl(2)): type, whence, start, length, pid."""

LOOKS: Final = 16
PAUSE: Final = 0.002
"""How often at most, and how many seconds apart, the list of all locks is read.

Next to a process that did nothing but lock and unlock 200 files, one look in five was wrong.
"""


def locked_by_another(path: str, process: Process | None) -> bool:
    """Whether a process other than `process` holds an image lock on the file that `process` calls `path`. May block.

    The kernel names no holder of such a lock, so the locks that `process` holds are taken off those there are.
    Where that can't be counted the answer is no, as QEMU's own open decides in the end.
    """
    if process is not None and pid_here(process) is None:
        # A monitor over TCP, or in another pid namespace: which locks are its own can't be told.
        return False
    with suppress(OSError), opened_path(path, process) as file:
        locked = is_locked(file, process)
        # A QEMU that is just ending still has its locks; that it has gone is told by the next command.
        return locked and (process is None or alive(process) is not False)
    return False


def is_locked(file: int, process: Process | None) -> bool:
    """Whether another process than `process` holds an image lock on an open file (O_PATH). May block; raises OSError.

    A process's own open file tells at once that nobody else does, and one that is opened here that nobody does at all.
    Where neither does (the process has the file open twice, or nobody may ask), all locks are read, for which the
    kernel makes everybody who locks something wait for up to 25 ms. It lists them a page at a time. While others come
    and go, one may be there twice, or be left out; so what most of several looks say is believed.
    """
    found = os.fstat(file)
    if process is not None and _has_it_alone(found, process):
        return False
    if _nobody_has_it(file, found):
        return False
    seen = {True: 0, False: 0}
    while max(seen.values()) <= LOOKS // 2:
        if any(seen.values()):
            time.sleep(PAUSE)
        seen[_seems_locked(found, process)] += 1
    return seen[True] > seen[False]


def _nobody_has_it(file: int, found: os.stat_result) -> bool:
    """Whether the kernel says of an opening of our own that no other one has a lock."""
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISBLK(found.st_mode):
        return False
    with suppress(OSError):
        handle = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return is_free(handle)
        finally:
            os.close(handle)
    return False


def is_free(handle: int) -> bool:
    """Whether nobody holds an image lock on an open file but that very opening of it. May block; raises OSError.

    As QEMU asks it (util/osdep.c: qemu_lock_fd_test): which lock would keep this one from locking the byte for itself.
    """
    for byte in (WRITE, UNSHARED_WRITE):
        asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        kind, *_ = struct.unpack(FLOCK, fcntl.fcntl(handle, fcntl.F_OFD_GETLK, asked))
        if kind != fcntl.F_UNLCK:
            return False
    return True


def _has_it_alone(file: os.stat_result, process: Process) -> bool:
    with suppress(OSError), borrowed(process, (file.st_dev, file.st_ino)) as handle:
        return is_free(handle)
    return False


def locked_files() -> frozenset[Identity] | None:
    """The files that have locks of QEMU's kind, whoever holds them; None where that can't be seen."""
    with suppress(OSError):
        fields = [line.split() for line in LOCKS.read_text().splitlines()]
        return frozenset(_identity(line[-3]) for line in fields if "OFDLCK" in line)
    return None


def _identity(text: str) -> Identity:
    major, minor, inode = text.split(":")
    return (os.makedev(int(major, 16), int(minor, 16)), int(inode))


def _seems_locked(file: os.stat_result, process: Process | None) -> bool:
    inode = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
    if _count(LOCKS.read_text(), inode) == 0:
        return False
    ours = _locks_of(process, inode) if process is not None and alive(process) else 0
    return _count(LOCKS.read_text(), inode) > ours


def _locks_of(process: Process, inode: str) -> int:
    count = 0
    for info in Path(f"/proc/{pid_here(process)}/fdinfo").iterdir():
        with suppress(OSError):
            count += _count(info.read_text(), inode)
    return count


def _count(locks: str, inode: str) -> int:
    """How many holders lock the bytes by which QEMU tells that it writes, or lets nobody write.

    `locks` is as in /proc/locks (proc(5)): `1: OFDLCK ADVISORY READ -1 fe:00:1234 201 201`.
    """
    count = 0
    for line in locks.splitlines():
        fields = line.removeprefix("lock:\t").split()
        if inode not in fields or "OFDLCK" not in fields:
            continue
        first, last = fields[-2], fields[-1]
        end = 1 << 63 if last == "EOF" else int(last)
        count += sum(int(first) <= byte <= end for byte in (WRITE, UNSHARED_WRITE))
    return count
