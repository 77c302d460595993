"""The disks that the domains of this host are known to have, and who uses an image."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from app.core.chain import Disk, Identity
from app.core.errors import Problem
from app.core.evidence import Process, same_process
from app.core.images import HEADERLESS, Image, ImageUse, format_of, has_image, users_of, uses_by
from app.core.sameness import Sameness
from app.engine.ports.images import ChainUnreadable, Images
from app.engine.ports.uses import DiskUses
from app.engine.together import Together


@dataclass(frozen=True, slots=True)
class ImageUser:
    """Who uses an image, and how that is known."""

    name: str
    because: str = ""


class KnownDisks:
    """Every domain's disks, as they were when they were last read.

    The disks of a domain that is off are read from the images' headers. Nobody tells when somebody works on these
    images, so `refresh` reads them anew before a decision. Where a domain's disks can't be read now, what the journal
    knows of them counts. What a guest has written into a raw image is never taken for a header: the formats are those
    that QEMU told when it ran.
    """

    def __init__(self, images: Images) -> None:
        self._images = images
        self._recorded: dict[tuple[str, str], tuple[ImageUse, ...]] = {}
        self._disks: dict[str, tuple[Disk, ...]] = {}
        self._off: dict[str, Mapping[str, str]] = {}
        self._problems: dict[str, Problem] = {}
        self._parts: dict[str, tuple[Disk, ...]] = {}
        self._blind: dict[str, Problem] = {}
        self._processes: dict[str, Process] = {}
        self._open_files = Together(self._look_at_open_files)
        self._refreshed = Together(self._read_all_off)

    def of(self, domain: str) -> tuple[Disk, ...]:
        """The disks of a domain."""
        return self._disks.get(domain, ())

    def problem(self, domain: str) -> Problem | None:
        """Why a disk of a domain that is off can't be read."""
        return self._problems.get(domain)

    def note(self, domain: str, disks: tuple[Disk, ...], process: Process | None = None) -> None:
        """The disks of a domain were read from its QEMU, which is that process."""
        self.drop(domain)
        self._disks[domain] = disks
        if process is not None:
            self._processes[domain] = process

    def without(self, domain: str, name: str) -> None:
        """A disk is not any more what it was when it was read."""
        self._disks[domain] = tuple(disk for disk in self.of(domain) if disk.name != name)

    def drop(self, domain: str) -> None:
        """A domain has no actor any more. What the journal knows of its images stays."""
        for table in (self._disks, self._off, self._problems, self._parts, self._blind, self._processes):
            table.pop(domain, None)

    def forget(self, domain: str) -> None:
        """A domain was forgotten, and the journal does not know its images any more."""
        self.drop(domain)
        self._recorded = {disk: uses for disk, uses in self._recorded.items() if disk[0] != domain}

    def active_images(self, domain: str) -> Mapping[str, Image]:
        """The active layers of a domain's disks, by target name, as the journal knows them."""
        return {
            disk: uses[0].image
            for (of, disk), uses in self._recorded.items()
            if of == domain and uses and uses[0].image is not None
        }

    def remembered(self) -> frozenset[str]:
        """The domains whose images the journal knows."""
        return frozenset(domain for domain, _ in self._recorded)

    async def vanished(self, domain: str) -> DiskUses:
        """Those of a domain's remembered disks whose active images are known to be gone, without uses."""
        found = {disk: await self._images.is_there(image) for disk, image in self.active_images(domain).items()}
        return {(domain, disk): () for disk, there in found.items() if there is False}

    # What the journal keeps -------------------------------------------------------------------------------------------

    def load(self, uses: Iterable[ImageUse]) -> None:
        """Take in what the journal knows at the start."""
        for use in uses:
            disk = (use.domain, use.disk)
            self._recorded[disk] = (*self._recorded.get(disk, ()), use)

    def unrecorded(self, domain: str, now: int) -> DiskUses:
        """The uses of those of the domain's disks whose chains are not as the journal knows them; `now` in ms."""
        found: dict[tuple[str, str], tuple[ImageUse, ...]] = {}
        disks = {disk.name: disk for disk in self.of(domain)}
        for name, disk in disks.items():
            uses = uses_by(domain, disk, seen_at=now)
            if domain in self._off:
                # A header tells no format that may be relied on; what QEMU told of the same images stays true.
                of_domain = self._recorded_of(domain)
                uses = tuple(replace(use, format=_told(use.image, of_domain, domain)) for use in uses)
            if _content(self._recorded.get((domain, name), ())) != _content(uses):
                found[domain, name] = uses
        if domain in self._disks and domain not in self._off:
            # Its QEMU has no such disk any more. Of a domain that is off only the registered disks are read.
            found |= {(domain, name): () for of, name in self._recorded if of == domain and name not in disks}
        return found

    def recorded(self, uses: DiskUses) -> None:
        """The journal has stored these."""
        for disk, of_disk in uses.items():
            if of_disk:
                self._recorded[disk] = tuple(of_disk)
            else:
                self._recorded.pop(disk, None)

    # Who uses what ----------------------------------------------------------------------------------------------------

    async def read_off(self, domain: str, images: Mapping[str, str]) -> tuple[Disk, ...]:
        """Read the disks of a domain that is off; `images` maps target names to the active layers' paths."""
        self._off[domain] = images
        return await self._read_off(domain, images, (*self._recorded_of(domain), *self._headerless()))

    async def _read_off(self, domain: str, images: Mapping[str, str], told: Sequence[ImageUse]) -> tuple[Disk, ...]:
        disks: list[Disk] = []
        parts: list[Disk] = []
        problem: Problem | None = None
        blind: Problem | None = None
        for name, image in images.items():
            try:
                disks.append(await self._images.offline_disk(domain, name, image, told))
            except ChainUnreadable as unreadable:
                problem = unreadable.problem
                parts.append(Disk(name=name, layers=unreadable.layers))
                blind = problem if unreadable.blind else blind
        if self._off.get(domain) is images:
            # It is still off: no QEMU of the domain has told of its disks meanwhile, and nobody has had it forgotten.
            self._disks[domain], self._parts[domain] = tuple(disks), tuple(parts)
            for table, found in ((self._problems, problem), (self._blind, blind)):
                table.pop(domain, None)
                if found is not None:
                    table[domain] = found
        return tuple(disks)

    async def refresh(self) -> None:
        """Read the disks of all domains that are off anew."""
        await self._refreshed.get()

    async def _read_all_off(self) -> None:
        headerless = self._headerless()
        own: dict[str, list[ImageUse]] = {}
        for (of, _), uses in self._recorded.items():
            own.setdefault(of, []).extend(uses)
        # What QEMU told of the domain itself comes first: it is what the domain will be started with.
        await asyncio.gather(
            *(self._read_off(of, images, (*own.get(of, ()), *headerless)) for of, images in list(self._off.items()))
        )

    def headerless(self) -> tuple[Image, ...]:
        """The images that surely are without a header of their own, as QEMU tells or has told."""
        return tuple(use.image for use in self._headerless() if use.image is not None)

    def _headerless(self) -> list[ImageUse]:
        """The uses of images that surely are without a header of their own.

        A running QEMU has its files open. The numbers of a file or a device that nobody has open may be given again, so
        what the journal knows counts only with the time at which the file was made.
        """
        found = [
            use
            for of in self._live()
            for disk in self._disks[of]
            # Few chains have one, and all are gone through for each plan.
            if any(layer.format in HEADERLESS for layer in disk.layers)
            for use in uses_by(of, disk, seen_at=0)
        ]
        found += [
            use
            for use in self._not_live()
            if use.image is not None and use.image.born is not None and use.image.device is None
        ]
        return [use for use in found if use.format in HEADERLESS]

    def _recorded_of(self, domain: str) -> list[ImageUse]:
        return [use for (of, _), uses in self._recorded.items() if of == domain for use in uses]

    def _live(self) -> set[str]:
        return {of for of in self._disks if of not in self._off}

    def _not_live(self) -> list[ImageUse]:
        """What the journal knows of the domains that have not been read from their QEMUs."""
        live = self._live()
        return [use for (of, _), uses in self._recorded.items() if of not in live for use in uses]

    async def holders(self, images: Sequence[Image], process: Process | None) -> Mapping[Image, ImageUser]:
        """The running domains whose QEMUs have one of the images open, and did not when their disks were read.

        QEMU tells nobody of a disk that was plugged in. `process` is who asks.
        """
        if all(same_process(other, process) is Sameness.SAME for other in self._processes.values()):
            return {}
        processes, opened = await self._open_files.get()
        found: dict[Image, ImageUser] = {}
        for domain, other in processes.items():
            if same_process(other, process) is Sameness.SAME:
                continue
            for image in images:
                # Where nobody could look, anybody may have it.
                if image.identity is None or (opened is not None and image.identity not in opened[domain]):
                    continue
                if not any(has_image(disk, image) for disk in self.of(domain)):
                    found.setdefault(image, ImageUser(domain, f"the QEMU of {domain} has it open"))
        return found

    async def _look_at_open_files(self) -> tuple[Mapping[str, Process], Mapping[str, frozenset[Identity]] | None]:
        processes = dict(self._processes)
        return processes, await self._images.open_files(processes)

    def user_of(self, image: Image, domain: str, disk: Disk) -> ImageUser | None:
        """Another disk, of any domain, that has the image in its chain, or may have it; None if there is none.

        `domain` and `disk` are who asks: what is the same disk, by another registration or from before, is no other.
        """
        uses = users_of(self._others(domain, disk.name), image, besides=uses_by(domain, disk, seen_at=0))
        if uses:
            use = uses[0]
            return ImageUser(f"{use.domain}/{use.disk}", self._because(use.domain))
        blind = next(((of, problem) for of, problem in self._blind.items() if of != domain), None)
        if blind is None:
            return None
        return ImageUser(
            blind[0],
            f"its chain can't be read to its end, so it may be any image's: {blind[1].detail}; make it readable, "
            f"register {blind[0]} anew, or forget it (DELETE /domains/{blind[0]})",
        )

    def _others(self, domain: str, name: str) -> list[ImageUse]:
        """The uses by all disks but that one: as they are read now, or as the journal knows them."""
        found: list[ImageUse] = []
        current: set[tuple[str, str]] = {(domain, name)}
        for of, disks in self._disks.items():
            for disk in (*disks, *self._parts.get(of, ())):
                if (of, disk.name) != (domain, name):
                    found += uses_by(of, disk, seen_at=0)
            current |= {(of, disk.name) for disk in disks}
        return found + [use for use in self._not_live() if (use.domain, use.disk) not in current]

    def _because(self, domain: str) -> str:
        if domain in self._disks and domain not in self._off:
            return ""
        return f"{domain} is off, and needs it when it is started again; if it is not, DELETE /domains/{domain}"


def _told(image: Image | None, uses: Iterable[ImageUse], domain: str) -> str | None:
    return None if image is None else format_of(image, uses, domain)


def _content(uses: Iterable[ImageUse]) -> list[tuple[Image | None, str | None]]:
    return [(use.image, use.format) for use in uses]
