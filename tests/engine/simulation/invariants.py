"""What has to hold at any time, whatever happens; each check raises `Violation`."""

from __future__ import annotations

from typing import Any

from app.core.job import Job
from app.core.states import ENDINGS, Intent, OnReady, State
from app.engine.ports.driver import MonitorError
from app.journal.codec import decode_job
from tests.engine.simulation.clients import Clients
from tests.engine.simulation.engine import Engine
from tests.engine.simulation.files import CLUSTERS, Content, merged
from tests.engine.simulation.hazards import Bounds
from tests.engine.simulation.trace import Violation
from tests.engine.simulation.world import World

ENDING_TYPES = frozenset(type_.value for type_ in ENDINGS.values())


class Invariants:
    """Checks a world, its engine and its journal after each step; `jobs` are the journal's."""

    def __init__(self, world: World, engine: Engine, clients: Clients, bounds: Bounds) -> None:
        self.jobs: dict[str, Job] = {}
        self._world = world
        self._engine = engine
        self._clients = clients
        self._bounds = bounds
        self._last_event = 0
        self._last_time = 0
        self._over: set[str] = set()
        self._published = 0
        self._since: dict[tuple[str, str], float] = {}
        self._failed = 0
        self._written = -1
        self.crashes: list[str] = []

    def check(self) -> None:
        """All that hold after each step."""
        self.no_task_has_died()
        if self._engine.database.total_changes != self._written:
            self._written = self._engine.database.total_changes
            self.jobs_move_forward()
            self.events_are_in_order()
            self.outcomes_are_true()
        self.accepted_jobs_are_known()
        if self._world.touched:
            self._world.touched = False
            self.guests_read_their_data()
        self.nothing_spins()
        self.one_actor_for_a_domain()
        self.ready_jobs_are_looked_at()
        self.free_places_are_used()
        self.nodes_are_released()

    # The engine -------------------------------------------------------------------------------------------------------

    def no_task_has_died(self) -> None:
        """No task of the engine has ended with a surprise, and no client was answered with an internal error."""
        failed = self._world.loop.failed
        for task, error in failed[self._failed :]:
            if not isinstance(error, MonitorError):
                raise Violation("no_task_has_died", f"{task.get_coro()} ended with {error!r}")
        self._failed = len(failed)
        for text in [*self.crashes, *self._clients.errors]:
            raise Violation("no_task_has_died", text)

    def nothing_spins(self) -> None:
        """The engine does not call its ports over and over again without a pause."""
        busiest, bounds = self._world.trace.busiest, self._bounds
        if busiest["calls"] > bounds.calls_a_second:
            raise Violation("nothing_spins", f"{busiest['calls']} calls of ports in one second")
        if busiest["failed writes"] > bounds.failed_writes_a_second:
            raise Violation("nothing_spins", f"{busiest['failed writes']} failed writes in one second")

    def one_actor_for_a_domain(self) -> None:
        """At most one actor works for a domain: the service has one connection to a monitor, or one attempt at it."""
        for machine in self._world.machines.values():
            if machine.monitor.service_clients > 1:
                raise Violation(
                    "one_actor_for_a_domain",
                    f"the service holds or tries {machine.monitor.service_clients} connections to {machine.name}",
                )

    # The journal ------------------------------------------------------------------------------------------------------

    def jobs_move_forward(self) -> None:
        """A job's version only rises, and a job that has ended never changes, unless a person judges a lost one."""
        for id_, version, body in self._engine.database.execute("SELECT id, version, body FROM jobs"):
            before = self.jobs.get(id_)
            if before is not None and before.version == version:
                continue
            job = self.jobs[id_] = decode_job(body)
            if before is None:
                continue
            if version < before.version:
                raise Violation("jobs_move_forward", f"{id_} went from version {before.version} to {version}")
            if before.ended and not (before.state is State.LOST and job.resolved is not None):
                raise Violation("jobs_move_forward", f"{id_} was {before.state} and is {job.state}")
            if job.ended:
                self._world.trace.note(f"job ended: {job.state}", f"{id_} {job.error.detail if job.error else ''}")

    def events_are_in_order(self) -> None:
        """Stored events have rising ids and times, none of a job follows its end, and subscribers get that order."""
        rows: list[tuple[Any, ...]] = self._engine.database.execute(
            "SELECT id, time, type, job_id FROM events WHERE id > ? ORDER BY id", (self._last_event,)
        ).fetchall()
        for id_, time, type_, job_id in rows:
            if time < self._last_time:
                raise Violation("events_are_in_order", f"the event {id_} is older than the one before it")
            self._last_event, self._last_time = id_, time
            job = self.jobs.get(job_id or "")
            if job_id in self._over and not (job is not None and job.resolved):
                raise Violation("events_are_in_order", f"the event {id_} ({type_}) follows the end of {job_id}")
            if job_id is not None and type_ in ENDING_TYPES:
                self._over.add(job_id)
        published = self._engine.published
        for one, other in zip(published[self._published :], published[self._published + 1 :], strict=False):
            if one.id is not None and other.id is not None and other.id <= one.id:
                raise Violation("events_are_in_order", f"{other.id} was published after {one.id}")
        self._published = max(0, len(published) - 1)

    def accepted_jobs_are_known(self) -> None:
        """A job that a client was told of is in the journal."""
        for id_ in self._clients.accepted:
            if id_ not in self.jobs:
                raise Violation("accepted_jobs_are_known", f"{id_} was accepted, and is not in the journal")

    # Outcomes and data ------------------------------------------------------------------------------------------------

    def outcomes_are_true(self) -> None:
        """`completed` means merged (or copied, with `keep`), by that job; `failed` and `canceled` mean not merged."""
        for job in self.jobs.values():
            if not job.ended or job.resolved is not None:
                continue
            outcome = self._world.truth.get(job.id)
            done = outcome == ("kept" if job.on_ready is OnReady.KEEP else "merged")
            if job.state is State.COMPLETED and not done:
                raise Violation("completed_is_true", f"{job.id} is completed; in QEMU it was {outcome}")
            if job.state in (State.FAILED, State.CANCELED) and outcome == "merged":
                raise Violation("unmerged_is_true", f"{job.id} is {job.state} ({job.error}); in QEMU it was merged")

    def guests_read_their_data(self) -> None:
        """Every guest reads what it has written, now and after QEMU was killed, whatever domain the images are of.

        This includes that no file is missing which a chain needs, and that no base is overwritten which another one
        uses.
        """
        files = self._world.files
        for machine in self._world.machines.values():
            for disk in machine.disks:
                name = f"{machine.name}/{disk.target}"
                qemu = machine.qemu
                if qemu is not None:
                    _compare(name, "reads", qemu.view(disk.target), disk.expected)
                try:
                    images = files.chain(disk.active)
                except KeyError as missing:
                    raise Violation("guests_read_their_data", f"{name} needs {missing}, which is gone") from missing
                view = merged([image.clusters for image in images])
                _compare(name, "would read after a kill of QEMU", view, disk.expected)

    def nodes_are_released(self) -> None:
        """A completed merge leaves no node of its layers in QEMU, as that would be in the way of the next job."""
        for qemu in self._world.processes:
            if not qemu.up:
                continue
            for id_, ended in qemu.ended.items():
                job = self.jobs.get(id_)
                if job is None or job.state is not State.COMPLETED or ended.outcome != "merged" or job.resolved:
                    continue
                # A node below one that a lost job has left can't be deleted.
                held = [node.below for node in qemu.nodes.values()]
                left = [node.name for node in ended.layers if qemu.nodes.get(node.name) is node and node not in held]
                if left and job.control.intent is not Intent.KEEP:
                    raise Violation("nodes_are_released", f"{id_} is completed, and its nodes {left} are left")

    # Time -------------------------------------------------------------------------------------------------------------

    def ready_jobs_are_looked_at(self) -> None:
        """A ready job whose `on_ready` is `pivot` is pivoted soon, while its QEMU answers."""
        waiting: set[tuple[str, str]] = set()
        for machine in self._world.machines.values():
            qemu = machine.qemu
            if qemu is None or qemu.hung or machine.monitor.held_until > self._world.loop.time():
                continue
            for id_, block in qemu.jobs.items():
                job = self.jobs.get(id_)
                if job is None or job.ended or job.on_ready is not OnReady.PIVOT or self._engine.service is None:
                    continue
                if block.status == "ready" and not (block.complete or block.gentle_cancel):
                    waiting.add(("ready", id_))
                    self._overdue("ready", id_, machine.name, self._bounds.ready_s)
        self._forget("ready", waiting)

    def free_places_are_used(self) -> None:
        """A job that waits for a place gets one soon after it is free, and none is kept by a domain that is away."""
        waiting: set[tuple[str, str]] = set()
        unfinished = [job for job in self.jobs.values() if not job.ended]
        occupied = sum(job.state is not State.QUEUED for job in unfinished)
        for job in unfinished:
            machine = self._world.machines.get(job.domain)
            if job.state is not State.QUEUED or occupied >= self._engine.places or machine is None:
                continue
            qemu = machine.qemu
            held = machine.monitor.held_until > self._world.loop.time()
            if qemu is not None and not qemu.hung and not held and self._engine.service is not None:
                waiting.add(("queued", job.id))
                self._overdue("queued", job.id, machine.name, self._bounds.queue_s)
        self._forget("queued", waiting)

    def _overdue(self, what: str, id_: str, domain: str, bound: float) -> None:
        now = self._world.loop.time()
        since = self._since.setdefault((what, id_), now)
        quiet = self._world.quiet_since(self._world.machines[domain]) + self._bounds.after_trouble_s
        if now - max(since, quiet) > bound:
            name = "ready_jobs_are_looked_at" if what == "ready" else "free_places_are_used"
            raise Violation(name, f"{id_} of {domain} is {what} since {since:.1f}")

    def _forget(self, what: str, still: set[tuple[str, str]]) -> None:
        for key in [key for key in self._since if key[0] == what and key not in still]:
            del self._since[key]

    # The end ----------------------------------------------------------------------------------------------------------

    def unsettled(self) -> list[Job]:
        """Jobs that have not ended, and wait neither for a person nor for the place of a job that does."""
        unfinished = [job for job in self.jobs.values() if not job.ended]
        occupied = sum(job.state is not State.QUEUED for job in unfinished)
        waits = {State.READY, State.PAUSED} | ({State.QUEUED} if occupied >= self._engine.places else set[State]())
        return [job for job in unfinished if job.state not in waits]

    def all_has_ended(self) -> None:
        """Once all faults are over, each job ends or waits for a person, and none is left in QEMU."""
        for job in self.jobs.values():
            if not job.ended:
                raise Violation("jobs_end", f"{job.id} of {job.domain} stays {job.state}")
        for machine in self._world.machines.values():
            qemu = machine.qemu
            for id_ in qemu.jobs if qemu is not None else ():
                raise Violation("jobs_in_qemu_have_an_owner", f"{id_} is left in the QEMU of {machine.name}")


def _compare(name: str, what: str, seen: Content, expected: Content) -> None:
    if seen == expected:
        return
    cluster = next(each for each in range(CLUSTERS) if seen.get(each) != expected.get(each))
    detail = f"{name} {what} {seen.get(cluster)} at {cluster}, not {expected.get(cluster)}"
    raise Violation("guests_read_their_data", detail)
