"""A domain's disks: read from QEMU's graph while it runs, from the images' headers while it is off."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import replace

from app.core.chain import Disk, matching_disks
from app.core.errors import Code, Problem, Refused
from app.core.job import Job
from app.core.states import State
from app.engine.connection import MonitorConnection
from app.engine.known import KnownDisks
from app.engine.meanwhile import Meanwhile
from app.engine.ports.images import Images
from app.engine.ports.journal import Registration
from app.engine.views import DomainState


class DomainDisks:
    """The disks of one domain, and how it is registered."""

    def __init__(
        self, registration: Registration, connection: MonitorConnection, images: Images, known: KnownDisks
    ) -> None:
        self.registration = registration
        self._connection = connection
        self._images = images
        self._known = known

    @property
    def known(self) -> tuple[Disk, ...]:
        """The disks as they were last read."""
        return self._known.of(self.registration.id)

    async def read(self) -> tuple[Disk, ...]:
        """All disks as they are now. Raises `Refused` where they can't be read, and what a runner's call raises."""
        if self._connection.state() is DomainState.SHUTOFF:
            return await self.read_off()
        runner = self._connection.require()
        disks = () if runner.facts.missing else await runner.disks()
        self._known.note(self.registration.id, disks, runner.facts.process)
        return self.known

    async def read_off(self) -> tuple[Disk, ...]:
        """The disks that are registered, or else those that it had when it ran, from their headers."""
        return await self._known.read_off(self.registration.id, self.off)

    @property
    def off(self) -> Mapping[str, str]:
        """The active images of the domain while it is off, by target name."""
        remembered = self._known.active_images(self.registration.id)
        return self.registration.disks or {disk: image.path for disk, image in remembered.items()}

    def moved(self, job: Job) -> Registration | None:
        """The registration once the job has put another image in the place of a registered one; None: as before."""
        chain = job.result.chain if job.result is not None else ()
        before = job.spec.disk.files[0]
        if job.state is not State.COMPLETED or not chain or chain[0] == before:
            return None
        disks = {
            name: chain[0] if posixpath.normpath(image) == before else image
            for name, image in self.registration.disks.items()
        }
        return None if disks == self.registration.disks else replace(self.registration, disks=disks)

    def forget(self, name: str) -> None:
        """A disk is not any more what it was when it was read."""
        self._known.without(self.registration.id, name)

    async def find(self, name: str, meanwhile: Meanwhile) -> Disk:
        """The one disk that answers to `name`; raises `Refused` for none or several."""
        identities = await meanwhile(self._images.identities([name], self._connection.process))
        disks = await self.read()
        found = matching_disks(disks, name, identities.get(name))
        if not found:
            known = ", ".join(disk.name for disk in disks) or "none"
            raise Refused(
                Problem(
                    code=Code.DISK_NOT_FOUND,
                    detail=f"no disk of {self.registration.id} is called {name!r}; it has {known}",
                )
            )
        if len(found) > 1:
            several = ", ".join(disk.name for disk in found)
            raise Refused(
                Problem(code=Code.DISK_AMBIGUOUS, detail=f"{name!r} is a name of several disks: {several}; name one")
            )
        return found[0]


def disk_of(job: Job, disks: tuple[Disk, ...]) -> Disk | None:
    """The disk that the job works on, whatever it is called by now."""
    record = job.spec.disk
    for disk in disks:
        if (record.qdev is not None and disk.qdev == record.qdev) or (
            record.backend and disk.backend == record.backend
        ):
            return disk
    return None


def disk_with(job: Job, disks: tuple[Disk, ...]) -> Disk | None:
    """A disk that has a layer of the job in its chain, whatever device it is attached to by now."""
    nodes = {layer.node for layer in (*job.spec.merged, job.spec.lasting)}
    return next((disk for disk in disks if nodes.intersection(disk.nodes)), None)
