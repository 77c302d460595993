"""A domain's actor: it alone talks to the domain's monitor and moves the domain's jobs.

One task takes requests, hints and the clock's ticks in turn, so nothing in a domain needs a lock, and a QEMU that
hangs delays only its own domain.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import structlog

from app.core.chain import Disk
from app.core.errors import Code, Problem, Refused
from app.core.flags import CommitFlag
from app.core.job import Job, State
from app.core.machine.inputs import Input
from app.core.machine.table import step
from app.core.plan import CommitRequest, Facts, Plan, choose_layers, plan_commit
from app.core.reconcile import valid_layers
from app.engine.connection import Change, MonitorConnection
from app.engine.disks import DomainDisks, disk_of
from app.engine.jobs import DomainJobs
from app.engine.ports.driver import MonitorError
from app.engine.ports.events import DomainEvent
from app.engine.ports.journal import IdempotencyKey, JobConflict, JournalFull, Registration
from app.engine.ports.outbox import Webhook
from app.engine.shared import Shared
from app.engine.views import DiskView, DomainState, DomainView

log = structlog.get_logger(__name__)

POLL: Final = 0.5
"""Seconds between two looks at running jobs; QEMU has no event for progress, and two reports a second are promised."""

INBOX: Final = 256
"""Requests that may wait for one domain."""

T = TypeVar("T")


@dataclass(slots=True)
class _Request:
    run: Callable[[], Awaitable[object]]
    answer: asyncio.Future[object]


class Actor:
    """One domain: its connection, its disks, its unfinished jobs, and those who wait for an answer."""

    def __init__(self, registration: Registration, shared: Shared, jobs: tuple[Job, ...] = ()) -> None:
        self.registration = registration
        self.connection = MonitorConnection(
            registration, shared.driver, shared.clock, hint=self._hinted, on_progress=self._on_progress
        )
        self.disks = DomainDisks(registration, self.connection, shared.images)
        self._shared = shared
        self._jobs = DomainJobs(shared, self.connection, self.disks, jobs, self.wake)
        self._inbox: deque[_Request] = deque()
        self._woken = asyncio.Event()
        self._next_look = 0.0
        self._stopping = False

    # From outside -----------------------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The domain's id."""
        return self.registration.id

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The domain's unfinished jobs."""
        return self._jobs.all()

    def view(self) -> DomainView:
        """The domain as it is known now; never waits."""
        facts = self.connection.facts
        return DomainView(
            id=self.id,
            name=(facts.name if facts else None) or self.id,
            uuid=facts.uuid if facts else None,
            state=self.connection.state(),
            version=facts.version if facts else None,
            pid=facts.process.pid if facts else None,
            managed_by=facts.managed_by if facts else None,
            error=self.connection.error,
            disks=tuple(disk.name for disk in self.disks.known),
        )

    async def call(self, run: Callable[[], Awaitable[T]]) -> T:
        """Have the actor do `run` between its other work; what it raises is raised here.

        Raises `Refused` where too many requests wait already, and at shutdown.
        """
        if len(self._inbox) >= INBOX:
            raise Refused(
                Problem(code=Code.TOO_MANY_REQUESTS, detail=f"{INBOX} requests wait for {self.id}; slow down")
            )
        if self._stopping:
            raise Refused(_SHUTTING_DOWN)
        answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._inbox.append(_Request(run, answer))
        self._woken.set()
        return await answer  # pyright: ignore[reportReturnType] - the future carries what `run` returns

    def wake(self) -> None:
        """Have the actor look at its domain soon."""
        self._jobs.look_soon = True
        self._woken.set()

    def _on_progress(self) -> None:
        self._woken.set()

    def _hinted(self) -> None:
        if not self.jobs:
            # The guest may have been stopped, or run again.
            self.connection.probe_soon()
        self.wake()

    def stop(self) -> None:
        """Have `run` return when what is being done is done."""
        self._stopping = True
        self._woken.set()

    # The loop ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until `stop`."""
        try:
            if self.registration.address is None:
                # No attempt to connect will ever have it read, and others' merges must not touch its images.
                await self.disks.read_offline()
                self.connection.tried.set()
            while not self._stopping:
                self.connection.begin()
                await self._wait()
                if self.connection.pending:
                    await self._changed(await self.connection.end())
                await self._serve_inbox()
                await self._handle_monitor_error()
                if self._jobs.look_soon or self._shared.clock.monotonic() >= self._next_look:
                    await self._look()
                    await self._handle_monitor_error()
        finally:
            await self.connection.close()
            self._jobs.release()
            for request in self._inbox:
                if not request.answer.done():
                    request.answer.set_exception(Refused(_SHUTTING_DOWN))

    async def _wait(self) -> None:
        if self._jobs.needs_polling:
            self._next_look = min(self._next_look, self._shared.clock.monotonic() + POLL)
        if not (self._inbox or self._jobs.look_soon or self.connection.pending or self._stopping):
            until = min(self._next_look, self.connection.deadline)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, until - self._shared.clock.monotonic())):
                    await self._woken.wait()
        self._woken.clear()

    async def _handle_monitor_error(self) -> None:
        monitor_error, self._jobs.monitor_error = self._jobs.monitor_error, None
        if monitor_error is not None:
            await self._changed(await self.connection.fail(monitor_error))

    async def _changed(self, change: Change | None) -> None:
        match change:
            case Change.CONNECTED:
                await self._welcome()
            case Change.FAILED | Change.LOST:
                if change is Change.LOST:
                    self._jobs.unqueue()
                    await self._tell(DomainEvent.DISCONNECTED)
                if self.connection.state() is DomainState.SHUTOFF:
                    await self.disks.read_offline()
                with suppress(JournalFull):
                    await self._jobs.find_gone()
                self.connection.tried.set()
            case Change.HUNG:
                await self._tell(DomainEvent.DISCONNECTED)
            case Change.AWAKE:
                self._jobs.look_soon = True
                await self._tell(DomainEvent.CONNECTED)
            case None:
                pass

    async def _welcome(self) -> None:
        self._jobs.look_soon = True
        try:
            guest_running = await self.connection.require().guest_running()
            await self.disks.read()
            self.connection.welcome(guest_running=guest_running)
            await self._jobs.find_orphans()
        except MonitorError as error:
            self._jobs.monitor_error = error
        self.connection.tried.set()
        await self._tell(DomainEvent.CONNECTED)

    async def _tell(self, event: DomainEvent) -> None:
        try:
            await self._shared.journal.tell_domain(event, self.id, self._shared.render.domain(self.view()))
        except JournalFull as error:
            log.error("event not stored", domain=self.id, event_type=event.value, error=str(error))

    async def _look(self) -> None:
        self._jobs.look_soon = False
        try:
            await self._jobs.look()
        except MonitorError as error:
            self._jobs.monitor_error = error
        except JournalFull as error:
            # Nothing was stored, so nothing was done: the same is seen and tried again at the next look.
            log.error("journal full", domain=self.id, error=str(error))
        # Beside a domain without jobs nothing is done until something happens there; `_wait` sees to those with jobs.
        self._next_look = float("inf")

    async def _serve_inbox(self) -> None:
        while self._inbox:
            request = self._inbox.popleft()
            try:
                answer = await request.run()
            except MonitorError as error:
                await self._changed(await self.connection.fail(error))
                _fail(request, Refused(self.connection.refusal(error)))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the caller's to see
                _fail(request, error)
            else:
                if not request.answer.done():
                    request.answer.set_result(answer)

    # Requests, run by `call` ------------------------------------------------------------------------------------------

    async def read_disk_views(self) -> list[DiskView]:
        """Every disk, read now. Raises `Refused` where the monitor can't be asked."""
        return [await self._disk_view(disk) for disk in await self.disks.read()]

    async def read_disk_view(self, name: str) -> DiskView:
        """The disk that answers to `name`, read now."""
        return await self._disk_view(await self.disks.find(name))

    async def _disk_view(self, disk: Disk) -> DiskView:
        unfinished = self._jobs_on(disk)
        ended = await self._shared.journal.modified_chains(self.id, disk.name)
        current = unfinished[0].id if unfinished else next(iter(disk.running_jobs), None)
        return DiskView(disk=disk, valid=valid_layers(disk, [*unfinished, *ended]), job=current)

    def _jobs_on(self, disk: Disk) -> list[Job]:
        return [job for job in self.jobs if disk_of(job, (disk,)) is not None]

    async def plan(self, name: str, request: CommitRequest, *, exact: bool) -> Plan:
        """What a commit would do; raises `Refused` for the first check that fails, in the contract's order.

        `exact`: read the images' maps, as a person wants to see; else only where the layers' sizes leave a doubt.
        """
        self._check_usable()
        disk = await self.disks.find(name)
        images, process = self._shared.images, self.connection.process
        names = [text for text in (request.top, request.base) if text is not None]
        chosen = choose_layers(
            disk,
            request,
            identities=await images.identities(names, process) if names else None,
            conflict=next((job.id for job in self._jobs_on(disk)), None),
        )
        if isinstance(chosen, Problem):
            raise Refused(chosen)
        base, delete = chosen.base_layer, CommitFlag.DELETE in request.flags
        await self._shared.read_off()
        to_delete = {layer.file: layer.identity for layer in chosen.merged if delete}
        locked, free, is_device, undeletable = await asyncio.gather(
            images.locked(base.file, process),
            images.free_bytes(base.file, process),
            images.is_device(base.file, process),
            images.undeletable(to_delete, process),
        )
        facts = Facts(
            shared_with=self._shared.base_user(self.id, disk, base),
            locked=locked,
            free=free,
            base_is_device=is_device,
            undeletable=undeletable,
        )
        plan = plan_commit(chosen, facts)
        doubtful = isinstance(plan, Problem) and plan.code is Code.INSUFFICIENT_STORAGE
        if doubtful or (exact and isinstance(plan, Plan)):
            measure = await images.measure(chosen, process)
            if measure is not None:
                measured = replace(facts, bytes_to_copy=measure.bytes_to_copy, new_bytes=measure.new_bytes)
                plan = plan_commit(chosen, measured)
        if isinstance(plan, Problem):
            raise Refused(plan)
        return plan

    def _check_usable(self) -> None:
        facts = self.connection.facts
        if facts is not None and facts.managed_by is not None and not self.registration.allow_managed:
            raise Refused(
                Problem(
                    code=Code.DOMAIN_MANAGED_ELSEWHERE,
                    detail=f"the domain {self.id} belongs to {facts.managed_by}, which would not learn of the change; "
                    "use its tools, or register the domain with `allow_managed: true`",
                )
            )
        if self.connection.state() is DomainState.SHUTOFF:
            raise Refused(
                Problem(
                    code=Code.NOT_SUPPORTED,
                    detail=f"the domain {self.id} is off, and this version merges layers of running domains only; "
                    "start the domain",
                )
            )
        missing = self.connection.require().facts.missing
        if missing:
            raise Refused(
                Problem(
                    code=Code.NOT_SUPPORTED,
                    detail=f"the program behind the monitor of {self.id} lacks the commands {', '.join(missing)}",
                )
            )

    async def commit(
        self,
        name: str,
        request: CommitRequest,
        who: str,
        key: IdempotencyKey | None = None,
        callback: Webhook | None = None,
    ) -> Job:
        """Plan a commit, store its job, and start it if it has a place. Raises `Refused`, also with QEMU's refusal."""
        plan = await self.plan(name, request, exact=False)
        job = plan.job(id_=self._shared.new_id(), domain=self.id, requested_by=who, now=self._shared.clock.now())
        try:
            job = await self._jobs.add(job, key, None if callback is None else replace(callback, job_id=job.id))
        except JobConflict as conflict:
            raise Refused(
                Problem(
                    code=Code.JOB_CONFLICT,
                    detail=f"the job {conflict.job_id} works on the disk {job.disk}; wait for its end, or abort it",
                    extra={"job": conflict.job_id},
                )
            ) from None
        refused = refusal_of(job)
        if refused is not None:
            raise Refused(refused)
        return job

    async def steer(self, job_id: str, event: Input) -> tuple[Job, bool]:
        """Pass a person's wish to a job: (the job, whether it had an effect). Raises `Refused`."""
        job = await self._jobs.find(job_id)
        if job is None:
            raise Refused(Problem(code=Code.JOB_NOT_FOUND, detail=f"there is no job {job_id}"))
        # A wish that does not fit is refused before the monitor's state is.
        step(job, event, 0)
        if job.state is not State.QUEUED and not job.ended:
            self.connection.require()
            if not self.connection.is_with(job.process):
                raise Refused(
                    Problem(
                        code=Code.MONITOR_UNREACHABLE,
                        detail=f"another QEMU answers as {self.id} by now, and the one with the job {job.id} can't be "
                        "reached; the outcome is read from the images once it has ended",
                    )
                )
        after = await self._jobs.advance(job, event)
        return after, after.version != job.version


def refusal_of(job: Job) -> Problem | None:
    """How the request for a job is refused that QEMU did not even start; None for any other job."""
    if job.state is not State.FAILED or job.error is None or job.started_at is not None:
        return None
    return replace(job.error, extra={**job.error.extra, "job": job.id})


def _fail(request: _Request, error: Exception) -> None:
    if not request.answer.done():
        request.answer.set_exception(error)


_SHUTTING_DOWN = Problem(code=Code.SHUTTING_DOWN, detail="the service is shutting down")
