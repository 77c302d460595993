"""Which domains there are: one actor for each, started, watched and stopped here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import structlog

from app.core.chain import Disk
from app.core.errors import Code, Problem, Refused
from app.core.job import Job
from app.engine.actor import Actor
from app.engine.ports.discovery import Discovery
from app.engine.ports.driver import Address
from app.engine.ports.events import DomainEvent
from app.engine.ports.journal import JournalFull, Registration
from app.engine.shared import Shared
from app.engine.views import DomainState

log = structlog.get_logger(__name__)

FIRST_TRY: Final = 2.0
"""Seconds that a registration waits for the first attempt to connect, so that its answer shows a state."""

STOP: Final = 2.0
"""Seconds that the actors get at shutdown to end what they are doing; the service as a whole has 5."""

DAY: Final = 24 * 3600


class DomainDirectory:
    """Starts and stops actors as domains come and go."""

    def __init__(self, shared: Shared, discovery: Discovery, *, retention_days: int) -> None:
        self.actors: dict[str, Actor] = {}
        self._shared = shared
        self._discovery = discovery
        self._retention = retention_days * DAY * 1000
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._own: list[asyncio.Task[None]] = []
        self._found: Mapping[str, str] = {}
        self._forgotten: set[str] = set()
        shared.disks = self._known_disks
        shared.read_off = self._read_off

    def _known_disks(self) -> Mapping[str, tuple[Disk, ...]]:
        return {id_: actor.disks.known for id_, actor in self.actors.items()}

    async def _read_off(self) -> None:
        for actor in list(self.actors.values()):
            if actor.connection.state() is DomainState.SHUTOFF:
                await actor.disks.read_offline()

    async def start(self) -> None:
        """Bring back what the journal knows: the registered domains, and every domain with an unfinished job."""
        jobs: dict[str, list[Job]] = {}
        unfinished = await self._shared.journal.unfinished()
        self._shared.recovery.begin(unfinished)
        for job in unfinished:
            jobs.setdefault(job.domain, []).append(job)
        registered = {registration.id: registration for registration in await self._shared.journal.registrations()}
        for id_ in jobs:
            if id_ not in registered:
                path = self._discovery.path_of(id_)
                address = Address(unix=path) if path else None
                registered[id_] = Registration(id=id_, address=address, discovered=True)
        for id_, registration in registered.items():
            self._launch(registration, tuple(jobs.get(id_, ())))
        self._own = [asyncio.create_task(self._discover()), asyncio.create_task(self._prune())]

    async def stop(self) -> None:
        """End all actors; their jobs go on in QEMU and are found again at the next start."""
        for task in self._own:
            task.cancel()
        for actor in self.actors.values():
            actor.stop()
        tasks = [*self._own, *self._tasks.values()]
        if tasks:
            _done, late = await asyncio.wait(tasks, timeout=STOP)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def find(self, domain: str) -> Actor:
        """The actor of a domain; raises `Refused` where there is no such domain."""
        actor = self.actors.get(domain)
        if actor is None:
            raise Refused(
                Problem(
                    code=Code.DOMAIN_NOT_FOUND,
                    detail=f"no domain is called {domain!r}; GET /domains lists them, PUT /domains/{{domain}} adds one",
                )
            )
        return actor

    async def register(self, registration: Registration) -> tuple[Actor, bool]:
        """Keep a registration and start its actor: (actor, whether the domain is new). Raises `JournalFull`."""
        old = self.actors.get(registration.id)
        if registration.address is None and not registration.disks:
            path = self._discovery.path_of(registration.id)
            registration = replace(registration, address=Address(unix=path) if path else None)
        await self._shared.journal.register(registration)
        jobs = old.jobs if old else ()
        if old is not None:
            await self._end(old)
            jobs = tuple(job for job in await self._shared.journal.unfinished() if job.domain == registration.id)
        self._forgotten.discard(registration.id)
        actor = self._launch(registration, jobs)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_TRY):
                await actor.connection.tried.wait()
        if old is None:
            await self._tell(DomainEvent.ADDED, actor)
        return actor, old is None

    async def forget(self, domain: str) -> None:
        """Forget a domain; nothing of it is touched. Raises `Refused` while it has unfinished jobs."""
        actor = self.find(domain)
        if actor.jobs:
            job = actor.jobs[0]
            raise Refused(
                Problem(
                    code=Code.JOB_CONFLICT,
                    detail=f"the job {job.id} works on {domain}/{job.disk}; wait for its end, or abort it",
                    extra={"job": job.id},
                )
            )
        await self._shared.journal.unregister(domain)
        # Its socket may still be there: it is found again once it has gone and come back.
        self._forgotten.add(domain)
        await self._remove(actor)

    def _launch(self, registration: Registration, jobs: tuple[Job, ...]) -> Actor:
        actor = self.actors[registration.id] = Actor(registration, self._shared, jobs)
        self._tasks[registration.id] = asyncio.create_task(self._run(actor))
        return actor

    async def _run(self, actor: Actor) -> None:
        try:
            await actor.run()
        except Exception:
            # A defect in here must not take the domain's jobs with it: they are in the journal and in QEMU.
            log.exception("actor failed", domain=actor.id)
            await asyncio.sleep(1)
            if self.actors.get(actor.id) is actor:
                jobs = [job for job in await self._shared.journal.unfinished() if job.domain == actor.id]
                self._launch(actor.registration, tuple(jobs))

    async def _end(self, actor: Actor) -> None:
        actor.stop()
        await asyncio.wait([self._tasks[actor.id]])

    async def _remove(self, actor: Actor) -> None:
        await self._end(actor)
        del self.actors[actor.id]
        del self._tasks[actor.id]
        await self._tell(DomainEvent.REMOVED, actor)

    async def _tell(self, event: DomainEvent, actor: Actor) -> None:
        try:
            await self._shared.journal.tell_domain(event, actor.id, self._shared.render.domain(actor.view()))
        except JournalFull as error:
            log.error("event not stored", domain=actor.id, event_type=event.value, error=str(error))

    async def _discover(self) -> None:
        async for found in self._discovery.looks():
            self._forgotten &= set(found)
            self._found = found
            for id_, path in found.items():
                if id_ not in self.actors and id_ not in self._forgotten:
                    actor = self._launch(Registration(id=id_, address=Address(unix=path), discovered=True), ())
                    await self._tell(DomainEvent.ADDED, actor)
            for actor in list(self.actors.values()):
                # A job's outcome may still have to be read from the images: the domain stays until a look after that.
                if actor.registration.discovered and actor.id not in found and not actor.jobs:
                    await self._remove(actor)

    async def _prune(self) -> None:
        while True:
            try:
                await self._shared.journal.prune(self._shared.clock.now() - self._retention)
            except JournalFull as error:
                log.error("not pruned", error=str(error))
            await asyncio.sleep(DAY / 24)
