"""A simulated monitor: one client at a time, commands in their order, replies that are lost, late, or never come."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from app.engine.ports.driver import Busy, Declined, MonitorError, Unreachable
from tests.engine.simulation.blockjob import QemuRefuses
from tests.engine.simulation.nodes import Client
from tests.engine.simulation.qemu import Qemu

if TYPE_CHECKING:
    from tests.engine.simulation.world import World

GREETING: Final = 5.0
"""Seconds in which a monitor that is free sends its greeting, as in `app.drivers.qmp.connection`."""

BACKLOG_LOOK: Final = 0.25
"""Seconds between two looks of somebody who waits for a greeting."""


class Link:
    """One connection of the service to a monitor."""

    def __init__(self, monitor: Monitor, qemu: Qemu, hint: Callable[[], None]) -> None:
        self.monitor = monitor
        self.qemu = qemu
        self.connected = True
        self.counted = True
        self.client = Client(hint=hint)
        self.pending: list[asyncio.Future[Any]] = []
        self.dropped = False
        self.heard_all = False
        qemu.clients.append(self.client)

    def end(self, *, drop: bool = False) -> None:
        """The connection ends; `drop`: what is on its way is lost."""
        if not self.connected:
            return
        self.connected, self.dropped, self.heard_all = False, drop, not drop and not self.qemu.up
        if self.client in self.qemu.clients:
            self.qemu.clients.remove(self.client)
        if self.counted:
            self.counted = False
            self.monitor.service_clients -= 1
        self.monitor.links.remove(self)
        for reply in self.pending:
            if not reply.done():
                reply.set_exception(Unreachable("the connection to QEMU ended"))
                # Nobody may be there any more to see it.
                reply.exception()
        self.client.hint()


class Monitor:
    """A socket that one virtual machine listens at, whatever process runs it.

    `faults` are what the next commands meet: `lost` (its reply never comes), `never` (it never arrives), or for how
    many seconds QEMU is busy with it. `service_clients` counts connections of the service, and attempts at one.
    """

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.qemu: Qemu | None = None
        self.held_until = 0.0
        self.faults: deque[str | float] = deque()
        self.links: list[Link] = []
        self.service_clients = 0
        self._world = world
        self._backlog: list[Callable[[], None]] = []
        self._last_arrival = 0.0

    async def connect(self, hint: Callable[[], None]) -> Link:
        """A connection, once there is a greeting."""
        self.service_clients += 1
        try:
            qemu = await self._greeting()
        except BaseException:
            self.service_clients -= 1
            raise
        link = Link(self, qemu, hint)
        self.links.append(link)
        return link

    async def _greeting(self) -> Qemu:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._world.latency())
        deadline = loop.time() + GREETING
        while True:
            qemu = self.qemu
            if qemu is None or not qemu.up:
                raise Unreachable(f"no monitor at {self.name}: Connection refused")
            if not (self.held_until > loop.time() or self.links or qemu.hung):
                return qemu
            if loop.time() >= deadline:
                raise Unreachable("the process is stopped") if qemu.hung else Busy("no greeting came")
            await asyncio.sleep(BACKLOG_LOOK)

    def send(self, link: Link, what: str, effect: Callable[[Qemu], Any]) -> asyncio.Future[Any]:
        """Send a command; its reply, which may never come."""
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Any] = loop.create_future()
        link.pending = [each for each in link.pending if not each.done()]
        link.pending.append(reply)
        fault = (self.faults.popleft() or None) if self.faults else None
        if fault is not None:
            self._world.trace.note(f"fault: {fault if isinstance(fault, str) else 'late'}", f"{self.name} {what}")
            self._world.trouble(self.name)
        if fault != "never":
            self._last_arrival = max(self._last_arrival + 1e-6, loop.time() + self._world.latency())
            loop.call_at(self._last_arrival, self._arrive, link, what, fault, effect, reply)
        return reply

    def _arrive(
        self,
        link: Link,
        what: str,
        fault: str | float | None,
        effect: Callable[[Qemu], Any],
        reply: asyncio.Future[Any],
    ) -> None:
        qemu, loop = link.qemu, asyncio.get_running_loop()
        if not qemu.up or link.dropped:
            return
        if qemu.hung:
            self._backlog.append(partial(self._arrive, link, what, fault, effect, reply))
            return
        result: Any = None
        error: MonitorError | None = None
        try:
            result = effect(qemu)
        except QemuRefuses as refuses:
            error = Declined(refuses.problem)
        self._world.executed(qemu, what, error)
        if fault == "lost":
            return
        at = loop.time() + self._world.latency()
        if isinstance(fault, float):
            at += fault
            self._last_arrival = max(self._last_arrival, at)
        loop.call_at(at, _deliver, reply, result, error)

    def wake(self) -> None:
        """What was sent while QEMU was stopped is done now."""
        backlog, self._backlog = self._backlog, []
        for arrive in backlog:
            arrive()

    def end_links(self, *, drop: bool = False) -> None:
        """All connections of the service end."""
        for link in list(self.links):
            link.end(drop=drop)


def _deliver(reply: asyncio.Future[Any], result: Any, error: MonitorError | None) -> None:
    if reply.done():
        return
    if error is None:
        reply.set_result(result)
    else:
        reply.set_exception(error)
        reply.exception()
