"""One run from one seed: a world, a service, clients, faults, and a calm end."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import MutableMapping
from dataclasses import dataclass
from random import Random
from typing import Any

from app.core.states import State
from tests.engine.simulation.builder import build
from tests.engine.simulation.clients import Clients
from tests.engine.simulation.engine import Engine, Mutant, logs_into
from tests.engine.simulation.faults import Faults
from tests.engine.simulation.hazards import BOUNDS, DEFAULT, Bounds, Hazards
from tests.engine.simulation.invariants import Invariants
from tests.engine.simulation.loop import OWNER, SimLoop
from tests.engine.simulation.trace import Trace, Violation
from tests.engine.simulation.world import World

STEPS = 150
"""Steps of a run, if it is not told otherwise."""


LAST_REQUESTS_S = 10.0
"""Seconds after the end of all faults in which the last requests come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a run; `seconds` are virtual ones."""

    seed: int
    steps: int
    seconds: float
    violation: Violation | None
    trace: Trace

    @property
    def counts(self) -> Counter[str]:
        """How often each kind of thing happened."""
        return self.trace.counts

    def report(self) -> str:
        """For a person: what failed, and what led to it."""
        return f"seed {self.seed}: {self.violation}\n{self.trace.tail()}"


class Simulation:
    """A run that is under way."""

    def __init__(
        self, seed: int, hazards: Hazards, *, steps: int = STEPS, mutant: Mutant | None = None, bounds: Bounds = BOUNDS
    ) -> None:
        self.seed = seed
        self.steps = steps
        self.done = 0
        self.rng = Random(seed)
        self.loop = SimLoop(lambda: self.rng.random() * 0.002 + 0.0002)
        self.world = World(self.rng, self.loop, hazards)
        places = self.rng.choice([1, 2]) if hazards.scarce and self.rng.random() < 0.5 else 16
        self.engine = Engine(self.world, places=places, mutant=mutant)
        self.clients = Clients(self.world, self.engine)
        self.invariants = Invariants(self.world, self.engine, self.clients, bounds)
        self.faults = Faults(self.world, self.engine, self.clients, self.invariants)
        self._calm_s = bounds.calm_s

    def run(self) -> Outcome:
        """From the first to the last step, or to the first violation."""
        violation: Violation | None = None
        asyncio.set_event_loop(self.loop)
        try:
            with logs_into(self._log):
                self.loop.run_until_complete(self._run())
        except Violation as found:
            violation = found
        finally:
            self._end()
        return Outcome(
            seed=self.seed, steps=self.done, seconds=self.loop.time(), violation=violation, trace=self.world.trace
        )

    def _log(self, entry: MutableMapping[str, Any]) -> None:
        error = entry.get("exc_info")
        text = " ".join(f"{key}={value}" for key, value in entry.items() if key != "exc_info")
        self.world.trace.note(f"log {entry['level']}: {entry['event']}", text)
        if error:
            self.invariants.crashes.append(f"{text}: {sys.exc_info()[1]!r}")

    async def _run(self) -> None:
        OWNER.set("world")
        build(self.world)
        await self._start_service()
        for machine in self.world.machines.values():
            if not machine.discovered:
                self.clients.put(machine)
        await asyncio.sleep(1)
        for _ in range(self.steps):
            self.done += 1
            self.faults.step()
            await asyncio.sleep(self.rng.choice([0, 0.001, 0.01, 0.05, 0.2, 0.5, 1.0, 2.5]))
            self.invariants.check()
        await self._calm()

    async def _start_service(self) -> None:
        await asyncio.get_running_loop().create_task(self.engine.start())

    async def _calm(self) -> None:
        await self.faults.calm()
        await asyncio.sleep(LAST_REQUESTS_S)
        if not await self._wait(lambda: not self.clients.waiting):
            raise Violation("requests_are_answered", "a request is still waiting")
        if not await self._wait(lambda: not self.invariants.unsettled()):
            job = self.invariants.unsettled()[0]
            raise Violation("jobs_end", f"{job.id} of {job.domain} stays {job.state}")
        for _ in range(6):
            for job in list(self.invariants.jobs.values()):
                if job.state is State.READY:
                    self.clients.steer(job.id, "pivot" if job.pivotable else "abort")
                elif job.state is State.PAUSED:
                    self.clients.steer(job.id, "resume")
            if await self._wait(lambda: all(job.ended for job in self.invariants.jobs.values())):
                break
        await asyncio.sleep(2)
        self.invariants.check()
        self.invariants.all_has_ended()
        self.engine.finished = True
        await self.engine.stop()
        self.invariants.no_task_has_died()

    async def _wait(self, done: Any) -> bool:
        until = self.loop.time() + self._calm_s
        while self.loop.time() < until:
            await asyncio.sleep(0.5)
            self.done += 1
            self.invariants.check()
            if done():
                return True
        return False

    def _end(self) -> None:
        self.engine.finished = True
        self.engine.kill()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self.loop.run_until_complete(asyncio.wait(tasks, timeout=60))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()
        asyncio.set_event_loop(None)
        self.engine.database.close()


def simulate(
    seed: int,
    hazards: Hazards = DEFAULT,
    *,
    steps: int = STEPS,
    mutant: Mutant | None = None,
    bounds: Bounds = BOUNDS,
) -> Outcome:
    """Run one seed."""
    return Simulation(seed, hazards, steps=steps, mutant=mutant, bounds=bounds).run()
