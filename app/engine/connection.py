"""A domain's connection: the connection to its monitor, kept up, and what is known of who answers there.

Nothing in here waits for QEMU: attempts to connect and heartbeats are tasks of their own, begun by `begin` and
harvested by `end`, so that the actor stays free while QEMU does not answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Final

from app.core.errors import Code, Problem, Refused
from app.core.job import Process
from app.core.machine.inputs import Observed
from app.core.reconcile import same_process
from app.engine.ports.clock import Clock
from app.engine.ports.driver import Busy, Declined, Driver, MonitorError, QemuFacts, Runner, Unanswered, Unreachable
from app.engine.ports.journal import Registration
from app.engine.views import DomainState

HEARTBEAT_S: Final = 10.0
"""Seconds between two signs of life that are asked of a QEMU. With `HEARTBEAT_TIMEOUT_S` it bounds how long a hang goes
unseen.

Where there are jobs QEMU is asked about them all the time anyway, and of a change of the guest's state it tells itself.
"""

HEARTBEAT_TIMEOUT_S: Final = 10.0
"""Seconds that a heartbeat may take before the monitor counts as unreachable."""

RETRY_S: Final = (0.2, 0.5, 1.0)
"""Seconds before the first, second and every later new attempt to connect."""

STABLE_AFTER_S: Final = 3.0
"""Seconds that a connection has to last, else it counts as an attempt that has failed: somebody who hangs up at once
would be called without a pause."""


class Change(Enum):
    """What has happened to the connection."""

    CONNECTED = auto()
    FAILED = auto()
    """One more attempt to connect did not work."""
    HUNG = auto()
    AWAKE = auto()
    """QEMU answers again, over the same connection."""
    LOST = auto()


class MonitorConnection:
    """The connection of one domain, whether it stands or not.

    `hint` is called when QEMU tells that something has happened, `on_progress` when there is something to harvest.
    """

    def __init__(
        self,
        registration: Registration,
        driver: Driver,
        clock: Clock,
        *,
        hint: Callable[[], None],
        on_progress: Callable[[], None],
    ) -> None:
        self.domain = registration.id
        self.monitor: Runner | None = None
        self.process: Process | None = None
        self.tried = asyncio.Event()
        self.error: Problem | None = None
        self.final_reports: Mapping[str, Observed] = {}
        self._registration = registration
        self._driver = driver
        self._clock = clock
        self._hint = hint
        self._on_progress = on_progress
        self._busy = False
        self._hung = False
        self._welcomed = False
        self._guest_running = True
        self._connecting: asyncio.Task[Runner] | None = None
        self._probe: asyncio.Task[bool] | None = None
        self._attempts = 0
        self._since = 0.0
        self._due = 0.0
        if registration.address is not None:
            self.error = self._unreachable("connecting")

    @property
    def facts(self) -> QemuFacts | None:
        """Who answers, while the connection stands."""
        return self.monitor.facts if self.monitor else None

    @property
    def usable(self) -> Runner | None:
        """The monitor, if QEMU answers there."""
        return None if self._hung else self.monitor

    def state(self) -> DomainState:
        """The domain's state as it shows from here."""
        if self.monitor is not None and self._welcomed and not self._hung:
            return DomainState.RUNNING if self._guest_running else DomainState.PAUSED
        if self._busy:
            return DomainState.BUSY
        off = self._registration.disks or self._registration.address is None
        shut = off and self.monitor is None and not self.is_alive()
        return DomainState.SHUTOFF if shut else DomainState.UNREACHABLE

    def welcome(self, *, guest_running: bool) -> None:
        """All that a domain shows has been read over the new connection; from now on it shows."""
        self._welcomed, self._guest_running, self.error = True, guest_running, None

    def is_alive(self, process: Process | None = None) -> bool:
        """Whether that process (if None: the QEMU that was seen last) is known to run still."""
        which = process or self.process
        return which is not None and self._driver.alive(which) is True

    def is_gone(self, process: Process | None) -> bool:
        """Whether that process (if None: the QEMU that was seen last) is known to have ended."""
        which = process or self.process
        return which is not None and self._driver.alive(which) is False

    def is_with(self, process: Process | None) -> bool:
        """Whether it is that process that answers, as far as can be told."""
        return self.monitor is not None and same_process(process, self.process)

    def require(self) -> Runner:
        """The monitor; raises `Refused` where QEMU can't be asked."""
        monitor = self.usable
        if monitor is None:
            raise Refused(self.error or self._unreachable("the domain is off"))
        return monitor

    def refusal(self, error: MonitorError) -> Problem:
        """What to tell a caller whose request met `error`."""
        return error.problem if isinstance(error, Declined) else self.error or self._unreachable(str(error))

    @property
    def deadline(self) -> float:
        """When `begin` has something to begin next, on the clock's seconds."""
        task = self._connecting if self.monitor is None else self._probe
        idle = task is not None or (self.monitor is None and self._registration.address is None)
        return float("inf") if idle else self._due

    @property
    def pending(self) -> bool:
        """Whether `end` has something to harvest."""
        ended = any(task is not None and task.done() for task in (self._connecting, self._probe))
        return ended or (self.monitor is not None and not self.monitor.connected)

    def probe_soon(self) -> None:
        """Have the next heartbeat begin soon."""
        if self.monitor is not None and self._welcomed:
            self._due = self._clock.monotonic()

    def begin(self) -> None:
        """Begin an attempt to connect, or a heartbeat, if it is time for one."""
        if self._clock.monotonic() < self.deadline:
            return
        if self.monitor is not None:
            self._probe = asyncio.create_task(_ask_for_life(self.monitor))
            self._probe.add_done_callback(lambda _task: self._on_progress())
        elif self._registration.address is not None:
            self._connecting = asyncio.create_task(self._driver.connect(self._registration.address, self._hint))
            self._connecting.add_done_callback(lambda _task: self._on_progress())

    async def end(self) -> Change | None:
        """Take in what was begun and has ended; what that changed."""
        if self.monitor is not None and not self.monitor.connected:
            return await self._lose("the connection to QEMU ended")
        if self._connecting is not None and self._connecting.done():
            connecting, self._connecting = self._connecting, None
            try:
                return self._connected(connecting.result())
            except MonitorError as error:
                return self._connect_failed(error)
        if self._probe is not None and self._probe.done():
            probe, self._probe = self._probe, None
            self._due = self._clock.monotonic() + HEARTBEAT_S
            try:
                self._guest_running = probe.result()
            except MonitorError as error:
                return await self.fail(error)
            if self._hung:
                self._hung, self.error = False, None
                return Change.AWAKE
        return None

    async def fail(self, error: MonitorError) -> Change | None:
        """Take in that a call met `error`."""
        if isinstance(error, Unreachable) and self.monitor is not None:
            return await self._lose(str(error))
        if isinstance(error, Unanswered) and not self._hung:
            self._hung, self.error = True, self._unreachable(str(error))
            return Change.HUNG
        return None

    async def close(self) -> None:
        """End the connection and whatever was begun."""
        await self._stop_probe()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
            if not self._connecting.cancelled() and self._connecting.exception() is None:
                self.monitor = self._connecting.result()
        if self.monitor is not None:
            await self.monitor.close()

    def _connected(self, monitor: Runner) -> Change:
        self.monitor, self.process = monitor, monitor.facts.process
        self._busy, self._hung, self._welcomed = False, False, False
        self._since = self._clock.monotonic()
        self._due = self._since + HEARTBEAT_S
        return Change.CONNECTED

    def _connect_failed(self, error: MonitorError) -> Change:
        self._retry()
        self._busy = isinstance(error, Busy)
        code = Code.MONITOR_BUSY if self._busy else Code.MONITOR_UNREACHABLE
        self.error = Problem(code=code, detail=f"domain {self._registration.id}: {error}")
        if self.state() is DomainState.SHUTOFF:
            self.error = None
        return Change.FAILED

    async def _lose(self, why: str) -> Change:
        await self._stop_probe()
        if self.monitor is not None:
            self.final_reports = dict(self.monitor.final_reports)
            await self.monitor.close()
        self.monitor, self._hung = None, False
        self.error = self._unreachable(why)
        if self._clock.monotonic() < self._since + STABLE_AFTER_S:
            self._retry()
        else:
            self._attempts, self._due = 0, self._clock.monotonic()
        return Change.LOST

    def _retry(self) -> None:
        self._due = self._clock.monotonic() + RETRY_S[min(self._attempts, len(RETRY_S) - 1)]
        self._attempts += 1

    async def _stop_probe(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait([self._probe])
            self._probe = None

    def _unreachable(self, why: str) -> Problem:
        return Problem(code=Code.MONITOR_UNREACHABLE, detail=f"domain {self._registration.id}: {why}")


async def _ask_for_life(monitor: Runner) -> bool:
    try:
        async with asyncio.timeout(HEARTBEAT_TIMEOUT_S):
            return await monitor.guest_running()
    except TimeoutError:
        raise Unanswered(f"QEMU has not answered for {HEARTBEAT_TIMEOUT_S:.0f} s") from None
