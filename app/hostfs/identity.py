"""Who a file is, and which files a process has open. Everything in here may block."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from app.core.chain import Disk, Identity, Layer
from app.core.evidence import Process
from app.core.images import Image
from app.hostfs.locks import locked_files
from app.hostfs.opening import born_at
from app.hostfs.process import as_seen_by, files_seen_open, open_files, opened_path, pid_here, unlinked_files

TEMPORARY: Final = "vl."
"""How the names of `-snapshot`'s overlays begin (block.c: bdrv_append_temp_snapshot)."""


def identity_of(path: str, process: Process | None) -> Identity | None:
    """The identity of the file that the process calls `path`, links followed; None where it can't be seen."""
    return image_at(path, process).identity


def image_at(path: str, process: Process | None) -> Image:
    """The image that the process calls `path`, links followed, as far as it can be seen."""
    with suppress(OSError, ValueError), opened_path(path, process) as file:
        found = os.fstat(file)
        device = found.st_rdev if stat.S_ISBLK(found.st_mode) else None
        return Image(path, (found.st_dev, found.st_ino), device, born_at(file))
    return Image(path)


def identities(paths: Iterable[str], process: Process | None) -> dict[str, Identity]:
    """The identities of those files that can be seen; the `paths` are absolute, and those of the process."""
    found = ((path, identity_of(path, process)) for path in paths)
    return {path: identity for path, identity in found if identity is not None}


def open_by(processes: Mapping[str, Process]) -> dict[str, frozenset[Identity]]:
    """The files that each of the processes can be seen to have open."""
    return {name: files_seen_open(process) for name, process in processes.items()}


def with_files(disks: tuple[Disk, ...], process: Process | None) -> tuple[Disk, ...]:
    """The disks, their layers with what the file system says of them."""
    held = _Held.of(process)
    found: list[Disk] = []
    for disk in disks:
        layers = tuple(_with_file(layer, process, held) for layer in disk.layers)
        # What is there under its name, and open, has not been unlinked.
        temporary = bool(layers) and layers[0].identity is None and _is_temporary(disk.layers[0].file, process)
        found.append(replace(disk, layers=layers, temporary=temporary))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Held:
    """The files that the process may have open; None where nothing is known of that. `certain`: the process was seen.

    A path tells little: since QEMU opened it, it may have become another file's, or QEMU runs on another host. Where
    the process can't be seen, the files are taken that any QEMU has locked.
    """

    files: frozenset[Identity] | None
    certain: bool

    @classmethod
    def of(cls, process: Process | None) -> _Held:
        if process is None:
            return cls(None, certain=False)
        held = open_files(process) if pid_here(process) is not None else None
        return cls(locked_files(), certain=False) if held is None else cls(held, certain=True)

    def __contains__(self, identity: Identity) -> bool:
        return self.files is None or identity in self.files


def _with_file(layer: Layer, process: Process | None, held: _Held) -> Layer:
    if not layer.file.startswith("/"):
        return layer
    folder = os.path.realpath(as_seen_by(posixpath.dirname(layer.file), process))
    image = image_at(layer.file, process)
    identity = image.identity
    # QEMU joins a relative header to the overlay's folder as it stands; `..` after a symlink must stay.
    plain = posixpath.normpath(layer.file)
    same = identity is not None and (plain == layer.file or identity == identity_of(plain, process))
    known = identity if identity is not None and identity in held else None
    return replace(
        layer,
        file=plain if same else layer.file,
        identity=known,
        device=image.device if known else None,
        born=image.born if known else None,
        unheld=known is None and held.certain,
        # A node of a device may be made anew, and lead to the same device.
        replaced=identity is not None and known is None and held.certain and image.device is None,
        folder=folder,
    )


def _is_temporary(file: str, process: Process | None) -> bool:
    """Whether the file is one of those that `-snapshot` makes, and has unlinked.

    A file that is not where it was may have been renamed, or QEMU may have changed its folder since it was opened. In
    another mount namespace the kernel may show another path for it, so the name QEMU gives to such files tells, too.
    """
    if not file.startswith("/"):
        return False
    unlinked = None if process is None or pid_here(process) is None else unlinked_files(process)
    if unlinked is not None and file in unlinked:
        return True
    return posixpath.basename(file).startswith(TEMPORARY) and not os.path.lexists(as_seen_by(file, process))
