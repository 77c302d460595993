"""The directory of domains: it alone creates, replaces and forgets them, one change at a time for each id."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final, TypeVar
from weakref import WeakValueDictionary

import structlog

from app.core.errors import Code, Problem, Refused
from app.core.job import Job
from app.engine.actor import Actor, ActorClosed
from app.engine.ports.discovery import Discovery
from app.engine.ports.driver import Address
from app.engine.ports.events import DomainEvent
from app.engine.ports.journal import JournalError, Registration
from app.engine.shared import Shared
from app.engine.telling import DomainTeller
from app.engine.views import DomainState, DomainView

log = structlog.get_logger(__name__)

FIRST_TRY_S: Final = 2.0
"""Seconds that a registration waits for the first attempt to connect, so that its answer shows a state."""

STOP_S: Final = 2.0
"""Seconds that the actors get at shutdown to end what they are doing; the service as a whole has 5."""

REVIVE_S: Final = 1.0
"""Seconds after which an actor that met a defect of ours is started anew."""

KEPT_S: Final = 5.0
"""Seconds between two looks whether the images of a domain are there whose monitor has gone."""

PRUNE_S: Final = 3600
DAY_MS: Final = 24 * 3600 * 1000

SHUTTING_DOWN: Final = Problem(code=Code.SHUTTING_DOWN, detail="the service is shutting down")

T = TypeVar("T")


class DomainDirectory:
    """Every known domain, each with one actor."""

    def __init__(self, shared: Shared, discovery: Discovery, *, retention_days: int) -> None:
        self.actors: dict[str, Actor] = {}
        self._shared = shared
        shared.teller = DomainTeller(shared.journal, shared.render, shared.tasks)
        self._discovery = discovery
        self._retention = retention_days * DAY_MS
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._own: list[asyncio.Task[None]] = []
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._changes: dict[str, asyncio.Task[None]] = {}
        self._forgotten: set[str] = set()
        self._kept_until: dict[str, float] = {}
        self._stopping = False

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
                registered[id_] = Registration(id=id_, address=self._discovered_at(id_), discovered=True)
        self._shared.known.load(await self._shared.journal.uses())
        for id_ in self._shared.known.remembered() - registered.keys():
            # It was found by itself, and its images may still be needed.
            registered[id_] = Registration(id=id_, address=self._discovered_at(id_), discovered=True)
        for id_, registration in registered.items():
            self._launch(registration, tuple(jobs.get(id_, ())))
        tasks = self._shared.tasks
        self._own = [tasks.start("discovery", self._discover()), tasks.start("pruning", self._prune())]

    async def stop(self) -> None:
        """End all actors; their jobs go on in QEMU and are found again at the next start."""
        self._stopping = True
        self._shared.teller.stop()
        for task in (*self._own, *self._changes.values()):
            task.cancel()
        for actor in self.actors.values():
            actor.stop()
        tasks = [*self._own, *self._changes.values(), *self._runs.values()]
        if tasks:
            _done, late = await asyncio.wait(tasks, timeout=STOP_S)
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

    async def call(self, domain: str, run: Callable[[Actor], Awaitable[T]]) -> T:
        """Have the actor of a domain do `run`, whichever actor that is when its turn comes. Raises `Refused`."""
        while True:
            actor = self.find(domain)
            try:
                return await actor.call(lambda actor=actor: run(actor))
            except ActorClosed:
                if self._stopping:
                    raise Refused(SHUTTING_DOWN) from None
            # It is being replaced or forgotten; who does that holds the lock until it is done.
            async with self.alone(domain):
                pass
            if self.actors.get(domain) is actor:
                # It has met a defect, and is started anew in a moment.
                await asyncio.sleep(REVIVE_S)

    def alone(self, domain: str) -> asyncio.Lock:
        """The lock under which a domain is created, replaced or forgotten. It lives as long as somebody has it."""
        lock = self._locks.get(domain)
        if lock is None:
            lock = self._locks[domain] = asyncio.Lock()
        return lock

    # Changes ----------------------------------------------------------------------------------------------------------

    async def register(self, registration: Registration) -> tuple[Actor, bool]:
        """Keep a registration and start its actor: (actor, whether the domain is new). Raises `JournalError`."""
        id_ = registration.id
        async with self.alone(id_):
            old = self.actors.get(id_)
            if registration.address is None and not registration.disks:
                registration = replace(registration, address=self._discovered_at(id_))
            if self._stopping:
                raise Refused(SHUTTING_DOWN)
            await self._shared.teller.flush()
            await self._shared.journal.register(registration, None if old else self._told(registration))
            if old is None:
                jobs = await self._unfinished_of(id_)
            else:
                try:
                    await self._end(old)
                    jobs = await self._unfinished_of(id_)
                except BaseException:
                    self._revive_later(old, registration)
                    raise
            self._forgotten.discard(id_)
            actor = self._launch(registration, jobs)
        with suppress(TimeoutError):
            async with asyncio.timeout(FIRST_TRY_S):
                await actor.connection.tried.wait()
        # Somebody else may have registered it anew meanwhile.
        return self.actors.get(id_, actor), old is None

    def _told(self, registration: Registration) -> str:
        """The data of `domain.added`: what is known of a domain before anybody has asked it."""
        off = registration.address is None
        view = DomainView(
            id=registration.id,
            name=registration.id,
            uuid=None,
            state=DomainState.SHUTOFF if off else DomainState.UNREACHABLE,
            driver=registration.driver,
            version=None,
            pid=None,
            managed_by=None,
            error=None,
            disks=tuple(registration.disks),
            since=self._shared.clock.now() if off else None,
        )
        return self._shared.render.domain(view)

    async def forget(self, domain: str) -> None:
        """Forget a domain; nothing of it is touched. Raises `Refused` while it has unfinished jobs."""
        while True:
            async with self.alone(domain):
                actor = self.find(domain)
                try:
                    await actor.call(lambda actor=actor: actor.retire(self._shared.journal.unregister))
                except ActorClosed:
                    if self._stopping:
                        raise Refused(SHUTTING_DOWN) from None
                else:
                    # Its socket may still be there: it is found again once it has gone and come back.
                    self._forgotten.add(domain)
                    await self._remove(actor)
                    self._shared.known.forget(domain)
                    return
            # It has met a defect; what it has to say about its jobs is known once it is started anew.
            await asyncio.sleep(REVIVE_S)

    def _discovered_at(self, domain: str) -> Address | None:
        path = self._discovery.path_of(domain)
        return Address(unix=path) if path else None

    async def _unfinished_of(self, domain: str) -> tuple[Job, ...]:
        return tuple(job for job in await self._shared.journal.unfinished() if job.domain == domain)

    def _launch(self, registration: Registration, jobs: Sequence[Job]) -> Actor:
        actor = self.actors[registration.id] = Actor(registration, self._shared, tuple(jobs))
        self._runs[registration.id] = self._shared.tasks.start(f"domain {registration.id}", self._run(actor))
        return actor

    async def _run(self, actor: Actor) -> None:
        try:
            await actor.run()
        except Exception as error:  # noqa: BLE001 - a defect in here must not take the domain's jobs with it
            self._shared.tasks.note_death(f"domain {actor.id}", error)
            self._revive_later(actor, actor.disks.registration)

    def _revive_later(self, actor: Actor, registration: Registration) -> None:
        if not self._stopping:
            self._changes[f"revive {actor.id}"] = asyncio.create_task(self._revive(actor, registration))

    async def _revive(self, actor: Actor, registration: Registration) -> None:
        """Start an actor anew that met a defect: its jobs are in the journal and in QEMU."""
        try:
            while True:
                await asyncio.sleep(REVIVE_S)
                try:
                    async with self.alone(actor.id):
                        if self.actors.get(actor.id) is actor:
                            self._launch(registration, await self._unfinished_of(actor.id))
                except Exception as error:  # noqa: BLE001 - the journal may be what can't be read now
                    log.error("domain not started anew", domain=actor.id, error=repr(error))
                else:
                    return
        finally:
            self._changes.pop(f"revive {actor.id}", None)

    async def _end(self, actor: Actor) -> None:
        actor.stop()
        await asyncio.wait([self._runs[actor.id]])

    async def _remove(self, actor: Actor) -> None:
        await self._end(actor)
        del self.actors[actor.id]
        del self._runs[actor.id]
        self._shared.known.drop(actor.id)

    # By itself --------------------------------------------------------------------------------------------------------

    async def _discover(self) -> None:
        async for found in self._discovery.looks():
            self._forgotten &= set(found)
            appeared = {id_ for id_ in found if id_ not in self.actors and id_ not in self._forgotten}
            # A job's outcome may still have to be read from the images: the domain stays until a look after that.
            now = self._shared.clock.monotonic()
            gone = {
                id_
                for id_, actor in self.actors.items()
                if actor.disks.registration.discovered
                and id_ not in found
                and not actor.jobs
                and now >= self._kept_until.get(id_, 0)
            }
            for id_ in (appeared | gone) - self._changes.keys():
                # A domain whose QEMU hangs takes its time to end; that holds up no other one.
                self._changes[id_] = self._shared.tasks.start(f"discovery of {id_}", self._adjust(id_, found))

    async def _adjust(self, id_: str, found: Mapping[str, str]) -> None:
        try:
            async with self.alone(id_):
                actor = self.actors.get(id_)
                if id_ in found and actor is None and id_ not in self._forgotten:
                    registration = Registration(id=id_, address=Address(unix=found[id_]), discovered=True)
                    actor = self._launch(registration, await self._unfinished_of(id_))
                    await self._shared.teller.tell(DomainEvent.ADDED, actor.view())
                elif id_ not in found and actor is not None and actor.disks.registration.discovered:
                    if await self._has_images(id_):
                        self._kept_until[id_] = self._shared.clock.monotonic() + KEPT_S
                        return
                    with suppress(Refused, ActorClosed):
                        await actor.call(actor.retire)
                        await self._remove(actor)
                        await self._shared.teller.tell(DomainEvent.REMOVED, actor.view())
        finally:
            self._changes.pop(id_, None)

    async def _has_images(self, domain: str) -> bool:
        """Whether images of a domain that is gone may still be there; what is known to be gone is forgotten."""
        vanished = await self._shared.known.vanished(domain)
        if vanished:
            try:
                await self._shared.journal.record_uses(domain, {disk: () for _, disk in vanished})
            except JournalError as error:
                log.error("uses of images not stored", domain=domain, error=str(error))
                return True
            self._shared.known.recorded(vanished)
        return bool(self._shared.known.active_images(domain))

    async def _prune(self) -> None:
        while True:
            try:
                await self._shared.journal.prune(self._shared.clock.now() - self._retention)
            except JournalError as error:
                log.error("not pruned", error=str(error))
            await asyncio.sleep(PRUNE_S)
