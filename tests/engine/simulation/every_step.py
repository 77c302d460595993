"""One scenario, played again and again with something wrong at its i-th call of a port.

A call can be made twice, fail before or after it took effect, or be the last one before the service is killed. Nothing
here knows a kind of job: `SCENARIOS` lists the stories of each.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import Any, Final, cast

from app.core.errors import Code
from app.core.job import Job
from app.core.kinds.commit import CommitFlag, CommitRequest
from app.core.kinds.pull import PullRequest
from app.core.states import OnReady, State
from app.engine.ports.driver import Driver, MonitorError, Unanswered
from app.engine.ports.images import Images
from app.engine.ports.journal import Journal, JournalError
from app.engine.shared import Shared
from tests.engine.simulation.clients import Clients
from tests.engine.simulation.engine import Engine, Mutant, logs_into
from tests.engine.simulation.hazards import BOUNDS, NONE
from tests.engine.simulation.invariants import Invariants
from tests.engine.simulation.loop import OWNER, SimLoop
from tests.engine.simulation.monitor import Monitor
from tests.engine.simulation.trace import Violation
from tests.engine.simulation.world import Machine, World

SECONDS: Final = 120
"""Virtual seconds in which a scenario ends, whatever goes wrong once."""


class Wrong(Enum):
    """What goes wrong with a call."""

    NOTHING = "nothing"
    TWICE = "twice"
    FAILS_BEFORE = "fails before"
    FAILS_AFTER = "fails after"
    KILLED_BEFORE = "killed before"
    KILLED_AFTER = "killed after"


RUNNER: Final = frozenset(
    {
        *("disks", "survey", "observe", "start", "pivot", "abort", "pause"),
        *("resume", "set_speed", "finalize", "flush", "conclude"),
    }
)
IMAGES: Final = frozenset(
    {
        "identities",
        "free_bytes",
        "is_device",
        "open_files",
        "locked",
        "undeletable",
        "unlink",
        "read_header",
        "sync",
        "header_facts",
        "offline_disk",
        "overlays_on",
        "is_there",
    }
)
JOURNAL: Final = frozenset({"add_jobs", "store", "tell_domain", "record_uses", "change_marks"})
STORES: Final = frozenset({"add_jobs", "store"})
READS: Final = IMAGES - {"unlink"}
"""Calls of `Images` that raise nothing, and change nothing."""


class Fuse:
    """Counts the calls; at the one with the number `at` it does what is `wrong`."""

    def __init__(self, at: int, wrong: Wrong) -> None:
        self.calls = 0
        self.name = ""
        self.kill: Callable[[], None] = lambda: None
        self._at = at
        self._wrong = wrong

    async def around(self, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        """The call, or what goes wrong with it."""
        self.calls += 1
        if self.calls != self._at:
            return await call()
        self.name = name
        match self._wrong:
            case Wrong.NOTHING:
                return await call()
            case Wrong.TWICE:
                return await self._twice(name, call)
            case Wrong.FAILS_BEFORE:
                raise _failure(name)
            case Wrong.FAILS_AFTER:
                done = await call()
                # The journal's promise is that nothing was stored, and a read that is over has nothing to fail at.
                if name in JOURNAL or name in READS:
                    return done
                raise _failure(name)
            case Wrong.KILLED_BEFORE:
                self.kill()
                raise asyncio.CancelledError
            case Wrong.KILLED_AFTER:
                await call()
                self.kill()
                raise asyncio.CancelledError

    async def _twice(self, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        done = await call()
        if name in STORES:
            # Stored twice is what the journal itself refuses.
            return done
        try:
            await call()
        except MonitorError:
            # What has been done is declined at the second time; the engine has its answer.
            return done
        return done


def _failure(name: str) -> Exception:
    if name in JOURNAL:
        return JournalError(Code.JOURNAL_FULL, "the test's journal is full")
    return Unanswered(f"the test's {name} has no answer")


class Around:
    """A port, its calls `names` going through a fuse."""

    def __init__(self, inner: object, fuse: Fuse, names: frozenset[str]) -> None:
        self._inner = inner
        self._fuse = fuse
        self._names = names

    def __getattr__(self, attribute: str) -> Any:
        found: Any = getattr(self._inner, attribute)
        if attribute == "connect":
            return self._connect
        if attribute not in self._names or not inspect.iscoroutinefunction(found):
            return found

        async def call(*arguments: Any, **named: Any) -> Any:
            return await self._fuse.around(attribute, lambda: found(*arguments, **named))

        return call

    async def _connect(self, *arguments: Any) -> Any:
        runner = await cast("Driver", self._inner).connect(*arguments)
        return Around(runner, self._fuse, RUNNER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A commit of `top` into the base, and what is asked once it is ready; it ends as `state`.

    `pulls`: a pull into `top` instead, down to the layer at `base` (None: of all).
    """

    name: str
    top: int
    pulls: bool = False
    base: int | None = None
    flags: CommitFlag = CommitFlag(0)
    on_ready: OnReady = OnReady.WAIT
    asked: str | None = None
    state: State = State.COMPLETED

    @property
    def merges(self) -> bool:
        """Whether the layers are gone afterwards."""
        return self.state is State.COMPLETED and self.on_ready is not OnReady.KEEP

    @property
    def request(self) -> CommitRequest | PullRequest:
        """What is asked for."""
        top, base = f"vda[{self.top}]", None if self.base is None else f"vda[{self.base}]"
        if self.pulls:
            return PullRequest(top=top, base=base)
        return CommitRequest(top=top, base=base, flags=self.flags, on_ready=self.on_ready)


ACTIVE: Final = CommitFlag.ACTIVE

SCENARIOS: Final[Mapping[str, tuple[Scenario, ...]]] = {
    "commit": (
        Scenario(name="below", top=1),
        Scenario(name="below, delete", top=1, flags=CommitFlag.DELETE),
        Scenario(name="pivot", top=0, flags=ACTIVE, on_ready=OnReady.PIVOT),
        Scenario(name="pivot, delete", top=0, flags=ACTIVE | CommitFlag.DELETE, on_ready=OnReady.PIVOT),
        Scenario(name="keep", top=0, flags=ACTIVE, on_ready=OnReady.KEEP),
        Scenario(name="wait, pivot", top=0, flags=ACTIVE, asked="pivot"),
        Scenario(name="wait, abort", top=0, flags=ACTIVE, asked="abort", state=State.CANCELED),
    ),
    "pull": (
        Scenario(name="pull all", top=0, pulls=True),
        Scenario(name="pull", top=0, base=3, pulls=True),
        Scenario(name="pull below", top=1, base=3, pulls=True),
    ),
}
"""The stories of each kind of job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """How a scenario went: the calls of its ports, the one at which it went wrong, its jobs, and what is broken."""

    calls: int
    name: str
    jobs: tuple[Job, ...]
    truth: Mapping[str, str]
    deleted: tuple[str, ...]
    violation: Violation | None
    trace: str


class Play:
    """A scenario that is under way."""

    def __init__(self, scenario: Scenario, at: int, wrong: Wrong, *, blockdev: bool) -> None:
        rng = Random(1)
        self._scenario = scenario
        self._loop = SimLoop(lambda: 0.001)
        self._world = World(rng, self._loop, NONE)
        self._fuse = Fuse(at, wrong)
        self._engine = Engine(self._world, places=4, mutant=Mutant(wrap_ports=self._wrap))
        self._fuse.kill = self._engine.kill
        self._clients = Clients(self._world, self._engine)
        self._invariants = Invariants(self._world, self._engine, self._clients, BOUNDS)
        active = self._world.make_chain("/images", "vda", 4)
        self._machine = Machine(
            name="vm0",
            monitor=Monitor(self._world, "vm0"),
            disks=(self._world.make_disk("vda", active, backend=None if blockdev else "drive-vda"),),
            uuid=None,
            blockdev=blockdev,
            stable=True,
            remote=False,
            discovered=True,
            offline=False,
        )
        self._world.machines["vm0"] = self._machine

    def _wrap(self, shared: Shared) -> None:
        shared.drivers = {
            name: cast("Driver", Around(driver, self._fuse, RUNNER)) for name, driver in shared.drivers.items()
        }
        shared.images = cast("Images", Around(shared.images, self._fuse, IMAGES))
        shared.journal = cast("Journal", Around(shared.journal, self._fuse, JOURNAL))

    def run(self) -> Played:
        """Play it to its end."""
        violation: Violation | None = None
        asyncio.set_event_loop(self._loop)
        try:
            with logs_into(lambda entry: self._world.trace.note("log", str(entry["event"]))):
                self._loop.run_until_complete(self._run())
        except Violation as found:
            violation = found
        finally:
            self._engine.finished = True
            self._engine.kill()
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(1))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
            asyncio.set_event_loop(None)
        return Played(
            calls=self._fuse.calls,
            name=self._fuse.name,
            jobs=tuple(self._invariants.jobs.values()),
            truth=dict(self._world.truth),
            deleted=tuple(self._world.files.unlinked),
            violation=violation,
            trace=self._world.trace.tail(),
        )

    async def _run(self) -> None:
        OWNER.set("world")
        scenario, invariants = self._scenario, self._invariants
        self._world.start(self._machine)
        await self._loop.create_task(self._engine.start())
        await asyncio.sleep(1)
        until = self._loop.time() + SECONDS
        while self._loop.time() < until:
            await asyncio.sleep(0.25)
            invariants.check()
            jobs = list(invariants.jobs.values())
            job = jobs[-1] if jobs else None
            # A client that got no answer looks whether there is a job, and asks again if there is none.
            if job is None or (job.state is State.FAILED and job.started_at is None and len(jobs) < 3):
                if not self._clients.waiting:
                    self._clients.start(self._machine, "vda", scenario.request)
            elif job.ended:
                break
            elif job.state is State.READY and scenario.asked is not None and not self._clients.waiting:
                self._clients.steer(job.id, scenario.asked)
        await asyncio.sleep(3)
        invariants.check()
        invariants.all_has_ended()


def play(scenario: Scenario, at: int = 0, wrong: Wrong = Wrong.NOTHING, *, blockdev: bool = True) -> Played:
    """Play a scenario, with something wrong at its call number `at` (from 1 on)."""
    return Play(scenario, at, wrong, blockdev=blockdev).run()
