"""Opening a file by a path, in somebody's view of the file system, without doing anything to it. May block."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Generator
from contextlib import contextmanager
from enum import IntFlag
from typing import Final

OPENAT2: Final = 437
"""The number of openat2(2), for which Python has no function; it is the same on all of today's architectures."""

AT_EMPTY_PATH: Final = 0x1000
"""For statx(2): the open file itself is meant."""

_libc: Final = ctypes.CDLL(None, use_errno=True)


class Walk(IntFlag):
    """How openat2(2) is to walk a path."""

    NO_MAGICLINKS = 0x02
    NO_SYMLINKS = 0x04
    BENEATH = 0x08
    """Nothing outside of the folder is reached."""
    IN_ROOT = 0x10
    """The folder is the root: absolute links and `..` stay below it."""


def open_below(folder: int, path: str, flags: int, walk: Walk) -> int:
    """Open `path`, starting from the open `folder`, with the flags of open(2); raises OSError."""
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, 0, walk)
    file = _libc.syscall(OPENAT2, folder, os.fsencode(path), how, len(how))
    if file < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path)
    return int(file)


@contextmanager
def seen_from(root: str, path: str) -> Generator[int]:
    """The file (O_PATH, links followed) that a process with the root folder `root` calls `path`; raises OSError.

    The path's links are resolved as that process would: an absolute one starts from its root and not from ours.
    """
    folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        file = open_below(folder, path, os.O_PATH, Walk.IN_ROOT | Walk.NO_MAGICLINKS)
    finally:
        os.close(folder)
    try:
        yield file
    finally:
        os.close(file)


STATX_BTIME: Final = 0x800
BTIME_AT: Final = 80
"""Where a `struct statx` has the time of birth: seconds in 8 bytes, nanoseconds in 4 (statx(2))."""


def born_at(file: int) -> int | None:
    """When an open file was made, in ns since 1970; None where its file system does not say."""
    found = ctypes.create_string_buffer(256)
    if _libc.statx(file, b"", AT_EMPTY_PATH, STATX_BTIME, found) != 0:
        return None
    (mask,) = struct.unpack_from("I", found)
    seconds, nanoseconds = struct.unpack_from("qI", found, BTIME_AT)
    return seconds * 1_000_000_000 + nanoseconds if mask & STATX_BTIME and seconds > 0 else None
