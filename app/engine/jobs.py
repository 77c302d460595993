"""A domain's unfinished jobs: every change of one is stepped, stored, and acted upon, in this order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import structlog

from app.core.images import Image, Resource
from app.core.job import Job, adopted
from app.core.kinds import adopt, kind_of
from app.core.machine.inputs import Gone, Input, Launch
from app.core.machine.step import Step, StoredVersion
from app.core.machine.table import start_job, step
from app.core.marks import mark_change
from app.core.reconcile import leftovers, orphans, reconcile
from app.core.states import WITH_QEMU, Command, DataState, EventType, Intent, OnReady, State
from app.engine.connection import MonitorConnection
from app.engine.disks import DomainDisks
from app.engine.executor import Executor, LiveJob
from app.engine.ports.driver import MonitorError, Runner
from app.engine.ports.journal import IdempotencyKey, JobConflict, JournalError, NewJob
from app.engine.ports.outbox import Webhook
from app.engine.shared import Shared

log = structlog.get_logger(__name__)

PROGRESS_S: Final = 0.5
"""The fewest seconds between two reports of a job's progress."""

AT_ITS_END: Final = frozenset({"waiting", "pending", "concluded", "aborting", "null"})
"""Statuses of a job (QAPI `JobStatus`) that is about to take effect, or has."""

READING: Final = frozenset({Command.GATHER})
"""Commands that change nothing anywhere."""


class DomainJobs:
    """The unfinished jobs of one domain. Only the domain's actor calls it.

    `look_soon` says that QEMU is to be asked again without waiting for the next poll.
    """

    def __init__(
        self,
        shared: Shared,
        connection: MonitorConnection,
        executor: Executor,
        *,
        disks: DomainDisks,
        jobs: tuple[Job, ...],
        wake: Callable[[], None],
    ) -> None:
        self.look_soon = False
        self._shared = shared
        self._connection = connection
        self._disks = disks
        self._executor = executor
        self._wake = wake
        self._live = {job.id: LiveJob(job) for job in jobs}
        self._orphans: list[str] = []
        for job in jobs:
            shared.live[job.id] = job
            self._place(job)

    def all(self) -> tuple[Job, ...]:
        """The unfinished jobs, oldest first."""
        return tuple(live.job for live in self._live.values())

    @property
    def needs_polling(self) -> bool:
        """Whether there is something to look at again without being told to."""
        return bool(self._live or self._orphans)

    async def find(self, job_id: str) -> Job | None:
        """A job of any state."""
        live = self._live.get(job_id)
        return live.job if live else await self._shared.journal.job(job_id)

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

        Raises `JobConflict` and `JournalError`; there is no job then.
        """
        first = start_job(job)
        if self._shared.budget.claim(job.id, self._wake):
            first = first.then(step(job, Launch(self._connection.process), self._shared.clock.now()))
        try:
            claims = kind_of(job.spec).claims(job.spec, job.domain, job.disk)
            new = NewJob(versions=first.versions, claims=claims, key=key, callback=callback)
            await self._shared.journal.add_jobs([new])
        except BaseException:
            self._shared.budget.leave(job.id)
            raise
        job = self._keep(first.job)
        if not first.commands:
            return job
        live = self._live[job.id]
        live.planned_now = True
        try:
            # While it starts there is nothing to see.
            result = await self._executor.carry_out(job, live, Command.START)
            return await self.advance(job, result) if result is not None else job
        except JournalError as error:
            # The job is in the journal as starting; the next look finds out what became of it.
            log.error("journal full", domain=job.domain, job=job.id, error=str(error))
            return job

    async def advance(self, job: Job, event: Input) -> Job:
        """Step, store, act, and go on with what comes of it.

        Where all that is to be done is to read, what follows from that is stored together with what led to it: a crash
        in between leaves the job as it was, to be seen and read again. Raises `Refused` and `JournalError`; nothing has
        changed then.
        """
        live = self._live.get(job.id) or LiveJob(job)
        job = stored = live.job
        events: deque[Input] = deque([event])
        unstored: list[tuple[Step, Input]] = []
        while events or unstored:
            commands: tuple[Command, ...] = ()
            moved = False
            if events:
                event = events.popleft()
                following = step(job, event, self._shared.clock.now())
                job, commands, moved = following.job, following.commands, bool(following.versions)
                unstored.append((following, event))
            if not commands or not READING.issuperset(commands):
                await self._store(stored, unstored)
                unstored.clear()
                stored = job
            for command in commands:
                # A command that is only sent again shows its effect at a poll, or by an event.
                self.look_soon |= command is Command.FINALIZE or (moved and command is not Command.START)
                result = await self._executor.carry_out(job, live, command)
                if result is not None:
                    events.append(result)
        return job

    async def _store(self, before: Job, steps: Sequence[tuple[Step, Input]]) -> None:
        versions = [version for following, _ in steps for version in following.versions]
        if versions:
            shared, domain = self._shared, self._connection.domain
            uses = shared.known.unrecorded(domain, shared.clock.now())
            # Whoever starts the domain from its registration gets the image that has the guest's data.
            moved = self._disks.moved(versions[-1].job)
            marks = mark_change(before.data_state, versions[-1].job)
            await shared.journal.store(versions, uses=uses, marks=marks, registration=moved)
            shared.known.recorded(uses)
            if moved is not None:
                self._disks.registration = moved
        for following, event in steps:
            self._shared.recovery.note(self._keep(following.job), event)

    def _keep(self, job: Job) -> Job:
        if job.ended:
            self._live.pop(job.id, None)
            self._shared.live.pop(job.id, None)
            self._shared.budget.leave(job.id)
        else:
            live = self._live.setdefault(job.id, LiveJob(job))
            live.job = self._shared.live[job.id] = job
            self._place(job)
        self._shared.hub.note_move()
        return job

    def _place(self, job: Job) -> None:
        """See to it that a job has a place if it works, and none while it waits for a person."""
        if job.state is State.READY and job.on_ready is OnReady.WAIT and job.control.intent is Intent.RUN:
            self._shared.budget.leave(job.id)
        elif job.state is not State.QUEUED:
            self._shared.budget.occupy(job.id)

    # Looking ----------------------------------------------------------------------------------------------------------

    async def look(self) -> None:
        """Bring the journal's jobs and QEMU's together. Raises what a runner's call raises, and `JournalError`."""
        self.look_soon = False
        await self.find_gone()
        runner = self._connection.usable
        if runner is None:
            return
        if self._orphans:
            await self._adopt(runner)
        if any(job.state is not State.QUEUED for job in self.all()):
            await self._observe(runner)
        for job in self.all():
            if job.state is State.QUEUED and self._shared.budget.claim(job.id, self._wake):
                # One that does not answer is found out before the job counts as one that may have been started.
                await runner.guest()
                await self.advance(job, Launch(self._connection.process))

    async def find_gone(self) -> None:
        """Where the QEMU process has ended, so have its jobs; an unreachable one may still be at work.

        Another QEMU that answers in its place says nothing of them.
        """
        for job in self.all():
            process = job.control.process
            if self._connection.is_another(process) and self._connection.is_gone(process):
                await self._end_with_qemu(job)

    async def _end_with_qemu(self, job: Job) -> Job:
        said = self._connection.final_reports.get(job.id)
        if said is not None and job.state in (*WITH_QEMU, State.STARTING):
            # QEMU told of the job's end before its own; nobody could ask it about that any more.
            job = await self.advance(job, said)
        return job if job.ended else await self.advance(job, Gone())

    async def find_orphans(self) -> None:
        """Of a QEMU that has just been connected to: which of its jobs are ours.

        Those whose end is stored are forgotten: the service died before it could say so. Those without a record are
        adopted at the next look.
        """
        runner = self._connection.require()
        seen = await runner.observe()
        records = {id_: job for id_ in seen if (job := await self.find(id_)) is not None}
        for id_ in leftovers(seen, records):
            await runner.conclude(id_)
        self._orphans = orphans(seen, records)

    async def _adopt(self, runner: Runner) -> None:
        todo, self._orphans = self._orphans, []
        domain = self._connection.domain
        for id_ in todo:
            try:
                orphan = await runner.orphan(id_)
                plan = adopt(orphan) if orphan is not None else None
                if plan is None:
                    self._shared.recovery.unknown(id_, domain)
                    continue
                now, process = self._shared.clock.now(), runner.facts.process
                job = adopted(plan, id_=id_, domain=domain, process=process, now=now)
                # The marks first: a record without them would promise that the layers are right.
                if (marks := mark_change(DataState.UNTOUCHED, job)) is not None:
                    await self._shared.journal.change_marks(marks)
                claims = kind_of(job.spec).claims(job.spec, domain, job.disk)
                new = NewJob(versions=[StoredVersion(EventType.ADOPTED, job)], claims=claims)
                await self._shared.journal.add_jobs([new])
            except (MonitorError, JobConflict, JournalError) as error:
                # The journal may have another unfinished job on this disk, whose end is to be found first.
                log.warning("not adopted yet", domain=domain, job=id_, error=str(error))
                self._orphans.append(id_)
            else:
                self._shared.recovery.adopted(self._keep(job))

    async def _observe(self, runner: Runner) -> None:
        now = self._shared.clock.monotonic()
        process = self._connection.process
        seen = dict(await runner.observe())
        for id_, live in self._live.items():
            if id_ in seen:
                live.listed_by = runner
                live.at_its_end |= seen[id_].status in AT_ITS_END
                seen[id_] = replace(live.metered(seen[id_], now), process=process)
            elif id_ in runner.final_reports and live.job.state in WITH_QEMU:
                # Another client has had QEMU forget it, which has told of its end before.
                seen[id_] = runner.final_reports[id_]
        # A QEMU that lives on without its monitor goes on with its jobs, and so may one that can't be looked at now.
        asked = [
            job
            for job in self.all()
            if not self._connection.is_another(job.control.process) or self._connection.has_ended(job.control.process)
        ]
        for job, event in reconcile(asked, seen, process):
            after = await (self._end_with_qemu(job) if isinstance(event, Gone) else self.advance(job, event))
            self._tell_progress(job, after, now)

    def _tell_progress(self, before: Job, after: Job, now: float) -> None:
        live = self._live.get(after.id)
        moved = after.version == before.version and after.progress != before.progress
        # Hints and requests make looks more frequent than what is promised to subscribers.
        if live is not None and moved and after.state in WITH_QEMU and now >= live.progress_due:
            live.progress_due = now + PROGRESS_S
            self._shared.publish_progress(after)


def named(resource: Resource | None, disk: str) -> str:
    """What two jobs have claims on, in words."""
    return f"the image {resource.path}" if isinstance(resource, Image) else f"the disk {disk}"
