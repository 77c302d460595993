"""An event loop in virtual time: it never waits, has no threads, and does the same in each run.

When nothing is ready its clock jumps to the next timer. What the code sends to an executor is done at once, inline, and
the result is handed over a moment later, so that other tasks run in between as they do in reality.
"""

from __future__ import annotations

import asyncio
import contextvars
from asyncio.base_events import BaseEventLoop
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Final, TypeVar

from tests.engine.simulation.trace import Violation

T = TypeVar("T")

EPOCH_MS: Final = 1_700_000_000_000
"""Milliseconds since 1970 at the start of each simulation."""

START: Final = 1000.0
"""What the loop's clock says at the start of each simulation, in seconds."""

TURN: Final = 1e-6
"""Seconds that one turn of the loop takes. Sums of times are rounded: a clock that stood still might not arrive."""

TURNS_MAX: Final = 20_000
"""Turns of the loop in one virtual second, beyond which something runs in a circle."""

OWNER: Final[contextvars.ContextVar[str]] = contextvars.ContextVar("owner", default="world")
"""Who has started a task: a service (`service 1`, `service 2`, ...), `client`, or the world."""


class SimTask(asyncio.Task[T]):
    """A task that sorts in sets by its number, as its address differs from run to run; and it knows its owner."""

    def __init__(self, coro: Coroutine[Any, Any, T] | Generator[Any, Any, T], *, number: int, **named: Any) -> None:
        self.number = number
        self.owner = OWNER.get()
        super().__init__(coro, **named)

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return self is other


class _Selector:
    """Stands where the loop asks the kernel what is ready: it moves the clock instead."""

    def __init__(self) -> None:
        self.now = START
        self._second = 0
        self._turns = 0

    def select(self, timeout: float | None) -> list[object]:
        """Let the time pass until the next timer."""
        if timeout is None:
            raise RuntimeError("the simulation waits for something that never comes")
        self.now += timeout + TURN
        if int(self.now) != self._second:
            self._second, self._turns = int(self.now), 0
        self._turns += 1
        if self._turns > TURNS_MAX:
            raise Violation("nothing_spins", f"more than {TURNS_MAX} turns of the loop in one second")
        return []

    def close(self) -> None:
        """Nothing is open."""


class SimLoop(BaseEventLoop):
    """The loop. `latency` is for how many seconds the result of an executor's work is on its way."""

    def __init__(self, latency: Callable[[], float]) -> None:
        super().__init__()
        self._selector = _Selector()
        self._clock_resolution = 1e-6
        self._latency = latency
        self._tasks = 0
        self.failed: list[tuple[SimTask[Any], BaseException]] = []
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        """Virtual seconds."""
        return self._selector.now

    def _make_task(self, _loop: object, coro: Any, **named: Any) -> asyncio.Future[Any]:
        self._tasks += 1
        task: SimTask[Any] = SimTask(coro, number=self._tasks, loop=self, **named)
        task.add_done_callback(self._note_end)
        return task

    def _note_end(self, task: asyncio.Future[Any]) -> None:
        assert isinstance(task, SimTask)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failed.append((task, error))

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # noqa: ARG002
        """Do it now; the result comes a moment later."""
        future: asyncio.Future[T] = self.create_future()
        try:
            result = func(*args)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's to see
            self.call_later(self._latency(), _fail, future, error)
        else:
            self.call_later(self._latency(), _answer, future, result)
        return future

    def _process_events(self, event_list: object) -> None:
        """There is no file to watch."""

    def _write_to_self(self) -> None:
        """Nobody else's thread is waiting for this loop."""


def _answer(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


class SimClock:
    """The `Clock` port on a loop's time."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop

    def now(self) -> int:
        """Milliseconds since 1970, UTC."""
        return EPOCH_MS + round((self._loop.time() - START) * 1000)

    def monotonic(self) -> float:
        """Seconds, for durations."""
        return self._loop.time()
