"""The chain of a domain that is off, from the images' headers. Everything in here may block."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Sequence
from typing import Final

from app.core.chain import Disk, Layer
from app.core.errors import Code, Problem
from app.core.headers import meaning
from app.core.images import HEADERLESS, Image, ImageUse, format_of
from app.engine.ports.images import ChainUnreadable
from app.hostfs import qcow2
from app.hostfs.headers import header_at
from app.hostfs.opening import born_at
from app.hostfs.process import opened_path, stat_of
from app.hostfs.roots import Roots

DEPTH_MAX: Final = 1000
"""Layers of a chain that are followed."""


def offline_disk(domain: str, name: str, image: str, told: Sequence[ImageUse], roots: Roots) -> Disk:
    """A disk of a domain that is off; raises `ChainUnreadable` where an image can't be read.

    A name by a network protocol ends the chain: nobody can follow it. `told` are uses of which QEMU has told the
    format, as for `format_of`.
    """
    layers: list[Layer] = []
    path: str | None = image
    expected: str | None = None
    instead: str | None = None

    def unreadable(where: str, why: str, *, blind: bool) -> ChainUnreadable:
        detail = f"the disk {name} can't be read: {where}: {why}"
        problem = Problem(code=Code.DISK_NOT_FOUND, detail=detail, extra={"file": where})
        return ChainUnreadable(problem, tuple(layers), blind=blind)

    while path is not None:
        if len(layers) >= DEPTH_MAX or any(layer.file == path for layer in layers):
            raise unreadable(path, "the chain runs in a circle or is too long", blind=False)
        try:
            layer = _layer(path, expected, roots, domain, told)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise unreadable(path, str(error), blind=False) from error
        except (OSError, ValueError) as error:
            raise unreadable(path, str(error), blind=True) from error
        layers.append(layer)
        # What a name gives of the image below comes before what that image's own header says.
        below = layer.backing if instead is None else instead
        path, expected, instead = None, layer.backing_format if instead is None else None, None
        if below:
            means = meaning(below, overlay=layer.file)
            if means is None:
                raise unreadable(layer.file, f"nobody can tell what {below[:200]!r} names", blind=True)
            path = None if means.path is None else posixpath.normpath(means.path)
            expected, instead = means.driver or expected, means.backing
    return Disk(name=name, layers=tuple(layers))


def _layer(path: str, expected: str | None, roots: Roots, domain: str, told: Sequence[ImageUse]) -> Layer:
    with opened_path(path, None) as file:
        found, born = os.fstat(file), born_at(file)
    device = found.st_rdev if stat.S_ISBLK(found.st_mode) else None
    identity = (found.st_dev, found.st_ino)
    if expected is None:
        had = format_of(Image(path, identity, device, born), told, domain)
        # What QEMU had as qcow2 is looked at as before: somebody may have written a raw image in its place.
        expected = had if had in HEADERLESS else None
    header: qcow2.Header | None = None
    try:
        header = None if expected in HEADERLESS else header_at(path, roots)
    except qcow2.NotQcow2 as error:
        if expected == "qcow2" or isinstance(error, qcow2.Damaged):
            raise
    if expected in HEADERLESS and not roots.allow(path):
        raise PermissionError(1, "outside image_roots", path)
    return Layer(
        file=path,
        format="qcow2" if header else expected or "raw",
        node="",
        virtual_size=header.virtual_size if header else found.st_size,
        actual_size=found.st_blocks * 512,
        backing=header.backing if header else None,
        backing_format=header.backing_format if header else None,
        identity=identity,
        device=device,
        born=born,
        folder=os.path.realpath(posixpath.dirname(path)),
        cluster_size=header.cluster_size if header else 65536,
    )


def is_there(image: Image) -> bool | None:
    """Whether the image still is what its path leads to; None where that can't be seen.

    A file that is missing from a folder of another file system proves nothing: QEMU saw another folder. Nor does
    another file in the image's place, which may be a copy and need the same images.
    """
    if not image.path.startswith("/") or image.identity is None:
        return None
    try:
        found = stat_of(image.path, None)
    except (FileNotFoundError, NotADirectoryError):
        return False if _same_file_system(posixpath.dirname(image.path), image.identity[0]) else None
    except (OSError, ValueError):
        return None
    return True if (found.st_dev, found.st_ino) == image.identity else None


def _same_file_system(folder: str, device: int) -> bool:
    try:
        return stat_of(folder, None).st_dev == device
    except (OSError, ValueError):
        return False
