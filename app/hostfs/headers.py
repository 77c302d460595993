"""Images' headers, read without QEMU: where a backing string leads, and the chain of a domain that is off.

Everything in here may block.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from app.core.chain import Disk, Identity, Layer
from app.core.errors import Code, Problem, Refused
from app.core.evidence import HeaderReading, Process
from app.core.headers import HeaderFacts, meaning
from app.hostfs import qcow2
from app.hostfs.identity import identity_of
from app.hostfs.process import as_seen_by, folder_of, stat_of
from app.hostfs.roots import Roots

HEADER: Final = 65536
"""Bytes that hold all of a header."""

DEPTH_MAX: Final = 1000
"""Layers of a chain that are followed."""


def read_header(overlay: str, identity: Identity, process: Process | None, roots: Roots) -> HeaderReading | None:
    """Where the header of an image leads, as it stands on the disk now; None where it can't be read or leads nowhere.

    Returns None, too, if `overlay` now names another file than `identity`. Paths are those of the process.
    """
    try:
        header = _header_of(overlay, identity, process, roots)
    except (OSError, ValueError):
        return None
    if header.backing is None:
        return None
    means = meaning(header.backing, overlay=overlay, folder=_folder(process))
    if means is None or means.path is None:
        return HeaderReading(file=header.backing)
    return HeaderReading(file=means.path, identity=identity_of(means.path, process))


def header_facts(
    names: Iterable[str], overlay: str, identity: Identity | None, process: Process | None, roots: Roots
) -> HeaderFacts:
    """Where each of the `names` would lead in the header of the overlay, and how much room that has."""
    folder, room = _folder(process), None
    if identity is not None:
        with suppress(OSError, ValueError):
            room = _header_of(overlay, identity, process, roots).room
    named: dict[str, Identity | None] = {}
    for name in names:
        means = meaning(name, overlay=overlay, folder=folder)
        named[name] = None if means is None or means.path is None else identity_of(means.path, process)
    return HeaderFacts(named=named, room=room, folder=folder, seen=process is None or process.pid is not None)


def _folder(process: Process | None) -> str | None:
    return None if process is None or process.pid is None else folder_of(process)


def sync(path: str, identity: Identity, process: Process | None, roots: Roots) -> bool:
    """Have on the disk what anybody has written to the file; whether that was done."""
    try:
        file = _opened(as_seen_by(path, process), roots, identity)
    except (OSError, ValueError):
        return False
    try:
        os.fsync(file)
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def _header_of(path: str, identity: Identity, process: Process | None, roots: Roots) -> qcow2.Header:
    return _header(as_seen_by(path, process), roots, identity)


def offline_disk(name: str, image: str, roots: Roots) -> Disk:
    """A disk of a domain that is off, from the headers; raises `Refused` where an image can't be read."""
    layers: list[Layer] = []
    path: str | None = image
    expected: str | None = None
    while path is not None:
        if len(layers) >= DEPTH_MAX or any(layer.file == path for layer in layers):
            raise _unreadable(name, path, "the chain runs in a circle or is too long")
        try:
            layer = _offline_layer(path, expected, roots)
        except (OSError, qcow2.NotQcow2) as error:
            raise _unreadable(name, path, str(error)) from error
        layers.append(layer)
        path = _resolved(layer.backing, path) if layer.backing else None
        expected = layer.backing_format
    return Disk(name=name, layers=tuple(layers))


def _header(path: str, roots: Roots, identity: Identity | None = None) -> qcow2.Header:
    file = _opened(path, roots, identity)
    try:
        return qcow2.parse(os.pread(file, HEADER, 0))
    finally:
        os.close(file)


def _opened(path: str, roots: Roots, identity: Identity | None) -> int:
    # A header may name anything; opening a pipe that nobody writes to would wait for ever.
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        _judge(file, path, roots, identity)
    except BaseException:
        os.close(file)
        raise
    return file


def _judge(file: int, path: str, roots: Roots, identity: Identity | None) -> None:
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISBLK(found.st_mode):
        raise OSError(errno.EINVAL, "neither a regular file nor a block device", path)
    # The device's number is left out: a file system may have another one after the host has been restarted.
    if identity is not None and found.st_ino != identity[1]:
        raise OSError(errno.ESTALE, "another file of that name", path)
    if not roots.hold(file):
        raise PermissionError(errno.EPERM, "outside image_roots", path)


def _offline_layer(path: str, expected: str | None, roots: Roots) -> Layer:
    found = stat_of(path, None)
    header: qcow2.Header | None = None
    try:
        header = None if expected == "raw" else _header(path, roots)
    except qcow2.NotQcow2 as error:
        if expected == "qcow2" or isinstance(error, qcow2.Damaged):
            raise
    if expected == "raw" and not roots.allow(path):
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
        device=found.st_rdev if stat.S_ISBLK(found.st_mode) else None,
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
