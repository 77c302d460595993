"""A disk under SQLite that fails when it is told to, and that forgets at a power cut what was never synced.

It stands between SQLite and its own functions for files (https://www.sqlite.org/vfs.html): a VFS that wraps the default
one, made with ctypes, for every file that this process opens through SQLite from then on. The index of the log is
memory that SQLite shares between processes; it is not kept on disks, and passes through.
"""

from __future__ import annotations

import ctypes
import random
import sqlite3
import threading
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, byref, c_char_p, c_int, c_int64, c_void_p, cast, sizeof
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

SECTOR: Final = 512
"""Bytes that a disk writes as a whole."""

NAME: Final = b"failing"

_XRW = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)
_XTRUNCATE = CFUNCTYPE(c_int, c_void_p, c_int64)
_XSYNC = CFUNCTYPE(c_int, c_void_p, c_int)
_XCLOSE = CFUNCTYPE(c_int, c_void_p)
_XOPEN = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, POINTER(c_int))
_XDELETE = CFUNCTYPE(c_int, c_void_p, c_char_p, c_int)


class _Methods(ctypes.Structure):
    """`sqlite3_io_methods`, the functions that are not looked at as plain pointers."""

    _fields_ = [
        ("version", c_int),
        ("close", _XCLOSE),
        ("read", _XRW),
        ("write", _XRW),
        ("truncate", _XTRUNCATE),
        ("sync", _XSYNC),
        *((f"other{number}", c_void_p) for number in range(13)),
    ]


class _File(ctypes.Structure):
    """`sqlite3_file`: whatever comes behind the pointer is the default VFS's own."""

    _fields_ = [("methods", POINTER(_Methods))]


class _Vfs(ctypes.Structure):
    """`sqlite3_vfs`."""

    _fields_ = [
        ("version", c_int),
        ("size", c_int),
        ("longest", c_int),
        ("following", c_void_p),
        ("name", c_char_p),
        ("data", c_void_p),
        ("open", _XOPEN),
        ("delete", _XDELETE),
        *((f"other{number}", c_void_p) for number in range(15)),
    ]


@dataclass
class OnDisk:
    """A file as it is for processes, and what of it has not reached the disk, oldest first."""

    path: Path
    synced: bytes = b""
    unsynced: list[Callable[[bytearray], None]] = field(default_factory=list)


class Disk:
    """What happens to files. Set `fail_sync`, `fail_read` or `fail_write` to the number of calls that are to fail.

    Only files whose name ends with `only` are meant. `calls` counts the syncs.
    """

    def __init__(self) -> None:
        self.fail_sync = 0
        self.fail_read = 0
        self.fail_write = 0
        self.only = ""
        self.calls = 0
        self.files: dict[str, OnDisk] = {}
        self._lock = threading.Lock()
        self._open: dict[int, tuple[str, Any]] = {}
        self._kept: list[object] = []
        self._library = ctypes.CDLL(_library())
        self._library.sqlite3_vfs_find.restype = c_void_p
        self._vfs: _Vfs | None = None
        self._default: int | None = None

    # Installing -------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Be the default VFS of this process."""
        self._default = self._library.sqlite3_vfs_find(None)
        original = cast(c_void_p(self._default), POINTER(_Vfs)).contents
        vfs = _Vfs.from_buffer_copy(original)
        vfs.name, vfs.following = NAME, None
        real_open, real_delete = original.open, original.delete

        def opened(_vfs: int, name: int | None, file: int, flags: int, out: Any) -> int:
            result = real_open(self._default, name, file, flags, out)
            if result == sqlite3.SQLITE_OK and name:
                self._wrap(file, ctypes.string_at(name).decode())
            return int(result)

        def deleted(_vfs: int, name: bytes, sync: int) -> int:
            with self._lock:
                self.files.pop(name.decode(), None)
            return int(real_delete(self._default, name, sync))

        vfs.open, vfs.delete = _XOPEN(opened), _XDELETE(deleted)
        self._vfs = vfs
        if self._library.sqlite3_vfs_register(byref(vfs), 1):
            raise RuntimeError("SQLite takes no other VFS")

    def remove(self) -> None:
        """Give SQLite its own VFS back. Connections that are open keep this one."""
        self._library.sqlite3_vfs_register(c_void_p(self._default), 1)
        self._library.sqlite3_vfs_unregister(ctypes.pointer(self._vfs) if self._vfs else None)

    def _wrap(self, file: int, path: str) -> None:
        handle = cast(c_void_p(file), POINTER(_File)).contents
        original = handle.methods.contents
        methods = _Methods.from_buffer_copy(original)
        real = {name: getattr(original, name) for name in ("close", "read", "write", "truncate", "sync")}
        with self._lock:
            if path not in self.files:
                content = Path(path).read_bytes() if Path(path).exists() else b""
                self.files[path] = OnDisk(Path(path), content)
        methods.read = _XRW(self._reading(path, real["read"]))
        methods.write = _XRW(self._writing(path, real["write"]))
        methods.truncate = _XTRUNCATE(self._truncating(path, real["truncate"]))
        methods.sync = _XSYNC(self._syncing(path, real["sync"]))
        # SQLite only has pointers to them.
        self._kept.append(methods)
        handle.methods = ctypes.pointer(methods)

    def _reading(self, path: str, real: Callable[..., int]) -> Callable[..., int]:
        def read(this: int, into: int, amount: int, offset: int) -> int:
            if self.fail_read and self._meant(path):
                self.fail_read -= 1
                return sqlite3.SQLITE_IOERR_READ
            return int(real(this, into, amount, offset))

        return read

    def _writing(self, path: str, real: Callable[..., int]) -> Callable[..., int]:
        def write(this: int, data: int, amount: int, offset: int) -> int:
            if self.fail_write and self._meant(path):
                self.fail_write -= 1
                return sqlite3.SQLITE_IOERR_WRITE
            result = int(real(this, data, amount, offset))
            if result == sqlite3.SQLITE_OK:
                self._note(path, _writing(ctypes.string_at(data, amount), offset))
            return result

        return write

    def _truncating(self, path: str, real: Callable[..., int]) -> Callable[..., int]:
        def truncate(this: int, size: int) -> int:
            result = int(real(this, size))
            if result == sqlite3.SQLITE_OK:
                self._note(path, _truncating(size))
            return result

        return truncate

    def _syncing(self, path: str, real: Callable[..., int]) -> Callable[..., int]:
        def sync(this: int, flags: int) -> int:
            self.calls += 1
            if self.fail_sync and self._meant(path):
                self.fail_sync -= 1
                return sqlite3.SQLITE_IOERR_FSYNC
            with self._lock:
                on_disk = self.files.get(path)
                if on_disk is not None:
                    content = bytearray(on_disk.synced)
                    for change in on_disk.unsynced:
                        change(content)
                    on_disk.synced, on_disk.unsynced = bytes(content), []
            return int(real(this, flags))

        return sync

    def _meant(self, path: str) -> bool:
        return path.endswith(self.only)

    def _note(self, path: str, change: Callable[[bytearray], None]) -> None:
        with self._lock:
            if path in self.files:
                self.files[path].unsynced.append(change)

    # A power cut ------------------------------------------------------------------------------------------------------

    def cut(self, folder: Path, into: Path, chance: random.Random) -> None:
        """Write the files of a folder to another one as a disk may show them after a power cut at this moment.

        Of what was not synced each change is there or not, and a write may be there in part.
        """
        with self._lock:
            for on_disk in self.files.values():
                if on_disk.path.parent != folder:
                    continue
                content = bytearray(on_disk.synced)
                for change in on_disk.unsynced:
                    draft = bytearray(content)
                    change(draft)
                    content = _torn(content, draft, chance)
                (into / on_disk.path.name).write_bytes(bytes(content))


def _torn(before: bytearray, after: bytearray, chance: random.Random) -> bytearray:
    """One of: before, after, or after in some of its sectors only."""
    kind = chance.random()
    if kind < 0.4:
        return before
    if kind < 0.8:
        return after
    size = max(len(before), len(after)) if chance.random() < 0.5 else len(after)
    mixed = bytearray(before.ljust(size, b"\0")[:size])
    for start in range(0, len(after), SECTOR):
        if chance.random() < 0.5:
            mixed[start : start + SECTOR] = after[start : start + SECTOR]
    return mixed


def _writing(data: bytes, offset: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        if len(content) < offset:
            content.extend(bytes(offset - len(content)))
        content[offset : offset + len(data)] = data

    return change


def _truncating(size: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        del content[size:]

    return change


def _library() -> str:
    """The SQLite that Python's module has loaded."""
    with sqlite3.connect(":memory:"):
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            if "libsqlite3" in line:
                return line.split()[-1]
    raise RuntimeError("Python has SQLite built in, so that it can't be reached")


assert sizeof(_File) == sizeof(c_void_p)
