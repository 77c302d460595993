"""From a request to a plan, for a job of any kind: the disk is read, the layers are chosen, the host is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from app.core.chain import Disk, Identity, Layer
from app.core.errors import Code, Problem, Refused
from app.core.headers import HeaderFacts
from app.core.images import Image
from app.core.job import Job
from app.core.kinds import KINDS, Spec, kind_of
from app.core.plan import Facts, Inquiry, Plan
from app.engine.connection import MonitorConnection
from app.engine.disks import DomainDisks, disk_of
from app.engine.known import ImageUser
from app.engine.meanwhile import Meanwhile, plainly
from app.engine.ports.images import Measure, Overlays
from app.engine.ports.journal import Registration
from app.engine.shared import Shared
from app.engine.strangers import strangers_on
from app.engine.views import DomainState


class Planner:
    """Plans jobs for the disks of one domain."""

    def __init__(
        self, registration: Registration, shared: Shared, connection: MonitorConnection, disks: DomainDisks
    ) -> None:
        self._registration = registration
        self._shared = shared
        self._connection = connection
        self._disks = disks

    async def plan(
        self,
        kind: str,
        name: str,
        request: Any,
        jobs: Callable[[], tuple[Job, ...]],
        *,
        exact: bool,
        meanwhile: Meanwhile,
        disk: Disk | None = None,
    ) -> Plan[Spec]:
        """What a job of that kind would do on the disk that answers to `name`.

        `request` is the kind's own, `jobs` tells the domain's unfinished ones. `exact`: read the images' maps, as a
        person wants to see; else only where the layers' sizes leave a doubt. `meanwhile` is how files are waited for:
        other jobs may go on then, but none on this disk, which is read after the names and has no job from there on.
        `disk` is the disk, where it has just been read.
        Raises `Refused` for the first check that fails, in the contract's order.
        """
        self._check_usable(kind)
        rules = KINDS[kind]
        names, process = rules.layer_names(request), self._connection.process
        identities: Mapping[str, Identity] | None = None
        if names:
            identities = await meanwhile(self._shared.images.identities(names, process))
        disk = disk or await self._disks.find(name, meanwhile)
        chosen = rules.select(
            disk,
            request,
            identities=identities,
            conflict=next((job.id for job in jobs_on(disk, jobs())), None),
        )
        if isinstance(chosen, Problem):
            raise Refused(chosen)
        inquiry = rules.inquiry(chosen)
        facts = await self._ask(disk, inquiry, meanwhile)
        plan = rules.plan(chosen, facts)
        # Only the maps tell what stays beside what is written over it. Where there is room for that there is no doubt.
        most = rules.plan(chosen, replace(facts, crowded=True))
        doubtful = isinstance(most, Problem) and most.code is Code.INSUFFICIENT_STORAGE
        if doubtful or (exact and isinstance(plan, Plan)):
            measure = await meanwhile(self._measure(inquiry))
            if measure is not None:
                copied, new, crowded = measure.bytes_to_copy, measure.new_bytes, measure.crowded
                plan = rules.plan(chosen, replace(facts, bytes_to_copy=copied, new_bytes=new, crowded=crowded))
        if isinstance(plan, Problem):
            raise Refused(plan)
        return plan

    async def again(self, job: Job, jobs: Callable[[], tuple[Job, ...]]) -> Problem | None:
        """What speaks by now against starting a job that has waited; `jobs` tells the domain's unfinished ones."""
        disk = disk_of(job, await self._disks.read())
        record = job.spec.disk
        if disk is None or disk.nodes != record.nodes or disk.digest != record.digest:
            return Problem(
                code=Code.CHAIN_CHANGED,
                detail=f"the chain of {job.disk} is not the one that the job was accepted for; read the disk again and "
                "send the request again",
            )
        request = kind_of(job.spec).again(job.spec, disk.name, on_ready=job.on_ready, bandwidth=job.bandwidth)
        try:
            await self.plan(
                job.spec.kind,
                disk.name,
                request,
                lambda: tuple(other for other in jobs() if other.id != job.id),
                exact=False,
                meanwhile=plainly,
                disk=disk,
            )
        except Refused as refused:
            return refused.problem
        return None

    async def _ask(self, disk: Disk, inquiry: Inquiry, meanwhile: Meanwhile) -> Facts:
        known, written = self._shared.known, Image.of(inquiry.written)
        asked = asyncio.ensure_future(self._ask_files(disk, inquiry))
        try:
            # QEMU is asked by nobody else while it answers this.
            survey = await self._connection.require().survey(inquiry.probe)
            (locked, free, is_device, undeletable), header, strangers, holders, data = await meanwhile(asked)
        finally:
            asked.cancel()
        user = None
        if inquiry.alone:
            user = known.user_of(written, self._registration.id, disk) or holders.get(written)
            if user is None and data is not None:
                user = known.user_of(data, self._registration.id, disk)
        if user is None and strangers.files:
            path = strangers.files[0].path
            why = f"the header of {path} leads to this chain; register the domain that needs it, or delete it"
            user = ImageUser(path, why)
        return Facts(
            shared_with=None if user is None else user.name,
            shared_because="" if user is None else user.because,
            overlays_searched=strangers.complete,
            locked=locked,
            free=free,
            written_is_device=is_device,
            crowded=inquiry.written.snapshots > 0,
            undeletable=undeletable,
            header=header,
            survey=survey,
        )

    async def _ask_files(
        self, disk: Disk, inquiry: Inquiry
    ) -> tuple[
        tuple[bool, int | None, bool, Mapping[str, str]],
        HeaderFacts,
        Overlays,
        Mapping[Image, ImageUser],
        Image | None,
    ]:
        """All at once: where files hang, one deadline goes by, and not one after the other."""
        images, process, file = self._shared.images, self._connection.process, inquiry.written.file
        of_written = asyncio.gather(
            images.locked(file, process),
            self._free(inquiry.written),
            images.is_device(file, process),
            images.undeletable(inquiry.to_delete, process),
        )
        written, header, strangers, holders, data, _ = await asyncio.gather(
            of_written,
            self._header(inquiry),
            self._strangers(disk, inquiry),
            self._shared.known.holders((Image.of(inquiry.written),), process),
            self._data_image(inquiry.written),
            self._shared.known.refresh(),
        )
        return written, header, strangers, holders, data

    async def _free(self, layer: Layer) -> int | None:
        """The bytes by which a layer can grow: an image may keep its data in a file elsewhere."""
        return await self._shared.images.free_bytes(layer.data_file or layer.file, self._connection.process)

    async def _data_image(self, layer: Layer) -> Image | None:
        """The file in which an image keeps its data, which may be an image of others by itself (data_file_raw)."""
        if layer.data_file is None:
            return None
        seen = await self._shared.images.identities([layer.data_file], self._connection.process)
        return Image(layer.data_file, seen.get(layer.data_file))

    async def _measure(self, inquiry: Inquiry) -> Measure | None:
        read, written = inquiry.read, inquiry.written
        layers = (written, *read) if inquiry.upwards else (*read, written)
        return await self._shared.images.measure(layers, self._connection.process, upwards=inquiry.upwards)

    async def _strangers(self, disk: Disk, inquiry: Inquiry) -> Overlays:
        if not inquiry.alone:
            return Overlays()
        images = [Image.of(layer) for layer in (inquiry.written, *inquiry.read)]
        return await strangers_on(self._shared, images, [Image.of(layer) for layer in disk.layers])

    async def _header(self, inquiry: Inquiry) -> HeaderFacts:
        if inquiry.overlay is None:
            return HeaderFacts()
        return await self._shared.images.header_facts(inquiry.names, inquiry.overlay, self._connection.process)

    def _check_usable(self, kind: str) -> None:
        id_, facts = self._registration.id, self._connection.facts
        if facts is not None and facts.managed_by is not None and not self._registration.allow_managed:
            raise Refused(
                Problem(
                    code=Code.DOMAIN_MANAGED_ELSEWHERE,
                    detail=f"the domain {id_} belongs to {facts.managed_by}, which would not learn of the change; "
                    "use its tools, or register the domain with `allow_managed: true`",
                )
            )
        if self._connection.state() is DomainState.SHUTOFF and self._registration.disks:
            raise Refused(
                Problem(
                    code=Code.NOT_SUPPORTED,
                    detail=f"the domain {id_} is off, and this version merges layers of running domains only; "
                    "start the domain",
                )
            )
        missing = self._connection.require().facts.missing
        if missing:
            raise Refused(
                Problem(
                    code=Code.NOT_SUPPORTED,
                    detail=f"the program behind the monitor of {id_} lacks the commands {', '.join(missing)}",
                )
            )
        if kind not in self._connection.driver.capabilities.kinds:
            raise Refused(Problem(code=Code.NOT_SUPPORTED, detail=f"the domain {id_} takes no jobs of the kind {kind}"))


def jobs_on(disk: Disk, jobs: tuple[Job, ...]) -> list[Job]:
    """Those of a domain's jobs that work on the disk, whatever it is called by now."""
    return [job for job in jobs if disk_of(job, (disk,)) is not None]
