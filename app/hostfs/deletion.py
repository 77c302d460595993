"""Deleting image files, by the folder that is open, so that no path can lead elsewhere in between.

All functions may block.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Mapping
from typing import Final

from app.core.chain import Identity
from app.core.evidence import Process
from app.core.images import Image
from app.core.sameness import Sameness, same
from app.hostfs import qcow2
from app.hostfs.credentials import may_unlink_as, unlink_as
from app.hostfs.locks import is_locked
from app.hostfs.opening import born_at
from app.hostfs.process import files_seen_open, open_folder
from app.hostfs.roots import Roots

SNAPSHOTS_AT: Final = 60
"""Where the header of a qcow2 image has the number of its internal snapshots."""


def undeletable(files: Mapping[str, Identity | None], process: Process | None, roots: Roots) -> dict[str, str]:
    """Those of the `files` that must not or can't be unlinked (not a regular file, outside the roots), and why."""
    found = ((path, _why_not(path, identity, process, roots)) for path, identity in files.items())
    return {path: reason for path, reason in found if reason is not None}


def unlink(path: str, image: Image, process: Process | None, roots: Roots, since: int | None = None) -> str | None:
    """Unlink one file for good; None, or why it was left. One that is gone already counts as deleted.

    Left is what was written to after `since` (ms since 1970), too: somebody may have made another image of it.
    """
    identity = image.identity
    name = posixpath.basename(path)
    try:
        folder = open_folder(path, process)
    except OSError as error:
        return f"its folder can't be opened: {error.strerror}"
    try:
        if identity is None or os.fstat(folder).st_dev != identity[0]:
            # What was mounted there has come off: the file is where it always was, and not here.
            return "its folder is another one by now"
        if name not in os.listdir(folder):  # noqa: PTH208 - a folder that is open has no path
            return None
        # All of it is asked of the folder that is open, as its path may lead elsewhere a moment later.
        if (reason := _why_not_in(folder, name, identity, process, roots)) is not None:
            return reason
        if (reason := _why_another(folder, name, image, process, since)) is not None:
            return reason
        if roots.folders:
            os.unlink(name, dir_fd=folder)
        elif (refused := unlink_as(process, folder, name)) is not None:
            return refused
        os.fsync(folder)
    except OSError as error:
        return error.strerror or str(error)
    finally:
        os.close(folder)
    return None


def _why_another(folder: int, name: str, image: Image, process: Process | None, since: int | None) -> str | None:
    """Why the file may be another one by now than what was merged, though it has its number: it may be written anew."""
    file = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        found = os.fstat(file)
        if same(born_at(file), image.born) is Sameness.OTHER:
            return "a file that was made later has its name"
        if since is not None and found.st_mtime_ns // 1_000_000 > since:
            return "it was written to after the merge, and may be another image by now"
        # The domain's own QEMU has let go of what was merged: what it has open under this name is something else.
        if (found.st_dev, found.st_ino) in files_seen_open(process) or is_locked(file, None):
            return "a process has it open"
        if (snapshots := _internal_snapshots(file)) > 0:
            # They may have been taken since the job was planned.
            return f"it holds {snapshots} internal snapshots"
    finally:
        os.close(file)
    return None


def _internal_snapshots(file: int) -> int:
    """How many an image has by its header (docs/interop/qcow2.txt); `file` is open by O_PATH. Raises OSError."""
    opened = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        head = os.pread(opened, SNAPSHOTS_AT + 4, 0)
    finally:
        os.close(opened)
    if not head.startswith(qcow2.MAGIC) or len(head) < SNAPSHOTS_AT + 4:
        return 0
    return int.from_bytes(head[SNAPSHOTS_AT:], "big")


def _why_not(path: str, identity: Identity | None, process: Process | None, roots: Roots) -> str | None:
    if not path.startswith("/"):
        return "not a file"
    try:
        folder = open_folder(path, process)
    except OSError as error:
        return f"can't be seen by the service: {error.strerror}"
    try:
        return _why_not_in(folder, posixpath.basename(path), identity, process, roots)
    finally:
        os.close(folder)


def _why_not_in(folder: int, name: str, identity: Identity | None, process: Process | None, roots: Roots) -> str | None:
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        return f"can't be seen by the service: {error.strerror}"
    if stat.S_ISLNK(found.st_mode):
        return "a symbolic link; the image behind it may have other names"
    if not stat.S_ISREG(found.st_mode):
        return "not a regular file"
    if not roots.hold(folder):
        return "outside image_roots"
    if (found.st_dev, found.st_ino) != identity:
        return "not the file that QEMU has opened under this name"
    return None if roots.folders else may_unlink_as(process, folder, found)
