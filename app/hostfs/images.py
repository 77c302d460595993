"""Image files, seen from the service: who they are, who holds them, what they hold, and how to delete them.

Whatever may block (a stat on a dead file server) happens in threads.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import posixpath
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from app.core.chain import Disk, Identity, Layer
from app.core.errors import Code, Problem, Refused
from app.core.job import NotDeleted, Process
from app.core.plan import Selection
from app.engine.ports.images import Measure
from app.hostfs import qcow2
from app.hostfs.locks import is_locked, locked_files
from app.hostfs.process import alive, as_seen_by, open_files, open_folder, place_of, stat_of

HEADER: Final = 65536
"""Bytes that hold all of a header."""

MAP_MAX: Final = 64 << 20
"""Bytes of an image's map that are read; that of a larger image is estimated instead."""

DEPTH_MAX: Final = 1000
"""Layers of a chain that are followed."""

TEMPORARY: Final = "vl."
"""How the names of `-snapshot`'s overlays begin (block.c: bdrv_append_temp_snapshot)."""


def with_files(disks: tuple[Disk, ...], process: Process | None) -> tuple[Disk, ...]:
    """The disks, their layers with what the file system says of them. May block."""
    held = _held(process)
    return tuple(
        replace(
            disk,
            layers=tuple(_with_file(layer, process, held) for layer in disk.layers),
            temporary=bool(disk.layers) and _is_temporary(disk.layers[0].file, process),
        )
        for disk in disks
    )


def _held(process: Process | None) -> frozenset[Identity] | None:
    """The files that the process may have open; None where nothing is known of that.

    A path tells little: since QEMU opened it, it may have become another file's, or QEMU runs on another host. Where
    the process can't be seen, the files are taken that any QEMU has locked.
    """
    if process is None:
        return None
    held = open_files(process) if process.pid is not None else None
    if held is not None:
        return held
    return locked_files()


def _with_file(layer: Layer, process: Process | None, held: frozenset[Identity] | None) -> Layer:
    if not layer.file.startswith("/"):
        return layer
    folder = os.path.realpath(as_seen_by(posixpath.dirname(layer.file), process))
    identity = _identity(layer.file, process)
    # QEMU joins a relative header to the overlay's folder as it stands; `..` after a symlink must stay.
    plain = posixpath.normpath(layer.file)
    same = identity is not None and identity == _identity(plain, process)
    known = identity if held is None or identity in held else None
    return replace(layer, file=plain if same else layer.file, identity=known, folder=folder)


def _is_temporary(file: str, process: Process | None) -> bool:
    """Whether the file is one of those that `-snapshot` makes, and has unlinked, or whose name is gone otherwise."""
    if not file.startswith("/"):
        return False
    seen = as_seen_by(file, process)
    if os.path.isdir(posixpath.dirname(seen)):
        return not os.path.lexists(seen)
    return posixpath.basename(file).startswith(TEMPORARY)


def _identity(path: str, process: Process | None) -> Identity | None:
    with suppress(OSError, ValueError):
        found = stat_of(path, process)
        return (found.st_dev, found.st_ino)
    return None


class LocalImages:
    """The `Images` port. `roots` are the folders outside which nothing is opened or deleted (none: anywhere).

    `timeout` is the most seconds that reading an image's map may take.
    """

    def __init__(self, roots: Sequence[str | Path], timeout: float, qemu_img: str = "qemu-img") -> None:
        self._roots = tuple(os.path.realpath(root) for root in roots)
        self._timeout = timeout
        self._qemu_img = qemu_img

    def _allowed(self, path: str) -> bool:
        with suppress(OSError):
            file = os.open(path, os.O_PATH)
            try:
                return self._holds(file)
            finally:
                os.close(file)
        return False

    def _holds(self, file: int) -> bool:
        """Whether an open file or folder is inside the roots."""
        place = place_of(file)
        return not self._roots or any(os.path.commonpath((place, root)) == root for root in self._roots)

    async def identities(self, names: Iterable[str], process: Process | None) -> Mapping[str, Identity]:
        """The identities of those of the `names` that are paths of files that can be seen."""
        paths = [name for name in names if name.startswith("/")]
        if not paths:
            return {}

        def look() -> dict[str, Identity]:
            found = ((path, _identity(path, process)) for path in paths)
            return {path: identity for path, identity in found if identity is not None}

        return await asyncio.to_thread(look)

    async def free_bytes(self, path: str, process: Process | None) -> int | None:
        """Free bytes of the file system that holds `path`; None where it can't be seen."""

        def look() -> int | None:
            with suppress(OSError):
                found = os.statvfs(as_seen_by(path, process))
                return found.f_bavail * found.f_frsize
            return None

        return await asyncio.to_thread(look) if path.startswith("/") else None

    async def is_device(self, path: str, process: Process | None) -> bool:
        """Whether `path` is a block device, which does not grow."""

        def look() -> bool:
            with suppress(OSError):
                return stat.S_ISBLK(stat_of(path, process).st_mode)
            return False

        return await asyncio.to_thread(look) if path.startswith("/") else False

    async def locked(self, path: str, process: Process | None) -> bool:
        """Whether a process other than `process` holds an image lock on `path`.

        The kernel names no holder of such a lock, so the locks that `process` holds are taken off those there are.
        Where that can't be counted the answer is no, as QEMU's own open decides in the end.
        """

        def look() -> bool:
            if process is not None and process.pid is None:
                # A monitor over TCP, or in another pid namespace: which locks are its own can't be told.
                return False
            with suppress(OSError):
                locked = is_locked(stat_of(path, process), process)
                # A QEMU that is just ending still has its locks; that it has gone is told by the next command.
                return locked and (process is None or alive(process) is not False)
            return False

        return await asyncio.to_thread(look) if path.startswith("/") else False

    async def measure(self, chosen: Selection, process: Process | None) -> Measure | None:
        """Read the maps of the chosen layers; None where the tool or the files can't be had in time."""
        layers = chosen.disk.layers[chosen.top : chosen.base + 1]
        paths = [as_seen_by(layer.file, process) for layer in layers]
        readable = all(layer.file.startswith("/") for layer in layers)
        if not readable or not await asyncio.to_thread(lambda: all(self._allowed(path) for path in paths)):
            return None
        described = [_described(layer.format, path) for layer, path in zip(layers, paths, strict=True)]
        base_map = await self._map(_stacked(described[-1:]))
        top_map = await self._map(_stacked(described))
        if base_map is None or top_map is None:
            return None
        depth, cluster = len(layers) - 1, chosen.base_layer.cluster_size
        taken = [(entry["start"], entry["start"] + entry["length"]) for entry in base_map if entry["data"]]
        copied = [
            (entry["start"], entry["start"] + entry["length"])
            for entry in top_map
            if entry["depth"] < depth and entry.get("present", True)
        ]
        return Measure(bytes_to_copy=sum(end - start for start, end in copied), new_bytes=_new(copied, taken, cluster))

    async def _map(self, image: Mapping[str, object]) -> list[dict[str, Any]] | None:
        arguments = ("map", "-U", "--output=json", "json:" + json.dumps(image))
        try:
            process = await asyncio.create_subprocess_exec(
                self._qemu_img,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
        except OSError:
            return None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(self._timeout):
                text = bytearray()
                while chunk := await process.stdout.read(1 << 20):
                    text += chunk
                    if len(text) > MAP_MAX:
                        return None
                return json.loads(text) if await process.wait() == 0 else None
        except (TimeoutError, json.JSONDecodeError):
            return None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def undeletable(self, files: Mapping[str, Identity | None], process: Process | None) -> Mapping[str, str]:
        """Those of the `files` that must not or can't be unlinked (not a regular file, outside the roots), and why."""

        def look() -> dict[str, str]:
            found = ((path, self._why_not(path, identity, process)) for path, identity in files.items())
            return {path: reason for path, reason in found if reason is not None}

        return await asyncio.to_thread(look) if files else {}

    def _why_not(self, path: str, identity: Identity | None, process: Process | None) -> str | None:
        if not path.startswith("/"):
            return "not a file"
        try:
            folder = open_folder(path, process)
        except OSError as error:
            return f"can't be seen by the service: {error.strerror}"
        try:
            return self._why_not_in(folder, posixpath.basename(path), identity)
        finally:
            os.close(folder)

    def _why_not_in(self, folder: int, name: str, identity: Identity | None) -> str | None:
        try:
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except OSError as error:
            return f"can't be seen by the service: {error.strerror}"
        if stat.S_ISLNK(found.st_mode):
            return "a symbolic link; the image behind it may have other names"
        if not stat.S_ISREG(found.st_mode):
            return "not a regular file"
        if not self._holds(folder):
            return "outside image_roots"
        return None if (found.st_dev, found.st_ino) == identity else "not the file that QEMU has opened under this name"

    async def unlink(
        self,
        files: Mapping[str, Identity | None],
        process: Process | None,
        in_use: Callable[[str, Identity | None], str | None],
    ) -> tuple[tuple[str, ...], tuple[NotDeleted, ...]]:
        """Unlink files: (deleted, not deleted). One that is gone already counts as deleted."""
        deleted: list[str] = []
        kept: list[NotDeleted] = []
        for path, identity in files.items():
            user = in_use(path, identity)
            reason = f"in use by {user}" if user else await asyncio.to_thread(self._unlink, path, identity, process)
            if reason is None:
                deleted.append(path)
            else:
                kept.append(NotDeleted(file=path, reason=reason))
        return tuple(deleted), tuple(kept)

    def _unlink(self, path: str, identity: Identity | None, process: Process | None) -> str | None:
        """Unlink one file for good; None, or why it was left."""
        name = posixpath.basename(path)
        try:
            folder = open_folder(path, process)
        except OSError as error:
            return f"its folder can't be opened: {error.strerror}"
        try:
            if name not in os.listdir(folder):
                return None
            # All of it is asked of the folder that is open, as its path may lead elsewhere a moment later.
            if (reason := self._why_not_in(folder, name, identity)) is not None:
                return reason
            if is_locked(os.stat(name, dir_fd=folder, follow_symlinks=False), process):
                return "another process has it open"
            os.unlink(name, dir_fd=folder)
            os.fsync(folder)
        except OSError as error:
            return error.strerror or str(error)
        finally:
            os.close(folder)
        return None

    async def backing_of(self, overlay: str, identity: Identity | None) -> tuple[str, Identity | None] | None:
        """The path to which the header of an image leads, and the file there; None where it can't be read or has none.

        Nor is it read where another file than that of `identity` is called `overlay` by now.
        """

        def look() -> tuple[str, Identity | None] | None:
            try:
                header = self._header(overlay, identity)
            except (OSError, qcow2.NotQcow2):
                return None
            below = _resolved(header.backing, overlay) if header.backing else None
            return None if below is None else (below, _identity(below, None))

        return await asyncio.to_thread(look) if identity is not None else None

    def _header(self, path: str, identity: Identity | None = None) -> qcow2.Header:
        # A header may name anything; opening a pipe that nobody writes to would wait for ever.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) and not stat.S_ISBLK(found.st_mode):
                raise OSError(errno.EINVAL, "neither a regular file nor a block device", path)
            # The device's number is left out: a file system may have another one after the host has been restarted.
            if identity is not None and found.st_ino != identity[1]:
                raise OSError(errno.ESTALE, "another file of that name", path)
            if not self._holds(file):
                raise PermissionError(errno.EPERM, "outside image_roots", path)
            return qcow2.parse(os.pread(file, HEADER, 0))
        finally:
            os.close(file)

    async def offline_disk(self, name: str, image: str) -> Disk:
        """A disk of a domain that is off, from the headers; raises `Refused` where an image can't be read."""

        def look() -> Disk:
            layers: list[Layer] = []
            path: str | None = image
            expected: str | None = None
            while path is not None:
                if len(layers) >= DEPTH_MAX or any(layer.file == path for layer in layers):
                    raise _unreadable(name, path, "the chain runs in a circle or is too long")
                try:
                    layer = self._offline_layer(path, expected)
                except (OSError, qcow2.NotQcow2) as error:
                    raise _unreadable(name, path, str(error)) from error
                layers.append(layer)
                path = _resolved(layer.backing, path) if layer.backing else None
                expected = layer.backing_format
            return Disk(name=name, layers=tuple(layers))

        return await asyncio.to_thread(look)

    def _offline_layer(self, path: str, expected: str | None) -> Layer:
        found = stat_of(path, None)
        header: qcow2.Header | None = None
        try:
            header = None if expected == "raw" else self._header(path)
        except qcow2.NotQcow2 as error:
            if expected == "qcow2" or isinstance(error, qcow2.Damaged):
                raise
        if expected == "raw" and not self._allowed(path):
            raise PermissionError(1, "outside image_roots", path)
        return Layer(
            file=path,
            format="qcow2" if header else expected or "raw",
            node="",
            virtual_size=header.virtual_size if header else found.st_size,
            actual_size=found.st_blocks * 512,
            backing=header.backing if header else None,
            backing_format=header.backing_format if header else None,
            identity=(found.st_dev, found.st_ino),
            folder=os.path.realpath(posixpath.dirname(path)),
            cluster_size=header.cluster_size if header else 65536,
        )


def _unreadable(disk: str, path: str, why: str) -> Refused:
    return Refused(
        Problem(code=Code.DISK_NOT_FOUND, detail=f"the disk {disk} can't be read: {path}: {why}", extra={"file": path})
    )


def _resolved(backing: str, overlay: str) -> str:
    """The path that a header's string means; it starts from the folder of the image that it stands in."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(overlay), backing.removeprefix("file:")))


def _described(driver: str, path: str) -> dict[str, object]:
    return {"driver": driver, "file": {"driver": "file", "filename": path, "locking": "off"}}


def _stacked(described: Sequence[dict[str, object]]) -> dict[str, object]:
    """The layers as one image, each over the next, whatever their headers say; the last without a backing image."""
    stack: dict[str, object] | None = None
    for layer in reversed(described):
        stack = layer | ({"backing": stack} if layer["driver"] != "raw" else {})
    assert stack is not None
    return stack


def _new(copied: Sequence[tuple[int, int]], taken: Sequence[tuple[int, int]], cluster: int) -> int:
    """Bytes of those clusters of the base that `copied` touches and `taken` does not hold.

    Both are byte ranges in rising order, as an image's map gives them.
    """
    held = _clusters(taken, cluster)
    new, at = 0, 0
    for start, end in _clusters(copied, cluster):
        new += end - start
        while at < len(held) and held[at][1] <= start:
            at += 1
        look = at
        while look < len(held) and held[look][0] < end:
            new -= min(end, held[look][1]) - max(start, held[look][0])
            look += 1
    return new


def _clusters(ranges: Sequence[tuple[int, int]], cluster: int) -> list[tuple[int, int]]:
    """The ranges, widened to whole clusters, those that meet made one."""
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        first, last = start // cluster * cluster, -(-end // cluster) * cluster
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged
