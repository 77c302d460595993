"""Who a file is, and which files a process has open. Everything in here may block."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Final

from app.core.chain import Disk, Identity, Layer
from app.core.evidence import Process
from app.hostfs.locks import locked_files
from app.hostfs.process import as_seen_by, open_files, stat_of

TEMPORARY: Final = "vl."
"""How the names of `-snapshot`'s overlays begin (block.c: bdrv_append_temp_snapshot)."""


def identity_of(path: str, process: Process | None) -> Identity | None:
    """The identity of the file that the process calls `path`, links followed; None where it can't be seen."""
    return _identity_and_device(path, process)[0]


def _identity_and_device(path: str, process: Process | None) -> tuple[Identity | None, int | None]:
    with suppress(OSError, ValueError):
        found = stat_of(path, process)
        return (found.st_dev, found.st_ino), found.st_rdev if stat.S_ISBLK(found.st_mode) else None
    return None, None


def identities(paths: Iterable[str], process: Process | None) -> dict[str, Identity]:
    """The identities of those files that can be seen; the `paths` are absolute, and those of the process."""
    found = ((path, identity_of(path, process)) for path in paths)
    return {path: identity for path, identity in found if identity is not None}


def with_files(disks: tuple[Disk, ...], process: Process | None) -> tuple[Disk, ...]:
    """The disks, their layers with what the file system says of them."""
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
    identity, device = _identity_and_device(layer.file, process)
    # QEMU joins a relative header to the overlay's folder as it stands; `..` after a symlink must stay.
    plain = posixpath.normpath(layer.file)
    same = identity is not None and identity == identity_of(plain, process)
    known = identity if held is None or identity in held else None
    return replace(
        layer, file=plain if same else layer.file, identity=known, device=device if known else None, folder=folder
    )


def _is_temporary(file: str, process: Process | None) -> bool:
    """Whether the file is one of those that `-snapshot` makes, and has unlinked, or whose name is gone otherwise."""
    if not file.startswith("/"):
        return False
    seen = as_seen_by(file, process)
    # `Path.is_dir` would raise where the folder above may not be searched.
    if os.path.isdir(posixpath.dirname(seen)):  # noqa: PTH112
        return not os.path.lexists(seen)
    return posixpath.basename(file).startswith(TEMPORARY)
