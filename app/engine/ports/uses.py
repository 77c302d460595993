"""What is kept of images, whatever becomes of domains, jobs and the service: who uses them, and which are invalid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from app.core.images import Image, ImageUse, InvalidMark, MarkChange

DiskUses = Mapping[tuple[str, str], Sequence[ImageUse]]
"""For some disks, named by (domain, disk), every use by their chains now; a disk without uses has no medium."""


class ImageRecords(Protocol):
    """Uses and marks of images. Each write is one transaction, and raises `JournalError`.

    What goes together with a change of a job is written by `Journal.store`.
    """

    async def record_uses(self, domain: str, disks: Mapping[str, Sequence[ImageUse]]) -> None:
        """Keep what the chains of these disks were read to be, in place of what was known of them."""
        ...

    async def uses(self) -> Sequence[ImageUse]:
        """Every use, by domain, disk and place."""
        ...

    async def change_marks(self, change: MarkChange) -> None:
        """Set and end marks where no job changes: an image was deleted or replaced by somebody else."""
        ...

    async def invalid_marks(self, images: Iterable[Image]) -> Sequence[InvalidMark]:
        """The marks of these images, or of what may be one of them, oldest job first."""
        ...
