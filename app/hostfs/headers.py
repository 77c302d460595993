"""Images' headers, read without QEMU: where a backing string leads, and how much room there is for another.

Everything in here may block.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from app.core.chain import Identity
from app.core.evidence import HeaderReading, Process
from app.core.headers import HeaderFacts, meaning
from app.hostfs import qcow2
from app.hostfs.identity import identity_of
from app.hostfs.process import folder_of, opened_path, pid_here
from app.hostfs.roots import Roots

HEADER: Final = 65536
"""Bytes that hold all of a header."""


def read_header(overlay: str, identity: Identity, process: Process | None, roots: Roots) -> HeaderReading | None:
    """Where the header of an image leads, as it stands on the disk now; None where it can't be read.

    Returns None, too, if `overlay` now names another file than `identity`. Paths are those of the process.
    """
    try:
        header = header_at(overlay, roots, identity, process)
    except (OSError, ValueError):
        return None
    if header.backing is None:
        return HeaderReading(file=None)
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
            room = header_at(overlay, roots, identity, process).room
    named: dict[str, Identity | None] = {}
    for name in names:
        means = meaning(name, overlay=overlay, folder=folder)
        named[name] = None if means is None or means.path is None else identity_of(means.path, process)
    return HeaderFacts(named=named, room=room, folder=folder, seen=process is None or pid_here(process) is not None)


def _folder(process: Process | None) -> str | None:
    return None if process is None or pid_here(process) is None else folder_of(process)


def sync(path: str, identity: Identity, process: Process | None, roots: Roots) -> bool:
    """Have on the disk what anybody has written to the file; whether that was done."""
    try:
        file = open_image(path, process, roots, identity)
    except (OSError, ValueError):
        return False
    try:
        os.fsync(file)
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def header_at(
    path: str, roots: Roots, identity: Identity | None = None, process: Process | None = None
) -> qcow2.Header:
    """The header of the image at `path`, of that identity if one is given; raises OSError and `qcow2.NotQcow2`."""
    file = open_image(path, process, roots, identity)
    try:
        return qcow2.parse(os.pread(file, HEADER, 0))
    finally:
        os.close(file)


def open_image(path: str, process: Process | None, roots: Roots, identity: Identity | None) -> int:
    """The file that the process calls `path`, open for reading; raises OSError.

    It is judged before it is opened: a name may lead to a pipe, which would wait for somebody to write, or to a device
    that does something when it is opened.
    """
    with opened_path(path, process) as named:
        _judge(named, path, roots, identity)
        return os.open(f"/proc/self/fd/{named}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)


def _judge(file: int, path: str, roots: Roots, identity: Identity | None) -> None:
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISBLK(found.st_mode):
        raise OSError(errno.EINVAL, "neither a regular file nor a block device", path)
    # The device's number is left out: a file system may have another one after the host has been restarted.
    if identity is not None and found.st_ino != identity[1]:
        raise OSError(errno.ESTALE, "another file of that name", path)
    if not roots.hold(file):
        raise PermissionError(errno.EPERM, "outside image_roots", path)
