"""The `Images` port on the simulated file system."""
# ruff: noqa: ARG002 - the port names the process whose view is meant; all of a host have the same here

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

from app.core.chain import Disk, Identity, Layer, NotDeleted
from app.core.errors import Code, Problem
from app.core.evidence import HeaderReading, Process
from app.core.headers import HeaderFacts
from app.core.images import Image as ImageName
from app.core.images import ImageUse
from app.core.kinds.base import LayerRecord
from app.engine.ports.images import ChainUnreadable, Measure, Overlays
from tests.engine.simulation.files import CLUSTER, CLUSTERS, Image, resolve
from tests.engine.simulation.life import Life
from tests.engine.simulation.nodes import DEVICE
from tests.engine.simulation.world import World


class SimImages:
    """The `Images` port. Files of other hosts can't be seen, whatever process is named."""

    def __init__(self, world: World, life: Life) -> None:
        self._world = world
        self._life = life

    async def _delay(self, what: str) -> None:
        self._life.check()
        self._world.trace.note_call(what)
        await asyncio.sleep(self._world.latency())
        while (rest := self._world.slow_files_until - self._world.loop.time()) > 0:  # noqa: ASYNC110
            # The file system may answer earlier than it was to.
            await asyncio.sleep(min(rest, 1.0))
        self._life.check()

    def _seen(self, path: str) -> Image | None:
        image = self._world.files.paths.get(path)
        return image if image is not None and image.seen else None

    def _identity(self, path: str) -> Identity | None:
        image = self._seen(path)
        return (DEVICE, image.inode) if image is not None else None

    async def identities(self, names: Iterable[str], process: Process | None) -> Mapping[str, Identity]:
        """The identities of those of the `names` that are paths of files that can be seen."""
        paths = [name for name in names if name.startswith("/")]
        if not paths:
            return {}
        await self._delay("identities")
        found = ((name, self._identity(name)) for name in paths)
        return {name: identity for name, identity in found if identity is not None}

    async def free_bytes(self, path: str, process: Process | None) -> int | None:
        """Free bytes of the file system that holds `path`."""
        await self._delay("free_bytes")
        if self._seen(path) is None:
            return None
        return 0 if self._world.files.full else 1 << 40

    async def open_files(self, processes: Mapping[str, Process]) -> Mapping[str, frozenset[Identity]] | None:
        """The files that each of the processes has open."""
        found: dict[str, frozenset[Identity]] = {}
        for name, process in processes.items():
            seen = process.pid is not None
            opened = (qemu for qemu in self._world.processes if seen and qemu.up and qemu.process.pid == process.pid)
            nodes = (node for qemu in opened for node in qemu.nodes.values())
            found[name] = frozenset((DEVICE, node.image.inode) for node in nodes if node.image.seen)
        return found

    async def is_device(self, path: str, process: Process | None) -> bool:
        """No image is a block device."""
        await self._delay("is_device")
        return False

    async def locked(self, path: str, process: Process | None) -> bool:
        """Whether a process other than `process` has the image open."""
        await self._delay("locked")
        image = self._seen(path)
        if image is None or (process is not None and process.pid is None):
            return False
        return bool(self._world.openers(process, image))

    async def measure(
        self, layers: Sequence[Layer], process: Process | None, *, upwards: bool = False
    ) -> Measure | None:
        """What a merge or a pull copies."""
        await self._delay("measure")
        images = [self._seen(layer.file) for layer in layers]
        if any(image is None for image in images):
            return None
        *above, base = [image.clusters for image in images if image is not None]
        if upwards:
            pulled = {cluster for layer in (*above[1:], base) for cluster in layer} - set(above[0])
            return Measure(bytes_to_copy=len(pulled) * CLUSTER, new_bytes=len(pulled) * CLUSTER)
        copied = {cluster for layer in above for cluster in layer}
        return Measure(bytes_to_copy=len(copied) * CLUSTER, new_bytes=len(copied - set(base)) * CLUSTER)

    async def compare(self, layers: Sequence[LayerRecord], process: Process | None, *, size: int) -> str | None:
        """The images show the same."""
        await self._delay(f"compare {len(layers)} {size}")

    async def undeletable(self, files: Mapping[str, Identity | None], process: Process | None) -> Mapping[str, str]:
        """Those of the `files` that can't be unlinked."""
        await self._delay("undeletable")
        return {file: "can't be seen" for file in files if self._seen(file) is None}

    async def unlink(
        self,
        files: Mapping[str, ImageName],
        process: Process | None,
        in_use: Callable[[ImageName], str | None],
        since: int | None = None,
    ) -> tuple[tuple[str, ...], tuple[NotDeleted, ...]]:
        """Unlink files."""
        deleted: list[str] = []
        kept: list[NotDeleted] = []
        for path, image in files.items():
            user = in_use(image)
            if user:
                kept.append(NotDeleted(file=path, reason=f"in use by {user}"))
                continue
            await self._delay("unlink")
            reason = self._unlink(path, image.identity)
            if reason is None:
                deleted.append(path)
            else:
                kept.append(NotDeleted(file=path, reason=reason))
        return tuple(deleted), tuple(kept)

    def _unlink(self, path: str, identity: Identity | None) -> str | None:
        if path.startswith("/remote"):
            return "its folder can't be opened"
        image = self._seen(path)
        if image is None:
            return None
        if identity != (DEVICE, image.inode):
            return "not the file that QEMU has opened under this name"
        if self._world.openers(None, image):
            return "a process has it open"
        self._world.files.unlink(path)
        self._world.touched = True
        self._world.trace.note("unlinked", path)
        return None

    async def read_header(
        self, overlay: str, identity: Identity | None, process: Process | None
    ) -> HeaderReading | None:
        """Where the header of an image leads."""
        await self._delay("read_header")
        image = self._seen(overlay)
        if image is None or identity != (DEVICE, image.inode):
            return None
        if image.header is None:
            return HeaderReading(file=None)
        below = resolve(image.header, overlay)
        return HeaderReading(file=below, identity=self._identity(below))

    async def sync(self, file: str, identity: Identity | None, process: Process | None) -> bool:
        """Have on the disk what was written to a file; headers are, as soon as they are written."""
        await self._delay("sync")
        image = self._seen(file)
        return image is not None and identity == (DEVICE, image.inode)

    async def header_facts(self, names: Sequence[str], overlay: Layer, process: Process | None) -> HeaderFacts:
        """Where each of the `names` would lead in the header of the overlay."""
        await self._delay("header_facts")
        seen = self._seen(overlay.file) is not None
        named = {name: self._identity(resolve(name, overlay.file)) for name in names}
        return HeaderFacts(named=named, room=1023 if seen else None, seen=seen)

    async def overlays_on(self, images: Sequence[ImageName], besides: Sequence[ImageName]) -> Overlays:
        """There are no folders to look into."""
        await self._delay(f"overlays_on {len(images)} {len(besides)}")
        return Overlays()

    async def is_there(self, image: ImageName) -> bool | None:
        """Whether the image still is what its path leads to."""
        await self._delay("is_there")
        found = self._world.files.paths.get(image.path)
        if found is None:
            return False
        return True if found.seen and (DEVICE, found.inode) == image.identity else None

    async def offline_disk(self, domain: str, name: str, image: str, told: Sequence[ImageUse]) -> Disk:
        """A disk of a domain that is off, from the headers; no image is raw."""
        await self._delay("offline_disk")
        layers: list[Layer] = []
        path: str | None = image
        while path is not None:
            found = self._seen(path)
            if found is None:
                detail = f"the disk {name} can't be read: {path}: No such file or directory"
                problem = Problem(code=Code.DISK_NOT_FOUND, detail=detail, extra={"file": path})
                raise ChainUnreadable(problem, tuple(layers), blind=False)
            layers.append(
                Layer(
                    file=path,
                    format="qcow2",
                    node="",
                    virtual_size=CLUSTERS * CLUSTER,
                    actual_size=found.size,
                    backing=found.header,
                    backing_format="qcow2" if found.header else None,
                    identity=(DEVICE, found.inode),
                    folder=path.rpartition("/")[0],
                )
            )
            path = resolve(found.header, path) if found.header is not None else None
        return Disk(name=name, layers=tuple(layers))
