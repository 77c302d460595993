"""The `Images` port: this room's functions put together, each with a deadline.

A file system that does not answer is never a reason to go on: where it matters, an answer that did not come in time
refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog

from app.core.chain import Disk, Identity, Layer, NotDeleted
from app.core.errors import Code, Problem
from app.core.evidence import HeaderReading, Process
from app.core.headers import HeaderFacts
from app.core.images import Image, ImageUse
from app.core.kinds.base import LayerRecord
from app.engine.ports.images import ChainUnreadable, Measure, Overlays
from app.hostfs import allocation, deletion, headers, identity, locks, offline, overlays
from app.hostfs.patience import Overdue, Workers
from app.hostfs.roots import Roots

log = structlog.get_logger(__name__)

T = TypeVar("T")

ANSWER_S: Final = 5.0
"""Seconds that a file system has to answer."""

OFF_S: Final = 2.0
"""Seconds that it has for a disk of a domain that is off, which all others wait for."""

SILENT: Final = "its file system does not answer"


class LocalImages:
    """The `Images` port. `roots` are the folders outside which nothing is opened or deleted (none: anywhere).

    `timeout` is the most seconds that reading an image's map may take.
    """

    def __init__(
        self,
        roots: Sequence[str | Path],
        timeout: float,
        qemu_img: str = "qemu-img",
        *,
        workers: Workers | None = None,
    ) -> None:
        self._workers = workers or Workers()
        self._roots = Roots.of(roots)
        self._overlays = overlays.OverlayIndex(self._roots)
        self._qemu_img = allocation.QemuImg(program=qemu_img, timeout=timeout)

    async def _do(self, otherwise: T, owner: object, work: Callable[..., T], *arguments: Any) -> T:
        """What `work` returns, or `otherwise` where that does not come in time."""
        try:
            return await self._workers.do(work, *arguments, within=ANSWER_S, owner=owner)
        except Overdue as error:
            log.warning("file system silent", work=work.__name__, error=str(error))
            return otherwise

    async def identities(self, names: Iterable[str], process: Process | None) -> Mapping[str, Identity]:
        """The identities of those of the `names` that are paths of files that can be seen."""
        paths = [name for name in names if name.startswith("/")]
        return await self._do({}, process, identity.identities, paths, process) if paths else {}

    async def free_bytes(self, path: str, process: Process | None) -> int | None:
        """Bytes by which the image can grow in its file system, or in its device; None where that can't be seen."""
        if not path.startswith("/"):
            return None
        return await self._do(None, process, allocation.free_bytes, path, process, self._roots)

    async def is_device(self, path: str, process: Process | None) -> bool:
        """Whether `path` is a block device, which does not grow."""
        return path.startswith("/") and await self._do(False, process, allocation.is_device, path, process)

    async def open_files(self, processes: Mapping[str, Process]) -> Mapping[str, frozenset[Identity]] | None:
        """The files that each of the processes can be seen to have open; None where that is not told in time.

        One that nobody here can see has none: on another host, or in another pid namespace, only QEMU's locks tell.
        """
        return await self._do(None, "open files", identity.open_by, processes)

    async def locked(self, path: str, process: Process | None) -> bool:
        """Whether a process other than `process` holds an image lock on `path`, or nobody can tell in time."""
        return path.startswith("/") and await self._do(True, process, locks.locked_by_another, path, process)

    async def measure(
        self, layers: Sequence[Layer], process: Process | None, *, upwards: bool = False
    ) -> Measure | None:
        """Read the maps of a run of layers, topmost first; None where the tool or the files can't be had in time."""
        judged = await self._do(None, process, allocation.judge, layers, process, self._roots)
        if judged is None:
            return None
        count = allocation.measure_pull if upwards else allocation.measure
        return await count(layers, judged, self._qemu_img)

    async def compare(self, layers: Sequence[LayerRecord], process: Process | None, *, size: int) -> str | None:
        """Why the topmost layer, over all others, does not show what the last one shows; None if it does."""
        judged = await self._do(None, process, allocation.judge, layers, process, self._roots)
        if judged is None:
            return "the images can't be opened by the service"
        return await allocation.compare(layers, judged, self._qemu_img, size=size)

    async def undeletable(self, files: Mapping[str, Identity | None], process: Process | None) -> Mapping[str, str]:
        """Those of the `files` that must not or can't be unlinked (not a regular file, outside the roots), and why."""
        if not files:
            return {}
        silent = dict.fromkeys(files, SILENT)
        return await self._do(silent, process, deletion.undeletable, files, process, self._roots)

    async def unlink(
        self,
        files: Mapping[str, Image],
        process: Process | None,
        in_use: Callable[[Image], str | None],
        since: int | None = None,
    ) -> tuple[tuple[str, ...], tuple[NotDeleted, ...]]:
        """Unlink files: (deleted, not deleted). One that is gone already counts as deleted.

        Left is what was written to after `since` (ms since 1970), too. `in_use` is asked right before each unlink, and
        on the event loop, where what it looks at belongs.
        """
        deleted: list[str] = []
        kept: list[NotDeleted] = []
        for path, image in files.items():
            if user := in_use(image):
                reason = f"in use by {user}"
            else:
                reason = await self._do(SILENT, process, deletion.unlink, path, image, process, self._roots, since)
            if reason is None:
                deleted.append(path)
            else:
                kept.append(NotDeleted(file=path, reason=reason))
        return tuple(deleted), tuple(kept)

    async def read_header(
        self, overlay: str, identity: Identity | None, process: Process | None
    ) -> HeaderReading | None:
        """Where the header of an image leads, as it stands on the disk now; None where that can't be told.

        Returns None, too, if `overlay` now names another file than `identity`, or `identity` is not known.
        """
        if identity is None:
            return None
        return await self._do(None, process, headers.read_header, overlay, identity, process, self._roots)

    async def sync(self, file: str, identity: Identity | None, process: Process | None) -> bool:
        """Have on the disk what was written to a file; False where that can't be known to be so."""
        if identity is None:
            return False
        return await self._do(False, process, headers.sync, file, identity, process, self._roots)

    async def header_facts(self, names: Sequence[str], overlay: Layer, process: Process | None) -> HeaderFacts:
        """Where each of the `names` would lead in the header of the overlay, and how much room that has."""
        arguments = (names, overlay.file, overlay.identity, process, self._roots)
        return await self._do(HeaderFacts(seen=True), process, headers.header_facts, *arguments)

    async def offline_disk(self, domain: str, name: str, image: str, told: Sequence[ImageUse]) -> Disk:
        """A disk of a domain that is off, from the headers; raises `ChainUnreadable` where an image can't be read."""
        try:
            work = (offline.offline_disk, domain, name, image, told, self._roots)
            return await self._workers.do(*work, within=OFF_S, owner=image, most=1)
        except Overdue as error:
            detail = f"the disk {name} can't be read: {image}: {error}"
            problem = Problem(code=Code.DISK_NOT_FOUND, detail=detail, extra={"file": image})
            raise ChainUnreadable(problem, (), blind=True) from error

    async def overlays_on(self, images: Sequence[Image], besides: Sequence[Image]) -> Overlays:
        """Files in the roots whose headers lead to one of the images; without roots nobody looks."""
        if not self._roots.folders:
            return Overlays()
        nothing = Overlays(complete=False)
        return await self._do(nothing, "roots", overlays.overlays_on, self._overlays, images, besides)

    async def is_there(self, image: Image) -> bool | None:
        """Whether the image still is what its path leads to; None where that can't be seen."""
        return await self._do(None, image.path, offline.is_there, image)
