"""A domain's unfinished jobs: every change of one is stepped, stored, and acted upon, in this order."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final

import structlog

from app.core.adopt import adopt
from app.core.errors import Code, Problem
from app.core.job import (
    WITH_QEMU,
    Command,
    EventType,
    Intent,
    Job,
    JobType,
    NotDeleted,
    Proof,
    Result,
    State,
    Verdict,
)
from app.core.machine.inputs import (
    Accepted,
    Checked,
    CleanedUp,
    CompleteDeclined,
    CompleteTaken,
    Gone,
    Input,
    Launch,
    Observed,
    Rejected,
)
from app.core.machine.reports import Step, StoredVersion
from app.core.machine.table import start_job, step
from app.core.progress import Meter
from app.core.reconcile import leftovers, prove, prove_by_header, reconcile, strays
from app.engine.connection import MonitorConnection
from app.engine.disks import DomainDisks, disk_of
from app.engine.ports.driver import Declined, MonitorError, Runner
from app.engine.ports.journal import IdempotencyKey, JobConflict, JournalFull
from app.engine.ports.outbox import Webhook
from app.engine.shared import Shared

log = structlog.get_logger(__name__)

PROGRESS: Final = 0.5
"""The fewest seconds between two reports of a job's progress."""


READING: Final = frozenset({Command.CHECK_CHAIN, Command.CHECK_IMAGES})
"""Commands that change nothing anywhere."""


class DomainJobs:
    """The unfinished jobs of one domain. Only the domain's actor calls it.

    `monitor_error` is what a monitor's call has met in the middle of a job's move. The actor deals with it afterwards,
    as that may move jobs in turn. `look_soon` says that QEMU is to be asked again without waiting for the next poll.
    """

    def __init__(
        self,
        shared: Shared,
        connection: MonitorConnection,
        disks: DomainDisks,
        jobs: tuple[Job, ...],
        wake: Callable[[], None],
    ) -> None:
        self.monitor_error: MonitorError | None = None
        self.look_soon = False
        self._shared = shared
        self._connection = connection
        self._disks = disks
        self._wake = wake
        self._jobs = {job.id: job for job in jobs}
        self._planned_now: set[str] = set()
        self._on_disk: set[str] = set()
        self._strays: list[str] = []
        self._meters: dict[str, Meter] = {}
        self._progress_due: dict[str, float] = {}
        self._paused_since: dict[str, float] = {}
        self._carry: Final[dict[Command, Callable[[Runner, Job], Awaitable[Input | None]]]] = {
            Command.START: self._start,
            Command.COMPLETE: self._complete,
            Command.CANCEL: self._cancel,
            Command.CANCEL_FORCE: self._cancel_force,
            Command.FINALIZE: self._finalize,
            Command.PAUSE: self._pause,
            Command.RESUME: self._resume,
            Command.SET_SPEED: self._set_speed,
            Command.CHECK_CHAIN: self._check_chain,
        }
        for job in jobs:
            shared.live[job.id] = job
            if job.state is not State.QUEUED:
                shared.budget.occupy(job.id)

    def all(self) -> tuple[Job, ...]:
        """The unfinished jobs, oldest first."""
        return tuple(self._jobs.values())

    @property
    def needs_polling(self) -> bool:
        """Whether there is something to look at again without being told to."""
        return bool(self._jobs or self._strays)

    async def find(self, job_id: str) -> Job | None:
        """A job of any state."""
        return self._jobs.get(job_id) or await self._shared.journal.job(job_id)

    def release(self) -> None:
        """Forget the jobs without a change to them: they go on in QEMU, and are in the journal."""
        for job in self.all():
            self._shared.live.pop(job.id, None)
            self._shared.budget.leave(job.id)

    def unqueue(self) -> None:
        """Let others pass while the domain can't be reached."""
        for job in self.all():
            if job.state is State.QUEUED:
                self._shared.budget.leave(job.id)

    async def add(self, job: Job, key: IdempotencyKey | None = None, callback: Webhook | None = None) -> Job:
        """Store a job that has just been planned, with its request's key and callback; start it if it has a place.

        Raises `JobConflict` and `JournalFull`; there is no job then.
        """
        # A job that waits is one of this QEMU's too, and ends with it.
        job = replace(job, process=self._connection.process)
        first = start_job(job)
        if self._shared.budget.claim(job.id, self._wake):
            launched = step(job, Launch(self._connection.process), self._shared.clock.now())
            first = Step(launched.job, first.told + launched.told, launched.commands)
        try:
            await self._shared.journal.add_job(first.told, key, callback)
        except BaseException:
            self._shared.budget.leave(job.id)
            raise
        job = self._keep(first.job)
        if not first.commands:
            return job
        self._planned_now.add(job.id)
        try:
            result = await self._do(job, Command.START)
            return await self.advance(job, result) if result is not None else job
        except JournalFull as error:
            # The job is in the journal as starting; the next look finds out what became of it.
            log.error("journal full", domain=job.domain, job=job.id, error=str(error))
            return job

    async def advance(self, job: Job, event: Input) -> Job:
        """Step, store, act, and go on with what comes of it.

        Where all that is to be done is to read, what follows from that is stored together with what led to it: a crash
        in between leaves the job as it was, to be seen and read again. Raises `Refused` and `JournalFull`; nothing has
        changed then.
        """
        job = self._jobs.get(job.id, job)
        events: deque[Input] = deque([event])
        unstored: list[tuple[Step, Input]] = []
        while events or unstored:
            commands: tuple[Command, ...] = ()
            if events:
                event = events.popleft()
                following = step(job, event, self._shared.clock.now())
                job, commands = following.job, following.commands
                unstored.append((following, event))
            if not commands or not READING.issuperset(commands):
                await self._store(unstored)
                unstored.clear()
            for command in commands:
                result = await self._do(job, command)
                if result is not None:
                    events.append(result)
        return job

    async def _store(self, steps: Sequence[tuple[Step, Input]]) -> None:
        told = [each for following, _ in steps for each in following.told]
        if told:
            await self._shared.journal.store(told)
        for following, event in steps:
            self._shared.recovery.note(self._keep(following.job), event)

    def _keep(self, job: Job) -> Job:
        if job.ended:
            self._jobs.pop(job.id, None)
            self._shared.live.pop(job.id, None)
            self._shared.budget.leave(job.id)
            self._meters.pop(job.id, None)
            self._progress_due.pop(job.id, None)
            self._paused_since.pop(job.id, None)
            self._planned_now.discard(job.id)
            self._on_disk.discard(job.id)
        else:
            self._jobs[job.id] = self._shared.live[job.id] = job
        self._shared.hub.note_move()
        return job

    # Looking ----------------------------------------------------------------------------------------------------------

    async def look(self) -> None:
        """Bring the journal's jobs and QEMU's together. Raises what a monitor's call raises, and `JournalFull`."""
        self.look_soon = False
        monitor = self._connection.usable
        if monitor is None:
            await self.find_gone()
            return
        await self.find_gone()
        if self._strays:
            await self._adopt(monitor)
        if any(job.state is not State.QUEUED for job in self.all()):
            await self._observe(monitor)
        for job in self.all():
            if job.state is State.QUEUED and self._shared.budget.claim(job.id, self._wake):
                await self.advance(job, Launch(self._connection.process))

    async def find_gone(self) -> None:
        """Where the QEMU process has ended, so have its jobs; an unreachable one may still be at work.

        Another QEMU that answers in its place says nothing of them.
        """
        for job in self.all():
            if not self._connection.is_with(job.process) and self._connection.is_gone(job.process):
                await self._end_with_qemu(job)

    async def _end_with_qemu(self, job: Job) -> Job:
        said = self._connection.final_reports.get(job.id)
        if said is not None and job.state in WITH_QEMU:
            # QEMU told of the job's end before its own; nobody could ask it about that any more.
            await self.advance(job, said)
        return await self.advance(job, Gone())

    async def find_orphans(self) -> None:
        """Of a QEMU that has just been connected to: which of its jobs are ours.

        Those whose end is stored are forgotten: the service died before it could say so. Those without a record are
        adopted at the next look.
        """
        monitor = self._connection.require()
        seen = await monitor.observe()
        records = {id_: job for id_ in seen if (job := await self.find(id_)) is not None}
        for id_ in leftovers(seen, records):
            await monitor.conclude(id_)
        self._strays = strays(seen, records)

    async def _adopt(self, monitor: Runner) -> None:
        todo, self._strays = self._strays, []
        for id_ in todo:
            try:
                stray = await monitor.orphan(id_)
                if stray is None:
                    self._shared.recovery.unknown(id_, self._connection.domain)
                    continue
                now, process = self._shared.clock.now(), monitor.facts.process
                job = adopt(stray, id_=id_, domain=self._connection.domain, process=process, now=now)
                await self._shared.journal.add_job([StoredVersion(EventType.ADOPTED, job)])
            except (MonitorError, JobConflict, JournalFull) as error:
                # The journal may have another unfinished job on this disk, whose end is to be found first.
                log.warning("not adopted yet", domain=self._connection.domain, job=id_, error=str(error))
                self._strays.append(id_)
            else:
                self._shared.budget.occupy(id_)
                self._shared.recovery.adopted(self._keep(job))

    async def _observe(self, monitor: Runner) -> None:
        now = self._shared.clock.monotonic()
        seen = {id_: self._metered(id_, state, now) for id_, state in (await monitor.observe()).items()}
        for job in self.all():
            if job.id not in seen and job.id in monitor.final_reports and job.state in WITH_QEMU:
                # Another client has had QEMU forget it, which has told of its end before.
                seen[job.id] = monitor.final_reports[job.id]
        # A QEMU that lives on without its monitor goes on with its jobs.
        asked = [
            job
            for job in self.all()
            if self._connection.is_with(job.process) or not self._connection.is_alive(job.process)
        ]
        for job, event in reconcile(asked, seen, self._connection.process):
            after = await (self._end_with_qemu(job) if isinstance(event, Gone) else self.advance(job, event))
            moved = after.version == job.version and after.progress != job.progress
            # Hints and requests make looks more frequent than what is promised to subscribers.
            if moved and after.state in WITH_QEMU and now >= self._progress_due.get(job.id, 0.0):
                self._progress_due[job.id] = now + PROGRESS
                self._shared.publish_progress(after)

    def _metered(self, id_: str, seen: Observed, now: float) -> Observed:
        if id_ not in self._jobs:
            return seen
        self._meters[id_], progress = self._meters.get(id_, Meter()).measure(seen.progress, now)
        seen = replace(seen, progress=progress, process=self._connection.process)
        if seen.status not in ("paused", "standby"):
            self._paused_since.pop(id_, None)
            return seen
        since = self._paused_since.setdefault(id_, now)
        return replace(seen, paused_for=now - since)

    # Acting -----------------------------------------------------------------------------------------------------------

    async def _do(self, job: Job, command: Command) -> Input | None:
        """Carry out a command; the event that follows, or None where the next look will tell."""
        # While it starts, and is not ready or at its end, there is nothing to see but how far it is.
        self.look_soon |= command is not Command.START
        try:
            if command is Command.CHECK_IMAGES:
                return await self._check_images(job)
            if command is Command.CLEAN_UP:
                return await self._clean_up(job)
            monitor = self._connection.usable
            if monitor is None or self.monitor_error is not None:
                return None
            return await self._carry[command](monitor, job)
        except Declined as declined:
            log.warning("qemu declined", domain=job.domain, job=job.id, command=command.value, error=str(declined))
        except MonitorError as error:
            log.warning("command unanswered", domain=job.domain, job=job.id, command=command.value, error=str(error))
            self.monitor_error = error
        return None

    async def _start(self, monitor: Runner, job: Job) -> Input:
        if job.id not in self._planned_now:
            # It has waited, in the queue or over a restart: the chain may be another one by now.
            disk = disk_of(job, await self._disks.read())
            if disk is None or disk.nodes != job.work.nodes or disk.digest != job.work.digest:
                return Rejected(
                    Problem(
                        code=Code.CHAIN_CHANGED,
                        detail=f"the chain of {job.disk} is not the one that the job was accepted for; read the disk "
                        "again and send the request again",
                    )
                )
        try:
            await monitor.start(job)
        except Declined as declined:
            return Rejected(declined.problem)
        return Accepted(monitor.facts.process)

    async def _complete(self, monitor: Runner, job: Job) -> Input:
        try:
            await monitor.pivot(job.id)
        except Declined as declined:
            return CompleteDeclined(declined.problem)
        return CompleteTaken()

    async def _cancel(self, monitor: Runner, job: Job) -> None:
        await monitor.abort(job.id, force=False)

    async def _cancel_force(self, monitor: Runner, job: Job) -> None:
        await monitor.abort(job.id, force=True)

    async def _finalize(self, monitor: Runner, job: Job) -> None:
        # Where it can't be flushed the merge ends as it always has in QEMU, and no image is deleted after it.
        if await self._flushed(monitor, job):
            # A pending job has written all that it will ever write.
            self._on_disk.add(job.id)
        await monitor.finalize(job.id)

    async def _pause(self, monitor: Runner, job: Job) -> None:
        await monitor.pause(job.id)

    async def _resume(self, monitor: Runner, job: Job) -> None:
        await monitor.resume(job.id)

    async def _set_speed(self, monitor: Runner, job: Job) -> None:
        await monitor.set_speed(job.id, job.bandwidth)

    async def _check_chain(self, monitor: Runner, job: Job) -> Input:
        disk = disk_of(job, await self._disks.read())
        if disk is None:
            # It has been unplugged; what was merged below the active layer shows in a header all the same.
            return await self._check_images(job) if job.overlay else Checked(Proof.UNKNOWN)
        proof = prove(job, disk.nodes, nodes=True)
        unsure = proof is Proof.MERGED and job.type is JobType.COMMIT and job.id not in self._on_disk
        return Checked(proof, disk.files, flushed=not unsure or await self._flushed(monitor, job))

    async def _flushed(self, monitor: Runner, job: Job) -> bool:
        """Have all that is merged below the active layer on the disk: else it would be lost if QEMU were killed.

        QEMU sees to that itself before a pivot. Below the active layer it does so after it has changed the header, and
        only if it makes the base read-only again, which it is not if a merge into it was aborted before.
        """
        try:
            await monitor.flush(job.work.nodes[job.work.base])
        except Declined as declined:
            log.warning("base not flushed", domain=job.domain, job=job.id, error=str(declined))
            return False
        return True

    async def _check_images(self, job: Job) -> Input:
        below = None
        if job.overlay is not None:
            below = await self._shared.images.backing_of(job.overlay, job.work.identity(job.overlay))
        proof = prove_by_header(job, *below) if below else prove_by_header(job, None)
        return Checked(proof, flushed=False)

    async def _sees_as_qemu_did(self, job: Job) -> bool:
        """Whether the base, which is there as long as its disk, has the same name for the service as it had for QEMU.

        Without that a file that can't be found is not known to be gone.
        """
        seen = await self._shared.images.identities([job.base], None)
        return job.base in seen and seen[job.base] == job.work.identity(job.base)

    async def _clean_up(self, job: Job) -> Input | None:
        work, images = job.work, self._shared.images
        merged = job.ending is State.COMPLETED
        kept = job.intent is Intent.KEEP
        monitor = self._connection.usable
        ended = job.verdict is Verdict.GONE or self._connection.is_gone(job.process)
        if ended:
            chain = work.chain[: work.top] + work.chain[work.base :] if merged and not kept else work.chain
            if merged and self._connection.monitor is None:
                self._disks.forget(job.disk)
        elif monitor is None or self.monitor_error is not None:
            return None
        else:
            # Until it is dismissed, a job below the active layer holds the nodes that it has merged. Its outcome is
            # stored, so nothing is lost if the service ends in between: all of this is done again then.
            await monitor.conclude(job.id, work.release if merged and not kept else ())
            # Read since the job has concluded: to judge it, or over a new connection. No layer of a chain is released.
            disk = disk_of(job, self._disks.known)
            chain = disk.files if disk else work.chain
        if merged and work.deletes:
            await self._shared.read_off()
        to_delete = {file: work.identity(file) for file in work.deletes if merged}
        if ended and to_delete and not await self._sees_as_qemu_did(job):
            why = "QEMU saw other files under these names than the service does, and has ended"
            deleted, not_deleted = (), tuple(NotDeleted(file=file, reason=why) for file in to_delete)
        else:
            deleted, not_deleted = await images.unlink(to_delete, job.process, self._shared.image_user)
        invalidated = work.invalidates if merged else ()
        return CleanedUp(Result(chain=chain, invalidated=invalidated, deleted=deleted, not_deleted=not_deleted))
