"""When a domain's jobs are looked at, and that this waits for nobody who asks files."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, TypeVar

import structlog

from app.engine.executor import Executor
from app.engine.jobs import DomainJobs
from app.engine.ports.clock import Clock
from app.engine.ports.driver import MonitorError
from app.engine.ports.journal import JournalError

log = structlog.get_logger(__name__)

POLL_S: Final = 0.5
"""Seconds between two looks at running jobs; QEMU has no event for progress, and two reports a second are promised."""

T = TypeVar("T")


class Looks:
    """The looks at the jobs of one domain. Only the domain's actor calls it; `woken` is what it sleeps on."""

    def __init__(self, domain: str, jobs: DomainJobs, executor: Executor, clock: Clock, woken: asyncio.Event) -> None:
        self._domain = domain
        self._jobs = jobs
        self._executor = executor
        self._clock = clock
        self._woken = woken
        self._next = 0.0

    @property
    def due(self) -> bool:
        """Whether the jobs are to be looked at now."""
        return self._jobs.look_soon or self._clock.monotonic() >= self._next

    async def wait(self, until: float, *, busy: Callable[[], bool]) -> None:
        """Sleep until the clock shows `until`, a look is due, or somebody wakes the actor; not while it is `busy`."""
        if self._jobs.needs_polling:
            self._next = min(self._next, self._clock.monotonic() + POLL_S)
        if not (self._jobs.look_soon or busy()):
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(self._next, until) - self._clock.monotonic())):
                    await self._woken.wait()
        self._woken.clear()

    async def look(self) -> None:
        """Look at the jobs. What is wrong with the monitor is left in the executor."""
        self._jobs.look_soon = False
        try:
            await self._jobs.look()
        except MonitorError as error:
            self._executor.monitor_error = error
        except JournalError as error:
            # Nothing was stored, so nothing was done: the same is seen and tried again at the next poll.
            self._jobs.look_soon = False
            log.error("journal full", domain=self._domain, error=str(error))
        # Beside a domain without jobs nothing is done until something happens there; `wait` sees to those with jobs.
        self._next = float("inf")

    async def meanwhile(self, asked: Awaitable[T], /) -> T:
        """What files answer to a request, and look at the jobs until they do.

        A file system may take its time, or hang, and a job of the domain that gets ready is not to wait for that. For
        requests only: a look that is begun in the middle of another would see half of a change.
        """
        answer = asyncio.ensure_future(asked)
        answer.add_done_callback(lambda _answer: self._woken.set())
        try:
            while not answer.done() and self._executor.monitor_error is None:
                if self.due:
                    await self.look()
                else:
                    await self.wait(float("inf"), busy=answer.done)
            return await answer
        finally:
            answer.cancel()
