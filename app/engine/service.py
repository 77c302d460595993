"""The use cases: what the interfaces call."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from app.core.errors import Code, Problem, Refused
from app.core.job import Job
from app.core.kinds import Spec
from app.core.machine.inputs import Abort, Input, Pause, Pivot, Resolve, Resume, SetSpeed
from app.core.machine.table import step
from app.core.marks import mark_change
from app.core.plan import Plan
from app.core.states import State
from app.engine.actor import Actor
from app.engine.domains import DomainDirectory
from app.engine.idempotency import IdempotencyKeys
from app.engine.ports.events import EventFilter, StoredEvent
from app.engine.ports.journal import IdempotencyKey, JobFilter, Registration
from app.engine.ports.outbox import Webhook
from app.engine.reads import SharedReads
from app.engine.recovery import Recovery
from app.engine.shared import Shared
from app.engine.views import DiskView, DomainView
from app.engine.webhooks import WebhookUseCases

HISTORY_PAGE = 1000

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Unfinished jobs and domains by state, open event streams, bytes of the journal's parts."""

    jobs: Mapping[str, int]
    domains: Mapping[str, int]
    subscribers: int
    journal: Mapping[str, int]


class Service:
    """Every use case of blockjobd. All raise `Refused` where a request can't be served."""

    def __init__(self, shared: Shared, domains: DomainDirectory, webhooks: WebhookUseCases) -> None:
        self.hub = shared.hub
        self.webhooks = webhooks
        self.keys = IdempotencyKeys(shared.journal, shared.clock)
        self._shared = shared
        self._domains = domains
        self._reads = SharedReads()

    # Domains and disks ------------------------------------------------------------------------------------------------

    async def domains(self) -> Sequence[DomainView]:
        """Every known domain, by id."""
        return [actor.view() for _id, actor in sorted(self._domains.actors.items())]

    async def domain(self, domain: str) -> DomainView:
        """One domain."""
        return self._domains.find(domain).view()

    async def register(self, registration: Registration) -> tuple[DomainView, bool]:
        """Register a domain, or register it anew: (the domain, whether it is new)."""
        actor, new = await self._domains.register(registration)
        return actor.view(), new

    async def forget(self, domain: str) -> None:
        """Forget a domain."""
        await self._domains.forget(domain)

    async def disks(self, domain: str) -> Sequence[DiskView]:
        """The domain's disks, as they are now."""
        return await self._reads.do((domain,), lambda begun: self._read(domain, begun, Actor.read_disk_views))

    async def disk(self, domain: str, disk: str) -> DiskView:
        """One disk, as it is now."""
        return await self._reads.do(
            (domain, disk), lambda begun: self._read(domain, begun, lambda actor: actor.read_disk_view(disk))
        )

    async def _read(self, domain: str, begun: Callable[[], None], read: Callable[[Actor], Awaitable[T]]) -> T:
        def begin(actor: Actor) -> Awaitable[T]:
            begun()
            return read(actor)

        return await self._domains.call(domain, begin)

    # Starting jobs ----------------------------------------------------------------------------------------------------

    async def plan(self, kind: str, domain: str, disk: str, request: Any) -> Plan[Spec]:
        """What a job of that kind would do; nothing changes. `request` is the kind's own."""
        return await self._domains.call(domain, lambda actor: actor.plan(kind, disk, request, exact=True))

    async def start(
        self,
        kind: str,
        domain: str,
        disk: str,
        request: Any,
        *,
        who: str,
        key: IdempotencyKey | None = None,
        callback: Webhook | None = None,
    ) -> Job:
        """Start a job of that kind; `who` is the name of the caller's token.

        `key` and `callback` are stored with the job.
        """
        return await self._domains.call(
            domain, lambda actor: actor.start(kind, disk, request, who=who, key=key, callback=callback)
        )

    # Jobs -------------------------------------------------------------------------------------------------------------

    async def job(self, job_id: str) -> Job:
        """A job as it is now."""
        job = self._shared.live.get(job_id) or await self._shared.journal.job(job_id)
        if job is None:
            raise Refused(
                Problem(code=Code.JOB_NOT_FOUND, detail=f"there is no job {job_id!r}; GET /jobs lists those there are")
            )
        return job

    async def jobs(self, wanted: JobFilter) -> tuple[Sequence[Job], int | None]:
        """Jobs, newest first, and the cursor of the next page."""
        jobs, cursor = await self._shared.journal.jobs(wanted)
        return [self._latest(job) for job in jobs], cursor

    def _latest(self, job: Job) -> Job:
        """The job with its live progress."""
        live = self._shared.live.get(job.id)
        return live if live is not None and live.version == job.version else job

    async def history(self, job_id: str) -> Sequence[StoredEvent]:
        """The stored events of a job, oldest first."""
        await self.job(job_id)
        return await self._shared.journal.events(EventFilter(job_id=job_id), after=0, limit=HISTORY_PAGE)

    async def wait(self, job_id: str, seconds: float) -> Job:
        """The job once it has ended, is ready or paused, or once the seconds are over."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    moved = self.hub.next_move
                    job = await self.job(job_id)
                    if job.ended or job.state in (State.READY, State.PAUSED) or self.hub.closed:
                        return job
                    await moved.wait()
        except TimeoutError:
            return await self.job(job_id)

    async def abort(self, job_id: str, *, force: bool) -> tuple[Job, bool]:
        """End a job without merging: (the job, False where that was under way or done before)."""
        return await self._steer(job_id, Abort(force))

    async def pivot(self, job_id: str) -> Job:
        """Move the guest onto the base of a ready job."""
        return (await self._steer(job_id, Pivot()))[0]

    async def pause(self, job_id: str) -> Job:
        """Pause a running job."""
        return (await self._steer(job_id, Pause()))[0]

    async def resume(self, job_id: str) -> Job:
        """Have a paused job go on."""
        return (await self._steer(job_id, Resume()))[0]

    async def set_speed(self, job_id: str, bandwidth: int) -> Job:
        """Change the speed, in bytes/s; 0 is no limit."""
        return (await self._steer(job_id, SetSpeed(bandwidth)))[0]

    async def resolve(self, job_id: str, outcome: State, *, who: str) -> Job:
        """Record a person's verdict on a lost job."""
        return (await self._steer(job_id, Resolve(outcome, who)))[0]

    async def _steer(self, job_id: str, event: Input) -> tuple[Job, bool]:
        domain = (await self.job(job_id)).domain
        if domain not in self._domains.actors:
            async with self._domains.alone(domain):
                if domain not in self._domains.actors:
                    return await self._steer_ended(job_id, event)
        return await self._domains.call(domain, lambda actor: actor.steer(job_id, event))

    async def _steer_ended(self, job_id: str, event: Input) -> tuple[Job, bool]:
        """Steer a job whose domain is forgotten: what a step says of a job that has ended needs no monitor."""
        job = await self.job(job_id)
        if not job.ended:
            detail = f"the domain {job.domain} of the job {job_id} is not known now; register it"
            raise Refused(Problem(code=Code.MONITOR_UNREACHABLE, detail=detail))
        following = step(job, event, self._shared.clock.now())
        if following.versions:
            await self._shared.journal.store(following.versions, marks=mark_change(job.data_state, following.job))
        return following.job, bool(following.versions)

    # Streams and health -----------------------------------------------------------------------------------------------

    async def check_stream(self, wanted: EventFilter) -> None:
        """Raise `Refused` where a stream of these events can't be served."""
        self.hub.check_room()
        if wanted.domain is not None:
            self._domains.find(wanted.domain)
        if wanted.job_id is not None:
            await self.job(wanted.job_id)

    async def readiness(self) -> Mapping[str, str | None]:
        """Each check with None, or with why the service should get no requests."""
        died = self._shared.tasks.died
        return {
            "journal": await self._shared.journal.check(),
            "shutdown": "in progress" if self.hub.closed else None,
            "tasks": "; ".join(f"{name} died: {error}" for name, error in sorted(died.items())) or None,
        }

    def recovery(self) -> Recovery:
        """What was found after the start."""
        return self._shared.recovery

    def counts(self) -> Counts:
        """Figures for the metrics."""
        views = [actor.view() for actor in self._domains.actors.values()]
        return Counts(
            jobs=Counter(job.state.value for job in self._shared.live.values()),
            domains=Counter(view.state.value for view in views),
            subscribers=self.hub.subscribers,
            journal=self._shared.journal.sizes,
        )
