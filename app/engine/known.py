"""The disks that the domains of this host are known to have, and who uses an image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from app.core.chain import Disk, Identity, Layer
from app.core.errors import Problem, Refused
from app.core.images import Image, ImageUse, uses_by
from app.core.reconcile import uses_base
from app.core.sameness import Sameness, same
from app.engine.ports.images import Images
from app.engine.ports.uses import DiskUses


class KnownDisks:
    """Every domain's disks, as they were when they were last read.

    The disks of a domain that is off are read from the images' headers. Nobody tells when somebody works on these
    images, so `refresh` reads them anew before a decision.
    """

    def __init__(self, images: Images) -> None:
        self._images = images
        self._recorded: dict[tuple[str, str], tuple[Image | None, ...]] = {}
        self._disks: dict[str, tuple[Disk, ...]] = {}
        self._off: dict[str, Mapping[str, str]] = {}
        self._problems: dict[str, Problem] = {}

    def of(self, domain: str) -> tuple[Disk, ...]:
        """The disks of a domain."""
        return self._disks.get(domain, ())

    def problem(self, domain: str) -> Problem | None:
        """Why a disk of a domain that is off can't be read."""
        return self._problems.get(domain)

    def note(self, domain: str, disks: tuple[Disk, ...]) -> None:
        """The disks of a domain were read from its QEMU."""
        self._disks[domain] = disks
        self._off.pop(domain, None)
        self._problems.pop(domain, None)

    def without(self, domain: str, name: str) -> None:
        """A disk is not any more what it was when it was read."""
        self._disks[domain] = tuple(disk for disk in self.of(domain) if disk.name != name)

    def drop(self, domain: str) -> None:
        """A domain has no actor any more. What the journal knows of its images stays."""
        for table in (self._disks, self._off, self._problems):
            table.pop(domain, None)

    def forget(self, domain: str) -> None:
        """A domain was forgotten, and the journal does not know its images any more."""
        self.drop(domain)
        self._recorded = {disk: images for disk, images in self._recorded.items() if disk[0] != domain}

    # What the journal keeps -------------------------------------------------------------------------------------------

    def load(self, uses: Iterable[ImageUse]) -> None:
        """Take in what the journal knows at the start."""
        for use in uses:
            disk = (use.domain, use.disk)
            self._recorded[disk] = (*self._recorded.get(disk, ()), use.image)

    def unrecorded(self, domain: str, now: int) -> DiskUses:
        """The uses of those of the domain's disks whose chains are not as the journal knows them; `now` in ms."""
        found: dict[tuple[str, str], tuple[ImageUse, ...]] = {}
        disks = {disk.name: disk for disk in self.of(domain)}
        for name, disk in disks.items():
            images = tuple(Image.of(layer) for layer in disk.layers)
            if self._recorded.get((domain, name), ()) != images:
                found[domain, name] = uses_by(domain, disk, seen_at=now)
        if domain in self._disks and domain not in self._off:
            # Its QEMU has no such disk any more. Of a domain that is off only the registered disks are read.
            found |= {(domain, name): () for of, name in self._recorded if of == domain and name not in disks}
        return found

    def recorded(self, uses: DiskUses) -> None:
        """The journal has stored these."""
        for disk, of_disk in uses.items():
            if of_disk:
                self._recorded[disk] = tuple(use.image for use in of_disk)
            else:
                self._recorded.pop(disk, None)

    # Who uses what ----------------------------------------------------------------------------------------------------

    async def read_off(self, domain: str, images: Mapping[str, str]) -> tuple[Disk, ...]:
        """Read the disks of a domain that is off; `images` maps target names to the active layers' paths."""
        self._off[domain] = images
        disks: list[Disk] = []
        problem: Problem | None = None
        for name, image in images.items():
            try:
                disks.append(await self._images.offline_disk(name, image))
            except Refused as refused:
                problem = refused.problem
        if self._off.get(domain) is images:
            # It is still off: no QEMU of the domain has told of its disks meanwhile.
            self._disks[domain] = tuple(disks)
            self._problems.pop(domain, None)
            if problem is not None:
                self._problems[domain] = problem
        return tuple(disks)

    async def refresh(self) -> None:
        """Read the disks of all domains that are off anew."""
        for domain, images in list(self._off.items()):
            if domain in self._off:
                await self.read_off(domain, images)

    def base_user(self, domain: str, disk: Disk, base: Layer) -> str | None:
        """The other disk, of any known domain, whose data a merge into `base` would change; None if there is none."""
        for other_domain, disks in self._disks.items():
            for other in disks:
                if (other_domain, other.name) != (domain, disk.name) and uses_base(other, disk, base):
                    return f"{other_domain}/{other.name}"
        return None

    def image_user(self, file: str, identity: Identity | None) -> str | None:
        """A disk, of any known domain, that has the image in its chain; None if there is none."""
        for domain, disks in self._disks.items():
            for disk in disks:
                for layer in disk.layers:
                    if layer.file == file or same(identity, layer.identity) is Sameness.SAME:
                        return f"{domain}/{disk.name}"
        return None
