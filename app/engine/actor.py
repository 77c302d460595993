"""A domain's actor: it alone talks to the domain's monitor and moves the domain's jobs.

One task takes requests, hints and the clock's ticks in turn, so nothing in a domain needs a lock, and a QEMU that
hangs delays only its own domain. Its jobs come first: a stream of requests holds up no look at a job.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import structlog

from app.core.chain import Disk
from app.core.errors import Code, Problem, Refused
from app.core.images import Image, valid_layers
from app.core.job import Job, accept, refusal_of
from app.core.kinds import Spec
from app.core.machine.inputs import Input
from app.core.machine.table import step
from app.core.plan import Plan
from app.core.states import State
from app.engine.connection import Change, MonitorConnection, Phase
from app.engine.disks import DomainDisks
from app.engine.executor import Executor
from app.engine.jobs import DomainJobs, named
from app.engine.looks import Looks
from app.engine.planning import Planner, jobs_on
from app.engine.ports.driver import MonitorError
from app.engine.ports.events import DomainEvent
from app.engine.ports.journal import IdempotencyKey, JobConflict, JournalError, Registration
from app.engine.ports.outbox import Webhook
from app.engine.rate import Throttled
from app.engine.shared import Shared
from app.engine.views import DiskView, DomainState, DomainView

log = structlog.get_logger(__name__)

WELCOME_S: Final = 1.0
"""Seconds until what a domain shows is read again, where QEMU has declined to tell it."""

INBOX: Final = 256
"""Requests that may wait for one domain."""

T = TypeVar("T")


class ActorClosed(Exception):
    """The actor takes no requests any more: its domain was forgotten, or has another actor by now."""


@dataclass(slots=True)
class _Request:
    run: Callable[[], Awaitable[object]]
    answer: asyncio.Future[object]


class Actor:
    """One domain: its connection, its disks, its unfinished jobs, and those who wait for an answer."""

    def __init__(self, registration: Registration, shared: Shared, jobs: tuple[Job, ...] = ()) -> None:
        self._woken = asyncio.Event()
        # One that tells without a pause is looked at from time to time, and holds up no other domain.
        self._hints = Throttled(self._hinted, shared.clock)
        self.connection = MonitorConnection(
            registration,
            shared.drivers[registration.driver],
            shared.clock,
            hint=self._hints.ask,
            on_progress=self._woken.set,
            has_images=lambda: bool(self.disks.off),
        )
        self.disks = DomainDisks(registration, self.connection, shared.images, shared.known)
        self._shared = shared
        self._planner = Planner(registration, shared, self.connection, self.disks)
        self._executor = Executor(
            shared, self.connection, self.disks, lambda job: self._planner.again(job, self._jobs.all), self.wake
        )
        self._jobs = DomainJobs(shared, self.connection, self._executor, disks=self.disks, jobs=jobs, wake=self.wake)
        self._looks = Looks(registration.id, self._jobs, self._executor, shared.clock, self._woken)
        self._inbox: deque[_Request] = deque()
        self._next_welcome = float("inf")
        self._stopping = False
        self._since: int | None = None

    # From outside -----------------------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The domain's id."""
        return self.disks.registration.id

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The domain's unfinished jobs."""
        return self._jobs.all()

    def view(self) -> DomainView:
        """The domain as it is known now; never waits."""
        facts, state = self.connection.facts, self.connection.state()
        unreadable = self._shared.known.problem(self.id) if state is DomainState.SHUTOFF else None
        if state is not DomainState.SHUTOFF:
            self._since = None
        elif self._since is None:
            self._since = self._shared.clock.now()
        return DomainView(
            id=self.id,
            name=(facts.name if facts else None) or self.id,
            uuid=facts.uuid if facts else None,
            state=state,
            driver=self.disks.registration.driver,
            version=facts.version if facts else None,
            pid=facts.process.pid if facts else None,
            managed_by=facts.managed_by if facts else None,
            error=unreadable if state is DomainState.SHUTOFF else self.connection.error,
            disks=tuple(disk.name for disk in self.disks.known),
            since=self._since,
        )

    async def call(self, run: Callable[[], Awaitable[T]]) -> T:
        """Have the actor do `run` between its other work; what it raises is raised here.

        Raises `Refused` where too many requests wait already, and `ActorClosed` where the actor has ended.
        """
        if len(self._inbox) >= INBOX:
            raise Refused(
                Problem(code=Code.TOO_MANY_REQUESTS, detail=f"{INBOX} requests wait for {self.id}; slow down")
            )
        if self._stopping:
            raise ActorClosed
        answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._inbox.append(_Request(run, answer))
        self._woken.set()
        return await answer  # pyright: ignore[reportReturnType] - the future carries what `run` returns

    def wake(self) -> None:
        """Have the actor look at its domain soon."""
        self._jobs.look_soon = True
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
            if self.disks.registration.address is None:
                # No attempt to connect will ever have it read, and others' merges must not touch its images.
                await self.disks.read_off()
                self.connection.tried.set()
            while not self._stopping:
                self.connection.begin()
                await self._wait()
                if self.connection.pending:
                    await self._changed(await self.connection.end())
                if self._shared.clock.monotonic() >= self._next_welcome:
                    await self._welcome()
                await self._serve_inbox()
                await self._handle_monitor_error()
                if self._looks.due:
                    await self._looks.look()
                    await self._handle_monitor_error()
                await self._record_uses()
        finally:
            self._stopping = True
            self._hints.cancel()
            await self.connection.close()
            self._jobs.release()
            self.connection.tried.set()
            for request in self._inbox:
                _fail(request, ActorClosed())

    async def _wait(self) -> None:
        await self._looks.wait(
            min(self._next_welcome, self.connection.deadline),
            busy=lambda: bool(self._inbox or self.connection.pending or self._stopping),
        )

    async def _handle_monitor_error(self) -> None:
        error, self._executor.monitor_error = self._executor.monitor_error, None
        if error is not None:
            await self._changed(await self.connection.fail(error))

    async def _changed(self, change: Change | None) -> None:
        match change:
            case Change.CONNECTED:
                await self._welcome()
            case Change.FAILED | Change.LOST:
                if change is Change.LOST:
                    self._jobs.unqueue()
                    await self._tell(DomainEvent.DISCONNECTED)
                if self.connection.state() is DomainState.SHUTOFF:
                    await self.disks.read_off()
                    self.view()
                with suppress(JournalError):
                    await self._jobs.find_gone()
                self.connection.tried.set()
            case Change.HUNG:
                self._jobs.unqueue()
                await self._tell(DomainEvent.DISCONNECTED)
            case None:
                pass

    async def _welcome(self) -> None:
        """Read what the domain shows. QEMU may decline that for a while, so it is tried until it is done."""
        self._next_welcome = float("inf")
        if self.connection.phase is not Phase.GREETED:
            return
        self._jobs.look_soon = True
        try:
            guest = await self.connection.require().guest()
            await self.disks.read()
            await self._jobs.find_orphans()
            self.connection.welcome(guest)
        except MonitorError as error:
            self._executor.monitor_error = error
        except JournalError as error:
            log.error("domain not read yet", domain=self.id, error=str(error))
        self.connection.tried.set()
        if self.connection.shows:
            await self._tell(DomainEvent.CONNECTED)
        else:
            self._next_welcome = self._shared.clock.monotonic() + WELCOME_S

    async def _tell(self, event: DomainEvent) -> None:
        await self._shared.teller.tell(event, self.view())

    async def _record_uses(self) -> None:
        """Have the journal know which images the disks use by now, where no change of a job has told it."""
        uses = self._shared.known.unrecorded(self.id, self._shared.clock.now())
        if not uses:
            return
        try:
            await self._shared.journal.record_uses(self.id, {disk: of_disk for (_, disk), of_disk in uses.items()})
        except JournalError as error:
            # It is tried again at the next turn.
            log.error("uses of images not stored", domain=self.id, error=str(error))
        else:
            self._shared.known.recorded(uses)

    async def _serve_inbox(self) -> None:
        """Serve those who wait, until a look at the jobs is due.

        Once the actor takes no more requests, what waits behind is not served either: a domain that was forgotten in
        between has no place for a new job.
        """
        while self._inbox and not self._stopping:
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
            if self._looks.due:
                # Clients that read without a pause would keep a ready job waiting for ever.
                return

    # Requests, run by `call` ------------------------------------------------------------------------------------------

    async def read_disk_views(self) -> list[DiskView]:
        """Every disk, read now. Raises `Refused` where the monitor can't be asked."""
        return [await self._disk_view(disk) for disk in await self.disks.read()]

    async def read_disk_view(self, name: str) -> DiskView:
        """The disk that answers to `name`, read now."""
        return await self._disk_view(await self.disks.find(name, self._looks.meanwhile))

    async def _disk_view(self, disk: Disk) -> DiskView:
        unfinished = jobs_on(disk, self.jobs)
        marks = await self._shared.journal.invalid_marks(Image.of(layer) for layer in disk.layers)
        current = unfinished[0].id if unfinished else next(iter(disk.running_jobs), None)
        return DiskView(disk=disk, valid=valid_layers(disk, marks, self.id), job=current)

    async def plan(self, kind: str, name: str, request: Any, *, exact: bool) -> Plan[Spec]:
        """What a job of that kind would do; raises `Refused` for the first check that fails."""
        return await self._planner.plan(
            kind, name, request, self._jobs.all, exact=exact, meanwhile=self._looks.meanwhile
        )

    async def start(
        self,
        kind: str,
        name: str,
        request: Any,
        *,
        who: str,
        key: IdempotencyKey | None = None,
        callback: Webhook | None = None,
    ) -> Job:
        """Plan a job, store it, and start it if it has a place. Raises `Refused`, also with QEMU's refusal."""
        plan = await self.plan(kind, name, request, exact=False)
        # A job that waits is one of this QEMU's too, and ends with it.
        job = accept(
            plan,
            id_=self._shared.new_id(),
            domain=self.id,
            requested_by=who,
            now=self._shared.clock.now(),
            process=self.connection.process,
        )
        try:
            job = await self._jobs.add(job, key, None if callback is None else replace(callback, job_id=job.id))
        except JobConflict as conflict:
            raise Refused(
                Problem(
                    code=Code.JOB_CONFLICT,
                    detail=f"the job {conflict.job_id} works on {named(conflict.resource, job.disk)}; "
                    "wait for its end, or abort it",
                    extra={"job": conflict.job_id},
                )
            ) from None
        refused = refusal_of(job)
        if refused is not None:
            raise Refused(refused)
        return job

    async def steer(self, job_id: str, event: Input) -> tuple[Job, bool]:
        """Pass a person's request to a job: (the job, whether it had an effect). Raises `Refused`."""
        job = await self._jobs.find(job_id)
        if job is None:
            raise Refused(Problem(code=Code.JOB_NOT_FOUND, detail=f"there is no job {job_id}"))
        # A request that does not fit is refused before the monitor's state is.
        step(job, event, 0)
        if job.state is not State.QUEUED and not job.ended:
            self.connection.require()
            if self.connection.is_another(job.control.process):
                raise Refused(
                    Problem(
                        code=Code.MONITOR_UNREACHABLE,
                        detail=f"another QEMU answers as {self.id} by now, and the one with the job {job.id} can't be "
                        "reached; the outcome is read from the images once it has ended",
                    )
                )
        after = await self._jobs.advance(job, event)
        return after, after.version != job.version

    async def retire(self, unregister: Callable[[str, str], Awaitable[None]] | None = None) -> None:
        """Have `unregister` forget the domain, and take no more requests.

        Raises `Refused` while the domain has unfinished jobs. Decided in here, between requests: a job that is being
        planned is there before, or is refused afterwards.
        """
        if self.jobs:
            job = self.jobs[0]
            raise Refused(
                Problem(
                    code=Code.JOB_CONFLICT,
                    detail=f"the job {job.id} works on {self.id}/{job.disk}; wait for its end, or abort it",
                    extra={"job": job.id},
                )
            )
        if unregister is not None:
            await unregister(self.id, self._shared.render.domain(self.view()))
        self.stop()


def _fail(request: _Request, error: Exception) -> None:
    if not request.answer.done():
        request.answer.set_exception(error)
