"""Carries out what a job's step asks for: each command, once, on the job's runner."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from app.core.chain import Disk, NotDeleted
from app.core.errors import CANCELED, Code, Problem
from app.core.evidence import Evidence, GraphReading, HeaderReading, Proof, Verdict, same_process
from app.core.images import Image, has_image
from app.core.job import Job, Result
from app.core.kinds import kind_of
from app.core.kinds.base import LayerRecord
from app.core.machine.inputs import (
    Accepted,
    CleanedUp,
    Gathered,
    Input,
    Observed,
    PivotDeclined,
    PivotTaken,
    Rejected,
)
from app.core.progress import Meter
from app.core.sameness import Sameness
from app.core.states import Command, State
from app.engine.connection import MonitorConnection
from app.engine.disks import DomainDisks, disk_of, disk_with
from app.engine.ports.driver import Declined, MonitorError, Runner
from app.engine.shared import Shared
from app.engine.strangers import strangers_on

log = structlog.get_logger(__name__)

RECENT_MS: Final = 1000
"""Milliseconds after its start for which what a plan has found out still holds."""

HEADER_S: Final = 10.0
"""Seconds for which a header is tried to be read, before a job is judged without it."""


@dataclass(slots=True)
class LiveJob:
    """An unfinished job, and what is known of it only while the service runs.

    `planned_now`: its plan is of this moment. `flushed`: its data was on the disk when QEMU held it at `pending`.
    `listed_by` is the connection over which QEMU has last shown that it has the job, `at_its_end` that the job was seen
    to be about to take effect. `hindrance` is why it was given up right before that. `header_due` is until when its
    header is tried to be read, `comparison` compares its images. `progress_due` is when its progress may be told next,
    `paused_since` since when it has been seen paused without a break, both on the clock's seconds.
    """

    job: Job
    planned_now: bool = False
    flushed: bool = False
    meter: Meter = field(default_factory=Meter)
    progress_due: float = 0.0
    paused_since: float | None = None
    listed_by: Runner | None = None
    at_its_end: bool = False
    header_due: float | None = None
    comparison: asyncio.Task[str | None] | None = None
    hindrance: str | None = None

    def sameness(self, runner: Runner | None, found: Sameness) -> Sameness:
        """Whether who answers now took the job: over the connection that has shown the job, it is nobody else.

        `found` is what the processes tell.
        """
        return Sameness.SAME if runner is not None and runner is self.listed_by else found

    def metered(self, seen: Observed, now: float) -> Observed:
        """What QEMU says, with the rate and the time left, and for how long the job has been seen paused."""
        self.meter, progress = self.meter.measure(seen.progress, now)
        error = self.hindrance if seen.error == CANCELED and self.hindrance else seen.error
        seen = replace(seen, progress=progress, error=error)
        if seen.status not in ("paused", "standby"):
            self.paused_since = None
            return seen
        if self.paused_since is None:
            self.paused_since = now
        return replace(seen, paused_for=now - self.paused_since)


class Executor:
    """Carries out the commands of one domain's jobs.

    `monitor_error` is what a runner's call has met in the middle of a job's move. The actor deals with it afterwards,
    as that may move jobs in turn. `replan` says what speaks by now against starting a job that has waited. `wake`
    has the actor look again.
    """

    def __init__(
        self,
        shared: Shared,
        connection: MonitorConnection,
        disks: DomainDisks,
        replan: Callable[[Job], Awaitable[Problem | None]],
        wake: Callable[[], None],
    ) -> None:
        self.monitor_error: MonitorError | None = None
        self._shared = shared
        self._connection = connection
        self._disks = disks
        self._replan = replan
        self._wake = wake
        self._on_runner: Final[dict[Command, Callable[[Runner, Job, LiveJob], Awaitable[Input | None]]]] = {
            Command.START: self._start,
            Command.PIVOT: self._pivot,
            Command.ABORT: lambda runner, job, _live: runner.abort(job.id, force=False),
            Command.ABORT_FORCE: lambda runner, job, _live: runner.abort(job.id, force=True),
            Command.FINALIZE: self._finalize,
            Command.PAUSE: lambda runner, job, _live: runner.pause(job.id),
            Command.RESUME: lambda runner, job, _live: runner.resume(job.id),
            Command.SET_SPEED: lambda runner, job, _live: runner.set_speed(job.id, job.bandwidth),
        }

    async def carry_out(self, job: Job, live: LiveJob, command: Command) -> Input | None:
        """Carry out a command; the input that follows, or None where the next look will tell.

        `job` is the job as the command found it, which may be stored only together with what follows.
        """
        try:
            if command is Command.GATHER:
                return await self._gather(job, live)
            if command is Command.CLEAN_UP:
                return await self._clean_up(job, live)
            runner = self._usable
            return None if runner is None else await self._on_runner[command](runner, job, live)
        except Declined as declined:
            log.warning("qemu declined", domain=job.domain, job=job.id, command=command.value, error=str(declined))
        except MonitorError as error:
            log.warning("command unanswered", domain=job.domain, job=job.id, command=command.value, error=str(error))
            self.monitor_error = error
        return None

    @property
    def _usable(self) -> Runner | None:
        """The runner of this domain's jobs, unless a call has just shown that it can't be asked."""
        return None if self.monitor_error is not None else self._connection.usable

    # Commands that change something in QEMU ---------------------------------------------------------------------------

    async def _start(self, runner: Runner, job: Job, live: LiveJob) -> Input:
        if not live.planned_now and (refused := await self._replan(job)) is not None:
            # It has waited, in the queue or over a restart: who uses the images may be others by now.
            return Rejected(refused)
        try:
            await runner.start(job)
        except Declined as declined:
            return Rejected(declined.problem)
        live.listed_by = runner
        return Accepted(runner.facts.process)

    async def _pivot(self, runner: Runner, job: Job, _live: LiveJob) -> Input:
        try:
            await runner.pivot(job.id)
        except Declined as declined:
            return PivotDeclined(declined.problem)
        return PivotTaken()

    async def _finalize(self, runner: Runner, job: Job, live: LiveJob) -> None:
        if live.hindrance is None:
            live.hindrance = await self._hindrance(runner, job)
        if live.hindrance is not None:
            # QEMU would end itself where it can't write the header, hours after the plan has looked.
            log.error("merge given up", domain=job.domain, job=job.id, reason=live.hindrance)
            await runner.abort(job.id, force=True)
            return
        # Where it can't be flushed the merge ends as it always has in QEMU, and no image is deleted after it.
        # A pending job has written all that it will ever write.
        live.flushed |= await self._flushed(runner, job)
        if job.capabilities.only_flushed and not live.flushed:
            live.hindrance = f"{kind_of(job.spec).written(job.spec).file} can't be flushed, so its data could be lost"
            await self._finalize(runner, job, live)
            return
        await runner.finalize(job.id)

    async def _hindrance(self, runner: Runner, job: Job) -> str | None:
        """Why QEMU can't write the header that the job changes; None where it can, or where it has it open for that."""
        rules = kind_of(job.spec)
        file, written = rules.header_file(job.spec), rules.written(job.spec)
        overlay = next((layer for layer in job.spec.disk.layers if layer.file == file and layer.read_only), None)
        # What the job copies into is open for writing as long as it runs.
        if overlay is None or overlay == written or self._shared.clock.now() < (job.started_at or 0) + RECENT_MS:
            return None
        if not await self._unreplaced(job, (overlay.node,)):
            return f"another file is called {overlay.file} by now, whose header would be changed instead"
        words = (await runner.survey((overlay.node,))).unwritable.get(overlay.node)
        if words is None:
            return None
        return f"QEMU can't open {file} for writing by now, whose header has to change: {words}"

    async def _unreplaced(self, job: Job, nodes: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the nodes whose files are not known to be others by now, which QEMU would open in their places."""
        layers = [layer for layer in job.spec.disk.layers if layer.node in nodes and layer.identity is not None]
        if not layers:
            return nodes
        seen = await self._shared.images.identities([layer.file for layer in layers], job.control.process)
        others = {layer.node for layer in layers if seen.get(layer.file, layer.identity) != layer.identity}
        return tuple(node for node in nodes if node not in others)

    async def _flushed(self, runner: Runner, job: Job) -> bool:
        """Have all that a job wrote on the disk, where QEMU does not see to that by itself before it is finalized."""
        node = kind_of(job.spec).flushes(job.spec)
        try:
            if node:
                await runner.flush(node)
        except Declined as declined:
            log.warning("not flushed", domain=job.domain, job=job.id, node=node, error=str(declined))
            return False
        return True

    # The end ----------------------------------------------------------------------------------------------------------

    async def _gather(self, job: Job, live: LiveJob) -> Gathered | None:
        """Read what the graph shows, and the header of the overlay; None where that has to be tried again."""
        connection, process = self._connection, job.control.process
        ended = connection.is_gone(process)
        evidence = Evidence(
            process=live.sameness(connection.runner, same_process(process, connection.process)),
            ended=ended,
            watched=ended
            and live.listed_by is not None
            and not live.at_its_end
            and connection.heard_to_the_end(live.listed_by, job.id),
        )
        if job.control.verdict is not Verdict.GONE and not connection.has_ended(process):
            runner = self._usable
            if runner is None:
                return None
            disks = await self._disks_after(job)
            if disks is not None:
                disk = disk_of(job, disks) or disk_with(job, disks)
                evidence = replace(evidence, unplugged=disk is None, graph=None if disk is None else _reading(disk))
        evidence = replace(evidence, header=await self._header(job))
        if evidence.header is None and self._awaits_header(job, live):
            return None
        if not ended and self._usable is not None and kind_of(job.spec).prove(job.spec, evidence) is Proof.MERGED:
            # QEMU may have been told to finalize by somebody else, or by a service that has died since.
            return Gathered(replace(evidence, flushed=live.flushed or await self._flushed(self._usable, job)))
        return Gathered(replace(evidence, flushed=live.flushed or not kind_of(job.spec).flushes(job.spec)))

    async def _disks_after(self, job: Job) -> tuple[Disk, ...] | None:
        """The disks, or None where QEMU can't tell them any more and has told the outcome already.

        It tells of no disk at all once it has closed an image that it found to be corrupt.
        """
        try:
            return await self._disks.read()
        except Declined:
            if job.control.verdict is not Verdict.ERROR:
                raise
            return None

    def _awaits_header(self, job: Job, live: LiveJob) -> bool:
        """Whether a header that could be read before the job may still be read: an error now may pass."""
        if kind_of(job.spec).header_file(job.spec) is None or not job.spec.header_seen:
            return False
        now = self._shared.clock.monotonic()
        if live.header_due is None:
            live.header_due = now + HEADER_S
        return now < live.header_due

    async def _header(self, job: Job) -> HeaderReading | None:
        file = kind_of(job.spec).header_file(job.spec)
        if file is None:
            return None
        process = None if self._connection.has_ended(job.control.process) else job.control.process
        return await self._shared.images.read_header(file, job.spec.disk.image(file).identity, process)

    async def _sees_as_qemu_did(self, job: Job) -> bool:
        """Whether what the job wrote to, there as long as its disk, has the same name for the service as for QEMU.

        Without that a file that can't be found is not known to be gone.
        """
        file = kind_of(job.spec).written(job.spec).file
        seen = await self._shared.images.identities([file], None)
        return file in seen and seen[file] == job.spec.disk.image(file).identity

    async def _is_on_the_disk(self, job: Job) -> bool:
        """Whether the host may lose its power now: the old header, which names the merged images, would come back.

        QEMU's own flush does nothing where it was told to (`cache.no-flush`).
        """
        process = None if self._connection.has_ended(job.control.process) else job.control.process
        files = (kind_of(job.spec).written(job.spec).file, kind_of(job.spec).header_file(job.spec))
        synced = [
            await self._shared.images.sync(file, job.spec.disk.image(file).identity, process)
            for file in dict.fromkeys(files)
            if file is not None and file.startswith("/")
        ]
        return all(synced)

    async def _clean_up(self, job: Job, live: LiveJob) -> CleanedUp | None:
        judgement = job.control.judgement
        assert judgement is not None
        tidy = kind_of(job.spec).cleanup(job.spec, judgement)
        # Whatever is deleted, and whatever QEMU forgets, is so after the comparison.
        verdict = self._verdict_of(job, live, tidy.compared, tidy.compared_size) if tidy.compared else (None, None)
        if verdict is None:
            return None
        problem, verified = verdict
        tidy = tidy if problem is None else tidy.without_deletions("the comparison has failed")
        completed = judgement.state is State.COMPLETED
        ended = job.control.verdict is Verdict.GONE or self._connection.is_gone(job.control.process)
        chain = tidy.chain
        if ended:
            if completed and self._connection.runner is None:
                self._disks.forget(job.disk)
        else:
            runner = self._usable
            if runner is None:
                return None
            # Until it is dismissed, a job below the active layer holds the nodes that it has merged. Its outcome is
            # stored, so nothing is lost if the service ends in between: all of this is done again then.
            await runner.conclude(job.id, tidy.release, await self._unreplaced(job, tidy.read_only))
            # Read since the job has concluded: to judge it, or over a new connection. No layer of a chain is released.
            disk = disk_of(job, self._disks.known)
            chain = disk.files if disk else tidy.chain
        # Whoever is told of `completed` may delete the merged images at once. Nobody is made to wait for what a guest
        # writes to a live base where nothing is deleted.
        lasting = tidy.to_delete or kind_of(job.spec).header_file(job.spec)
        if completed and lasting and not await self._is_on_the_disk(job):
            written = kind_of(job.spec).written(job.spec).file
            why = f"what was merged into {written}, or the header that leads there, is not known to be on the disk"
            tidy = tidy.without_deletions(why)
        deleted, left = await self._delete(job, tidy.to_delete, ended=ended)
        result = Result(chain=chain, invalidated=tidy.invalidated, deleted=deleted, not_deleted=tidy.not_deleted + left)
        return CleanedUp(replace(result, verified=verified, unused=tidy.unused), problem)

    async def _delete(
        self, job: Job, files: Mapping[str, Image], *, ended: bool
    ) -> tuple[tuple[str, ...], tuple[NotDeleted, ...]]:
        """Delete what was merged, once more after a restart: (deleted, not deleted). `ended`: the job's QEMU has."""
        if not files:
            return (), ()
        if ended and not await self._sees_as_qemu_did(job):
            why = "QEMU saw other files under these names than the service does, and has ended"
            return (), tuple(NotDeleted(file=file, reason=why) for file in files)
        await self._shared.known.refresh()
        # Snapshots may have been taken since, also while nobody was here, and be called as merged files were.
        disks = () if self._connection.runner is None else await self._disks.read()
        process = job.control.process
        holders = await self._shared.known.holders(tuple(files.values()), process)
        if (why := await self._clones(job, files, disks)) is not None:
            return (), tuple(NotDeleted(file=file, reason=why) for file in files)

        def in_use(image: Image) -> str | None:
            if image in holders:
                return holders[image].name
            own = next((disk for disk in disks if has_image(disk, image)), None)
            if own is not None:
                return f"{job.domain}/{own.name} now"
            user = self._shared.known.user_of(image, job.domain, Disk(name=job.disk))
            return None if user is None else user.name

        since = job.control.judged_at if ended else None
        return await self._shared.images.unlink(files, process, in_use, since)

    async def _clones(self, job: Job, files: Mapping[str, Image], disks: tuple[Disk, ...]) -> str | None:
        """Why the files are left: others may have been made over them while the job ran, of which nobody has told."""
        own = [layer.image for layer in job.spec.disk.layers]
        own += [Image.of(layer) for disk in disks for layer in disk.layers]
        found = await strangers_on(self._shared, tuple(files.values()), own)
        if found.files:
            return f"the header of {found.files[0].path} leads to what was merged"
        return None if found.complete else "there was no time to look for overlays on it in image_roots"

    def _verdict_of(
        self, job: Job, live: LiveJob, layers: tuple[LayerRecord, ...], size: int
    ) -> tuple[Problem | None, int | None] | None:
        """What the comparison of a job's images has shown: why they differ, or how many bytes are the same.

        None while it goes on: it may take hours, in which the domain's other jobs are looked at.
        """
        if live.comparison is None:
            process = None if self._connection.has_ended(job.control.process) else job.control.process
            live.comparison = asyncio.create_task(self._shared.images.compare(layers, process, size=size))
            live.comparison.add_done_callback(lambda _done: self._wake())
        if not live.comparison.done():
            return None
        why = live.comparison.result()
        if why is None:
            return None, min(size, layers[0].virtual_size)
        detail = f"{layers[-1].file} does not show what the merged layers show: {why}; nothing was deleted"
        return Problem(code=Code.VERIFICATION_FAILED, detail=detail, extra={"file": layers[-1].file}), None


def _reading(disk: Disk) -> GraphReading:
    identities = tuple(layer.identity for layer in disk.layers)
    return GraphReading(nodes=disk.nodes, files=disk.files, identities=identities)
