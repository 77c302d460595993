"""A domain's disks: read from QEMU's graph while it runs, from the images' headers while it is off."""

from __future__ import annotations

from app.core.chain import Disk, matching_disks
from app.core.errors import Code, Problem, Refused
from app.core.job import Job
from app.engine.connection import MonitorConnection
from app.engine.ports.images import Images
from app.engine.ports.journal import Registration
from app.engine.views import DomainState


class DomainDisks:
    """The disks of one domain; `known` is how they were when they were last read."""

    def __init__(self, registration: Registration, connection: MonitorConnection, images: Images) -> None:
        self.known: tuple[Disk, ...] = ()
        self._registration = registration
        self._connection = connection
        self._images = images

    async def read(self) -> tuple[Disk, ...]:
        """All disks as they are now. Raises `Refused` where they can't be read, and what a monitor's call raises."""
        if self._connection.state() is DomainState.SHUTOFF:
            return await self.read_offline()
        monitor = self._connection.require()
        self.known = () if monitor.facts.missing else await monitor.disks()
        return self.known

    async def read_offline(self) -> tuple[Disk, ...]:
        """The registered disks, from their headers; the link's error tells of one that can't be read."""
        disks: list[Disk] = []
        for name, image in self._registration.disks.items():
            try:
                disks.append(await self._images.offline_disk(name, image))
            except Refused as refused:
                self._connection.error = refused.problem
        self.known = tuple(disks)
        return self.known

    def forget(self, name: str) -> None:
        """A disk is not any more what it was when it was read."""
        self.known = tuple(disk for disk in self.known if disk.name != name)

    async def find(self, name: str) -> Disk:
        """The one disk that answers to `name`; raises `Refused` for none or several."""
        disks = await self.read()
        identities = await self._images.identities([name], self._connection.process)
        found = matching_disks(disks, name, identities.get(name))
        if not found:
            known = ", ".join(disk.name for disk in disks) or "none"
            raise Refused(
                Problem(
                    code=Code.DISK_NOT_FOUND,
                    detail=f"no disk of {self._registration.id} is called {name!r}; it has {known}",
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
    work = job.work
    for disk in disks:
        if (work.qdev is not None and disk.qdev == work.qdev) or (work.backend and disk.backend == work.backend):
            return disk
    return None
