"""The real engine, one life of it after another, on the simulated world."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Generator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import structlog

from app.api.render import JsonRender
from app.core.outgoing import Answer
from app.engine.budget import Budget
from app.engine.domains import DomainDirectory
from app.engine.hub import Hub
from app.engine.known import KnownDisks
from app.engine.ports.events import StoredEvent
from app.engine.recovery import Recovery
from app.engine.service import Service
from app.engine.shared import Shared
from app.engine.tasks import Tasks
from app.engine.webhook_sender import WebhookSender
from app.engine.webhooks import WebhookUseCases
from app.journal.outbox import SqliteOutbox
from tests.engine.simulation.images import SimImages
from tests.engine.simulation.journal import JournalFaults, PlainRender, SimJournal, new_database
from tests.engine.simulation.life import Life
from tests.engine.simulation.loop import OWNER, SimClock, SimTask
from tests.engine.simulation.ports import SimDiscovery, SimDriver
from tests.engine.simulation.world import World

WrapPorts = Callable[[Shared], None]
"""Puts other ports in place of the shared ones, as `app.wiring.running` lets builds do."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A variant of the engine that is broken on purpose: its directory of domains, and its ports."""

    directory: type[DomainDirectory] = DomainDirectory
    wrap_ports: WrapPorts = lambda _shared: None


class NoReceivers:
    """The `Sender` port: there are no webhooks."""

    async def check(self, url: str) -> str | None:
        """No URL is a receiver's."""
        return f"{url} is not there"

    async def send(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:  # noqa: ARG002 - the port's
        """Nothing is sent."""
        raise AssertionError(url)


class Engine:
    """The service, which may be killed and started again on the same journal.

    `published` are the events that subscribers were handed, over all lives.
    """

    def __init__(self, world: World, *, places: int, mutant: Mutant | None = None) -> None:
        self.world = world
        self.faults = JournalFaults()
        self.database: sqlite3.Connection = new_database()
        self.places = places
        self.published: list[StoredEvent] = []
        self.lives = 0
        self.finished = False
        self.service: Service | None = None
        self.domains: DomainDirectory | None = None
        self.life = Life("nobody")
        self._mutant = mutant or Mutant()
        self._ids = 0
        self._sender: WebhookSender | None = None
        self._hub: Hub | None = None

    @property
    def owner(self) -> str:
        """Whose the tasks of this life are."""
        return self.life.name

    async def start(self) -> None:
        """Begin a new life on the journal."""
        self.lives += 1
        world = self.world
        self.life = life = Life(f"service {self.lives}")
        OWNER.set(life.name)
        clock = SimClock(world.loop)
        journal = SimJournal(
            connection=self.database,
            clock=clock,
            life=life,
            faults=self.faults,
            kill=self.kill,
            note_call=world.trace.note_call,
        )
        hub = Hub(journal, clock)
        images = SimImages(world, life)
        shared = Shared(
            drivers={"qmp": SimDriver(world, life)},
            journal=journal,
            images=images,
            clock=clock,
            hub=hub,
            budget=Budget(self.places),
            recovery=Recovery(clock),
            render=PlainRender(),
            new_id=self._new_id,
            known=KnownDisks(images),
            tasks=Tasks(),
        )
        self._mutant.wrap_ports(shared)

        def publish(events: Sequence[StoredEvent]) -> None:
            if not life.over:
                self.published += events
                hub.publish(events)

        shared.journal.listen(publish)
        self.domains = self._mutant.directory(shared, SimDiscovery(world, life), retention_days=30)
        outbox = SqliteOutbox(journal, clock)
        sender = NoReceivers()
        self._sender = WebhookSender(
            outbox=outbox, sender=sender, clock=clock, renderer=JsonRender(), spread=lambda: 0.5
        )
        webhooks = WebhookUseCases(
            outbox=outbox,
            webhook_sender=self._sender,
            sender=sender,
            clock=clock,
            new_id=lambda: "wh-1",
            new_secret=lambda: "secret",
        )
        self._hub = hub
        service = Service(shared, self.domains, webhooks)
        world.trace.note("service started", life.name)
        world.service_at = world.loop.time()
        await self._sender.start()
        await self.domains.start()
        # Whoever is killed while it starts serves nobody.
        self.service = None if life.over else service

    def _new_id(self) -> str:
        self._ids += 1
        return f"bj-{self._ids:04d}"

    async def stop(self) -> None:
        """End this life in order."""
        if self.service is None:
            return
        self.world.trace.note("service stopped", self.life.name)
        self.service = None
        assert self._hub is not None
        assert self._sender is not None
        assert self.domains is not None
        self._hub.close()
        await self._sender.stop()
        await self.domains.stop()
        self.kill()

    def _start_again(self, life: Life) -> None:
        if self.life is life and not self.finished:
            self.world.loop.create_task(self.start())

    def kill(self) -> None:
        """End this life at once: nothing is stored or sent any more."""
        if self.life.over:
            return
        self.world.trace.note("service killed", self.life.name)
        self.world.service_at = self.world.loop.time()
        life = self.life
        life.over = True
        self.service = None
        current = asyncio.current_task(self.world.loop)
        tasks = [task for task in asyncio.all_tasks(self.world.loop) if isinstance(task, SimTask)]
        for task in sorted(tasks, key=lambda task: task.number):
            if task.owner == self.owner and task is not current:
                task.cancel()
        for machine in self.world.machines.values():
            machine.monitor.end_links(drop=self.world.rng.random() < 0.5)
        self.world.loop.call_later(self.world.rng.uniform(0.1, 6), self._start_again, life)


@contextmanager
def logs_into(note: Callable[[MutableMapping[str, Any]], None]) -> Generator[None]:
    """Have what the engine logs handed to `note`, and shown nowhere."""
    processors: list[Any] = structlog.get_config()["processors"]
    before = list(processors)

    def keep(_logger: object, method: str, entry: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        entry["level"] = method
        note(entry)
        raise structlog.DropEvent

    # In place, as loggers that were used before keep the list itself.
    processors[:] = [keep]
    try:
        yield
    finally:
        processors[:] = before
