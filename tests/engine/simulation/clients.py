"""Clients of the service: random requests, each a task of its own, and what became of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from app.core.errors import Code, Refused
from app.core.job import Job
from app.core.kinds import commit, pull
from app.core.kinds.commit import CommitFlag, CommitRequest
from app.core.kinds.pull import PullRequest
from app.core.states import OnError, OnReady, State
from app.engine.ports.driver import Address
from app.engine.ports.journal import JobFilter, JournalError, Registration
from app.engine.service import Service
from tests.engine.simulation.engine import Engine
from tests.engine.simulation.loop import OWNER
from tests.engine.simulation.world import Machine, World

STEERING: Final = ("pivot", "abort", "force", "pause", "resume", "speed")

PULLS: Final = 0.3
"""How many of the jobs are pulls."""

SERIOUS: Final = frozenset({Code.INTERNAL_ERROR})


class Clients:
    """What is asked of the service. `accepted` are the jobs that were answered with 202, `errors` what none may answer.

    `changing` are the domains that are being registered or forgotten, `deleting` the latter of them, `planning` those
    for which a commit is planned.
    """

    def __init__(self, world: World, engine: Engine) -> None:
        self.accepted: dict[str, Job] = {}
        self.errors: list[str] = []
        self.changing: set[str] = set()
        self.deleting: set[str] = set()
        self.planning: dict[str, int] = {}
        self.known: list[str] = []
        self._world = world
        self._engine = engine
        self._tasks: set[asyncio.Task[None]] = set()

    def ask(self, what: str, call: Callable[[Service], Awaitable[Any]]) -> asyncio.Task[None] | None:
        """Send a request, if there is a service."""
        service = self._engine.service
        if service is None:
            return None
        token = OWNER.set(self._engine.owner)
        task = asyncio.get_running_loop().create_task(self._ask(what, call, service), name=f"client {what}")
        OWNER.reset(token)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _ask(self, what: str, call: Callable[[Service], Awaitable[Any]], service: Service) -> None:
        trace, kind = self._world.trace, what.partition(" ")[0]
        trace.note(f"request: {kind}", what)
        try:
            answer = await call(service)
        except Refused as refused:
            trace.note(f"refused: {refused.problem.code}", f"{what}: {refused.problem.detail}")
            if refused.problem.code in SERIOUS:
                self.errors.append(f"{what}: {refused}")
        except JournalError:
            trace.note("refused: journal full", what)
        except asyncio.CancelledError:
            trace.note("answer lost", what)
            raise
        except Exception as error:  # noqa: BLE001 - a client sees an internal error
            trace.note("internal error", f"{what}: {error!r}")
            self.errors.append(f"{what}: {error!r}")
        else:
            trace.note("answered", f"{what}{': ' + answer.id if isinstance(answer, Job) else ''}", count=False)

    # Domains ----------------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether a request has not been answered."""
        return bool(self._tasks)

    def put(self, machine: Machine, *, at_once: bool = False) -> None:
        """Register a domain; `at_once`: even while the same is being registered, or forgotten."""
        name = machine.name
        if name in self.changing and not at_once:
            return
        address: Address | None = machine.address
        disks = {disk.target: disk.active for disk in machine.disks} if machine.offline and not machine.remote else {}
        registration = Registration(id=name, address=address, disks=disks)

        self._change(f"PUT {name}", name, lambda service: service.register(registration))

    def delete(self, name: str, *, at_once: bool = False) -> None:
        """Forget a domain; `at_once`: even while it is being registered, or a commit on it is being planned."""
        if at_once or not (name in self.changing or self.planning.get(name)):
            self._change(f"DELETE {name}", name, lambda service: service.forget(name))

    def _change(self, what: str, name: str, call: Callable[[Service], Awaitable[Any]]) -> None:
        task = self.ask(what, call)
        if task is None:
            return

        def over(_task: object) -> None:
            self.changing.discard(name)
            self.deleting.discard(name)

        # Not in the request itself, which may be canceled before it has begun.
        task.add_done_callback(over)
        self.changing.add(name)
        if what.startswith("DELETE"):
            self.deleting.add(name)

    def read(self, name: str) -> None:
        """Read a domain's disks."""
        self.ask(f"disks {name}", lambda service: service.disks(name))

    def stream(self, name: str, until: float) -> None:
        """Read a domain's disks again and again, several at a time; each another one, as equal reads are shared."""

        async def read(service: Service, disk: str) -> None:
            while self._world.loop.time() < until:
                try:
                    await service.disk(name, disk)
                except Refused as refused:
                    if refused.problem.code is not Code.DISK_NOT_FOUND:
                        raise

        for number in range(3):
            self.ask(f"stream {name}", lambda service, number=number: read(service, f"no disk {number}"))

    def look(self) -> None:
        """What dashboards ask for."""
        self.ask("jobs", lambda service: service.jobs(JobFilter()))
        self.ask("domains", lambda service: service.domains())

    # Jobs -------------------------------------------------------------------------------------------------------------

    def start(self, machine: Machine, target: str, request: CommitRequest | PullRequest, *, dry: bool = False) -> None:
        """Ask for a commit or a pull, or for its plan."""
        verb = "pull" if isinstance(request, PullRequest) else "commit"
        name = machine.name
        if name in self.deleting and not self._world.hazards.delete_while_planning:
            return

        async def ask(service: Service) -> Any:
            if dry:
                return await service.plan(verb, name, target, request)
            self.planning[name] = self.planning.get(name, 0) + 1
            try:
                job = await service.start(verb, name, target, request, who="client")
            finally:
                self.planning[name] -= 1
            self.accepted[job.id] = job
            self.known.append(job.id)
            return job

        ending = request.on_ready.value if isinstance(request, CommitRequest) else ""
        self.ask(f"{'dry' if dry else verb} {name}/{target} {request.top}..{request.base} {ending}", ask)

    def random_job(self, machine: Machine) -> None:
        """Ask for some job on a machine's disk."""
        if self._world.rng.random() < PULLS:
            self._random_pull(machine)
        else:
            self._random_commit(machine)

    def _random_pull(self, machine: Machine) -> None:
        rng = self._world.rng
        disk = rng.choice(machine.disks)
        depth = len(machine.qemu.chain(disk.target)) if machine.qemu is not None else 3
        top = rng.choice([0, 0, 1, rng.randint(0, depth)])
        request = pull.request(
            top=f"{disk.target}[{top}]",
            base=None if rng.random() < 0.4 else f"{disk.target}[{rng.randint(top, depth)}]",
            on_error=rng.choice(list(OnError)),
            bandwidth=rng.choice([0, 0, 0, 1]),
        )
        if isinstance(request, PullRequest):
            self.start(machine, disk.target, request, dry=rng.random() < 0.1)

    def _random_commit(self, machine: Machine) -> None:
        rng = self._world.rng
        disk = rng.choice(machine.disks)
        depth = len(machine.qemu.chain(disk.target)) if machine.qemu is not None else 3
        top = rng.choice([0, 0, 1, 1, rng.randint(0, depth)])
        flags = CommitFlag(0)
        if top == 0 and rng.random() < 0.95:
            flags |= CommitFlag.ACTIVE
        if rng.random() < 0.5:
            flags |= CommitFlag.DELETE
        shallow = rng.random() < 0.3
        base = None if shallow or rng.random() < 0.6 else f"{disk.target}[{rng.randint(top, depth)}]"
        request = commit.request(
            top=f"{disk.target}[{top}]",
            base=base,
            flags=flags | (CommitFlag.SHALLOW if shallow else CommitFlag(0)),
            on_ready=rng.choice([OnReady.PIVOT, OnReady.PIVOT, OnReady.WAIT, OnReady.KEEP])
            if top == 0
            else OnReady.WAIT,
            on_error=rng.choice(list(OnError)),
            bandwidth=rng.choice([0, 0, 0, 1]),
        )
        if isinstance(request, CommitRequest):
            self.start(machine, disk.target, request, dry=rng.random() < 0.1)

    def steer(self, job_id: str, wish: str) -> None:
        """Ask something of a job."""
        calls: dict[str, Callable[[Service], Awaitable[Any]]] = {
            "pivot": lambda service: service.pivot(job_id),
            "abort": lambda service: service.abort(job_id, force=False),
            "force": lambda service: service.abort(job_id, force=True),
            "pause": lambda service: service.pause(job_id),
            "resume": lambda service: service.resume(job_id),
            "speed": lambda service: service.set_speed(job_id, self._world.rng.choice([0, 1 << 20])),
            "resolve": lambda service: service.resolve(job_id, self._verdict(job_id), who="person"),
        }
        self.ask(f"{wish} {job_id}", calls[wish])

    def _verdict(self, job_id: str) -> State:
        return State.COMPLETED if self._world.truth.get(job_id) == "merged" else State.FAILED

    def wait(self, job_id: str) -> None:
        """Wait for a job, or follow its history."""
        if self._world.rng.random() < 0.5:
            self.ask(f"wait {job_id}", lambda service: service.wait(job_id, self._world.rng.uniform(0, 20)))
        else:
            self.ask(f"history {job_id}", lambda service: service.history(job_id))
