"""Image files, as the engine needs to see them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from app.core.chain import Disk, Identity, Layer, NotDeleted
from app.core.errors import Problem, Refused
from app.core.evidence import HeaderReading, Process
from app.core.headers import HeaderFacts
from app.core.images import Image, ImageUse
from app.core.kinds.base import LayerRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """From the images' own maps, in bytes: what a job copies, and how much of it is new to the written layer.

    `crowded`: the written layer has clusters that stay when they are written over, beside their new places.
    """

    bytes_to_copy: int
    new_bytes: int
    crowded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlays:
    """What was found by looking: the files, and whether all places could be looked at in time."""

    files: tuple[Image, ...] = ()
    complete: bool = True


class ChainUnreadable(Refused):
    """A chain of a domain that is off can't be read to its end.

    `layers` are those that were read. `blind`: the chain goes on, and nobody knows with which image; else nothing is
    there any more.
    """

    def __init__(self, problem: Problem, layers: tuple[Layer, ...], *, blind: bool) -> None:
        super().__init__(problem)
        self.layers = layers
        self.blind = blind


class Images(Protocol):
    """Image files, seen from the service. Blocking work is done off the event loop.

    `process` is the QEMU whose view of the file system the paths are in; None: the service's own.
    """

    async def identities(self, names: Iterable[str], process: Process | None) -> Mapping[str, Identity]:
        """The identities of those of the `names` that are paths of files that can be seen."""
        ...

    async def free_bytes(self, path: str, process: Process | None) -> int | None:
        """Free bytes of the file system that holds `path`; None where it can't be seen."""
        ...

    async def is_device(self, path: str, process: Process | None) -> bool:
        """Whether `path` is a block device, which does not grow."""
        ...

    async def open_files(self, processes: Mapping[str, Process]) -> Mapping[str, frozenset[Identity]] | None:
        """The files that each of the processes has open, as far as that can be seen; None where it is not told in time.

        The keys are those of `processes`.
        """
        ...

    async def locked(self, path: str, process: Process | None) -> bool:
        """Whether a process other than `process` holds an image lock on `path`."""
        ...

    async def measure(
        self, layers: Sequence[Layer], process: Process | None, *, upwards: bool = False
    ) -> Measure | None:
        """From the maps of a run of layers, topmost first: what a merge of all into the last one copies.

        `upwards`: what a pull of all into the first one copies. None where the tool or the files can't be had in time.
        """
        ...

    async def compare(self, layers: Sequence[LayerRecord], process: Process | None, *, size: int) -> str | None:
        """Why the topmost layer, over all others, does not show what the last one shows; None if it does.

        What is beyond `size` bytes does not count.

        Every byte is read, so it takes its time.
        """
        ...

    async def undeletable(self, files: Mapping[str, Identity | None], process: Process | None) -> Mapping[str, str]:
        """Those of the `files` that must not or can't be unlinked (not a regular file, outside the roots), and why."""
        ...

    async def unlink(
        self,
        files: Mapping[str, Image],
        process: Process | None,
        in_use: Callable[[Image], str | None],
        since: int | None = None,
    ) -> tuple[tuple[str, ...], tuple[NotDeleted, ...]]:
        """Unlink files: (deleted, not deleted). One that is gone already counts as deleted.

        A file that is another than the image, or of which that is not known, is left; so is one that any process has
        locked, or that was written to after `since` (ms since 1970). `in_use` names who still uses an image, or
        returns None; it is asked right before each unlink.
        """
        ...

    async def read_header(
        self, overlay: str, identity: Identity | None, process: Process | None
    ) -> HeaderReading | None:
        """Where the header of an image leads, as it stands on the disk now; None where that can't be told.

        Returns None, too, if `overlay` now names another file than `identity`.
        """
        ...

    async def sync(self, file: str, identity: Identity | None, process: Process | None) -> bool:
        """Have on the disk what was written to a file; False where that can't be known to be so.

        False, too, if `file` now names another file than `identity`.
        """
        ...

    async def header_facts(self, names: Sequence[str], overlay: Layer, process: Process | None) -> HeaderFacts:
        """Where each of the `names` would lead in the header of the overlay, and how much room that has."""
        ...

    async def offline_disk(self, domain: str, name: str, image: str, told: Sequence[ImageUse]) -> Disk:
        """A disk of a domain that is off, from the headers; raises `ChainUnreadable` where an image can't be read.

        `told` are uses of which QEMU has told the format, as for `format_of`. An image that QEMU had without a header
        of its own is not looked into.
        """
        ...

    async def overlays_on(self, images: Sequence[Image], besides: Sequence[Image]) -> Overlays:
        """Files in the folders that the service may look into whose headers lead to one of the images.

        `besides` are files that don't count. Only headers are read, and not for long.
        """
        ...

    async def is_there(self, image: Image) -> bool | None:
        """Whether the image still is what its path leads to, in the service's own view; None where that can't be seen.

        False only where its folder is there, and has no such file.
        """
        ...
