r"""A domain's connection to its monitor, kept up, and what is known of who answers there.

    DOWN --connected--> GREETED --read--> UP
     ^ \                 ^     \           |
     |  held by another  |      +--silent--+--> HUNG
     |  v                +-------- answered -----/
     | BUSY
     +------------------------- cut ------- from GREETED, UP, HUNG

Nothing in here waits for QEMU: attempts to connect and heartbeats are tasks of their own, begun by `begin` and
harvested by `end`, so that the actor stays free while QEMU does not answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Final

from app.core.errors import Code, Problem, Refused
from app.core.evidence import Process, same_process, same_view
from app.core.machine.inputs import Observed
from app.core.plan import Guest
from app.core.sameness import Sameness
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
"""Seconds that a connection has to last, else it counts as an attempt that has failed: a peer that hangs up at once
would be called without a pause."""

CUT_S: Final = (0.2, 0.5, 1.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds before the next attempt after the first, second and every later connection that has not lasted so long. Each
of them costs two events."""


class Phase(Enum):
    """Where the connection is."""

    DOWN = auto()
    """There is none: no monitor is registered, nobody answers, or no attempt has ended yet."""
    BUSY = auto()
    """There is none, as another client holds the monitor."""
    GREETED = auto()
    """It stands, and what the domain shows has not been read over it yet."""
    UP = auto()
    """It stands, and the domain shows."""
    HUNG = auto()
    """It stands, and QEMU does not answer."""


class Signal(Enum):
    """What moves the connection from one phase to another."""

    CONNECTED = auto()
    REFUSED = auto()
    """An attempt to connect has failed."""
    HELD = auto()
    """An attempt to connect has shown that another client holds the monitor."""
    READ = auto()
    SILENT = auto()
    """A call was not answered in time."""
    ANSWERED = auto()
    CUT = auto()


PHASES: Final[Mapping[tuple[Phase, Signal], Phase]] = {
    **{(phase, Signal.CONNECTED): Phase.GREETED for phase in (Phase.DOWN, Phase.BUSY)},
    **{(phase, Signal.REFUSED): Phase.DOWN for phase in (Phase.DOWN, Phase.BUSY)},
    **{(phase, Signal.HELD): Phase.BUSY for phase in (Phase.DOWN, Phase.BUSY)},
    (Phase.GREETED, Signal.READ): Phase.UP,
    **{(phase, Signal.SILENT): Phase.HUNG for phase in (Phase.GREETED, Phase.UP)},
    (Phase.HUNG, Signal.ANSWERED): Phase.GREETED,
    **{(phase, Signal.CUT): Phase.DOWN for phase in (Phase.GREETED, Phase.UP, Phase.HUNG)},
}
"""The next phase. A pair that is not in here can't happen."""


class Change(Enum):
    """What has happened to the connection, for the actor."""

    CONNECTED = auto()
    """QEMU answers, over a new connection or again over the same one; what it shows is to be read."""
    FAILED = auto()
    """One more attempt to connect did not work."""
    HUNG = auto()
    LOST = auto()


class MonitorConnection:
    """The connection of one domain, whether it stands or not.

    `hint` is called when QEMU tells that something has happened, `on_progress` when there is something to harvest.
    `has_images` says whether the images are known that the domain has while it is off.
    """

    def __init__(
        self,
        registration: Registration,
        driver: Driver,
        clock: Clock,
        *,
        hint: Callable[[], None],
        on_progress: Callable[[], None],
        has_images: Callable[[], bool],
    ) -> None:
        self.domain = registration.id
        self.driver = driver
        self.runner: Runner | None = None
        self.process: Process | None = None
        self.tried = asyncio.Event()
        self.error: Problem | None = None
        self.final_reports: Mapping[str, Observed] = {}
        self.phase = Phase.DOWN
        self._registration = registration
        self._clock = clock
        self._hint = hint
        self._on_progress = on_progress
        self._has_images = has_images
        self._guest = Guest.RUNNING
        self._connecting: asyncio.Task[Runner] | None = None
        self._probe: asyncio.Task[Guest] | None = None
        self._attempts = 0
        self._cuts = 0
        self._since = 0.0
        self._due = 0.0
        self._last: Runner | None = None
        if registration.address is not None:
            self.error = self._unreachable("connecting")

    @property
    def facts(self) -> QemuFacts | None:
        """Who answers, while the connection stands."""
        return self.runner.facts if self.runner else None

    @property
    def usable(self) -> Runner | None:
        """The runner, if QEMU answers there."""
        return None if self.phase is Phase.HUNG else self.runner

    @property
    def shows(self) -> bool:
        """Whether the connection stands, and all that the domain shows was read over it."""
        return self.phase is Phase.UP

    def state(self) -> DomainState:
        """The domain's state as it shows from here."""
        if self.phase is Phase.UP:
            return DomainState(self._guest.value)
        if self.phase is Phase.BUSY:
            return DomainState.BUSY
        off = self._registration.address is None or self._has_images()
        shut = off and self.phase is Phase.DOWN and not self.is_alive()
        return DomainState.SHUTOFF if shut else DomainState.UNREACHABLE

    def welcome(self, guest: Guest) -> None:
        """All that a domain shows has been read over the new connection; from now on it shows."""
        self._move(Signal.READ)
        self._guest, self.error = guest, None

    def is_alive(self, process: Process | None = None) -> bool:
        """Whether that process (if None: the QEMU that was seen last) is known to run still."""
        which = process or self.process
        return which is not None and self.driver.alive(which) is True

    def is_gone(self, process: Process | None) -> bool:
        """Whether that process (if None: the QEMU that was seen last) is known to have ended."""
        which = process or self.process
        return which is not None and self.driver.alive(which) is False

    def is_another(self, process: Process | None) -> bool:
        """Whether it is known that not that process answers: another does, or nobody."""
        return self.runner is None or same_process(process, self.process) is Sameness.OTHER

    def has_ended(self, process: Process | None) -> bool:
        """Whether that process has ended, or nobody will ever know whether it has, and another one answers by now."""
        if self.is_gone(process):
            return True
        unknowable = process is None or process.pid is None or process.started is None
        if process is not None and self.process is not None:
            unknowable |= same_view(process.view, self.process.view) is Sameness.UNKNOWN
        return unknowable and self.runner is not None and self.is_another(process)

    def heard_to_the_end(self, runner: Runner, job_id: str) -> bool:
        """Whether nothing came after what `runner` has heard: QEMU itself ended it, and the job was not at its end."""
        return runner is self._last and runner.heard_to_the_end(job_id)

    def require(self) -> Runner:
        """The runner; raises `Refused` where QEMU can't be asked."""
        runner = self.usable
        if runner is None:
            raise Refused(self.error or self._unreachable("the domain is off"))
        return runner

    def refusal(self, error: MonitorError) -> Problem:
        """What to tell a caller whose request met `error`."""
        return error.problem if isinstance(error, Declined) else self.error or self._unreachable(str(error))

    @property
    def deadline(self) -> float:
        """When `begin` has something to begin next, on the clock's seconds."""
        task = self._connecting if self.runner is None else self._probe
        idle = task is not None or (self.runner is None and self._registration.address is None)
        return float("inf") if idle else self._due

    @property
    def pending(self) -> bool:
        """Whether `end` has something to harvest."""
        ended = any(task is not None and task.done() for task in (self._connecting, self._probe))
        return ended or (self.runner is not None and not self.runner.connected)

    def probe_soon(self) -> None:
        """Have the next heartbeat begin soon."""
        if self.phase in (Phase.UP, Phase.HUNG):
            self._due = self._clock.monotonic()

    def begin(self) -> None:
        """Begin an attempt to connect, or a heartbeat, if it is time for one."""
        if self._clock.monotonic() < self.deadline:
            return
        if self.runner is not None:
            self._probe = asyncio.create_task(_ask_for_life(self.runner))
            self._probe.add_done_callback(lambda _task: self._on_progress())
        elif self._registration.address is not None:
            self._connecting = asyncio.create_task(self.driver.connect(self._registration.address, self._hint))
            self._connecting.add_done_callback(lambda _task: self._on_progress())

    async def end(self) -> Change | None:
        """Take in what was begun and has ended; what that changed."""
        if self.runner is not None and not self.runner.connected:
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
                self._guest = probe.result()
            except MonitorError as error:
                return await self.fail(error)
            if self.phase is Phase.HUNG:
                self._move(Signal.ANSWERED)
                self.error = None
                return Change.CONNECTED
        return None

    async def fail(self, error: MonitorError) -> Change | None:
        """Take in that a call met `error`."""
        if isinstance(error, Unreachable) and self.runner is not None:
            return await self._lose(str(error))
        if isinstance(error, Unanswered) and self.phase in (Phase.GREETED, Phase.UP):
            self._move(Signal.SILENT)
            self.error = self._unreachable(str(error))
            return Change.HUNG
        return None

    async def close(self) -> None:
        """End the connection and whatever was begun."""
        await self._stop_probe()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
            if not self._connecting.cancelled() and self._connecting.exception() is None:
                self.runner = self._connecting.result()
        if self.runner is not None:
            await self.runner.close()

    def _move(self, signal: Signal) -> None:
        self.phase = PHASES[self.phase, signal]

    def _connected(self, runner: Runner) -> Change:
        self._move(Signal.CONNECTED)
        self.runner, self.process = runner, runner.facts.process
        self._since = self._clock.monotonic()
        self._due = self._since + HEARTBEAT_S
        return Change.CONNECTED

    def _connect_failed(self, error: MonitorError) -> Change:
        self._retry()
        held = isinstance(error, Busy)
        self._move(Signal.HELD if held else Signal.REFUSED)
        code = Code.MONITOR_BUSY if held else Code.MONITOR_UNREACHABLE
        self.error = Problem(code=code, detail=f"domain {self._registration.id}: {error}")
        if self.state() is DomainState.SHUTOFF:
            self.error = None
        return Change.FAILED

    async def _lose(self, why: str) -> Change:
        await self._stop_probe()
        if self.runner is not None:
            self.final_reports = dict(self.runner.final_reports)
            await self.runner.close()
        self._move(Signal.CUT)
        self._last, self.runner = self.runner, None
        self.error = self._unreachable(why)
        now = self._clock.monotonic()
        if now < self._since + STABLE_AFTER_S:
            self._due = now + CUT_S[min(self._cuts, len(CUT_S) - 1)]
            self._cuts += 1
            self._attempts += 1
        else:
            self._attempts, self._cuts, self._due = 0, 0, now
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


async def _ask_for_life(runner: Runner) -> Guest:
    try:
        async with asyncio.timeout(HEARTBEAT_TIMEOUT_S):
            return await runner.guest()
    except TimeoutError:
        raise Unanswered(f"QEMU has not answered for {HEARTBEAT_TIMEOUT_S:.0f} s") from None
