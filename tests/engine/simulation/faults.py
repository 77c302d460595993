"""What happens in a step: requests, guests, other clients of QEMU, and faults, drawn by the run's one generator."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from app.core.states import State
from tests.engine.simulation.blockjob import BlockJob, QemuRefuses
from tests.engine.simulation.clients import STEERING, Clients
from tests.engine.simulation.engine import Engine
from tests.engine.simulation.invariants import Invariants
from tests.engine.simulation.qemu import Qemu
from tests.engine.simulation.world import Machine, World

CHAIN_MAX = 5
"""Layers beyond which nobody takes a snapshot."""


class Faults:
    """Draws what happens next, from what the hazards allow."""

    def __init__(self, world: World, engine: Engine, clients: Clients, invariants: Invariants) -> None:
        self._world = world
        self._engine = engine
        self._clients = clients
        self._invariants = invariants
        self._rng = world.rng
        hazards = world.hazards
        always: list[tuple[int, Callable[[], None]]] = [
            (14, self._commit),
            (8, self._steer),
            (2, lambda: self._clients.read(self._machine().name)),
            (1, self._clients.look),
            (2, self._wait),
            (1, self._resolve),
            (2, self._put),
            (1, self._delete),
            (10, lambda: self._world.guest_writes(self._machine())),
            (4, self._grow),
            (20, _nothing),
        ]
        sometimes: list[tuple[bool, int, Callable[[], None]]] = [
            (hazards.lost_replies, 3, self._lose),
            (hazards.late_replies, 2, self._delay),
            (hazards.cuts, 2, self._cut),
            (hazards.busy, 1, self._hold),
            (hazards.hangs, 1, self._hang),
            (hazards.kills, 1, self._stop_machine),
            (hazards.blips, 3, self._blip),
            (hazards.foreign, 8, self._meddle),
            (hazards.full, 1, self._fill),
            (hazards.slow_files, 1, self._slow_files),
            (hazards.journal_full, 1, self._fill_journal),
            (hazards.service_kills, 1, self._kill_service),
            (hazards.restarts, 1, self._restart_service),
            (hazards.blind, 1, self._blind),
            (hazards.foreign_revert, 4, self._revert),
            (hazards.gone_sharers, 3, self._lose_sharer),
            (hazards.double_put, 2, self._put_twice),
            (hazards.put_and_delete and not hazards.gone_sharers, 2, self._put_and_delete),
            (hazards.delete_while_planning and not hazards.gone_sharers, 4, self._commit_and_delete),
            (hazards.read_streams, 2, self._stream),
            (hazards.long_hangs, 2, self._hang_long),
        ]
        actions = always + [(weight, action) for on, weight, action in sometimes if on]
        self._weights = [weight for weight, _ in actions]
        self._actions = [action for _, action in actions]

    def step(self) -> None:
        """One thing happens."""
        self._rng.choices(self._actions, self._weights)[0]()

    def _machine(self) -> Machine:
        return self._rng.choice(list(self._world.machines.values()))

    def _seconds(self, most: float) -> float:
        return self._rng.uniform(0.1, most)

    # Requests ---------------------------------------------------------------------------------------------------------

    def _commit(self) -> None:
        machine = self._machine()
        if machine.qemu is not None or self._rng.random() < 0.1:
            self._clients.random_job(machine)

    def _put(self) -> None:
        self._clients.put(self._machine())

    def _unfinished(self) -> list[str]:
        return [job.id for job in self._invariants.jobs.values() if not job.ended]

    def _steer(self) -> None:
        jobs = self._unfinished() or self._clients.known
        if jobs:
            ready = [id_ for id_ in jobs if self._invariants.jobs[id_].state is State.READY]
            if ready and self._rng.random() < 0.5:
                self._clients.steer(self._rng.choice(ready), "pivot")
            else:
                self._clients.steer(self._rng.choice(jobs), self._rng.choice(STEERING))

    def _resolve(self) -> None:
        lost = [job.id for job in self._invariants.jobs.values() if job.state is State.LOST]
        if lost:
            self._clients.steer(self._rng.choice(lost), "resolve")

    def _wait(self) -> None:
        if self._clients.known:
            self._clients.wait(self._rng.choice(self._clients.known))

    def _delete(self) -> None:
        machine = self._machine()
        if self._world.hazards.gone_sharers:
            # Who has the service forget a machine that is off takes it upon himself that its base may be written to.
            return
        self._clients.delete(machine.name)
        self._world.loop.call_later(self._seconds(10), self._clients.put, machine)

    # Machines ---------------------------------------------------------------------------------------------------------

    def _stop_machine(self) -> None:
        machine = self._machine()
        if machine.pinned or self._pivoted_by_others(machine):
            return
        self._world.stop(machine, kill=self._rng.random() < 0.6)
        machine.off = self._rng.random() < 0.15

    def _pivoted_by_others(self, machine: Machine) -> bool:
        """Whether another client has completed a job here whose end the service has not told yet."""
        if self._world.hazards.foreign_pivot_crash:
            return False
        jobs = [self._invariants.jobs.get(id_) for id_ in self._world.foreign_complete]
        return any(job is None or (job.domain == machine.name and not job.ended) for job in jobs)

    def _hang(self) -> None:
        self._world.hang(self._machine(), self._seconds(20))

    def _hang_long(self) -> None:
        """A domain with a job that waits hangs for minutes, or so do the files; others have jobs that wait, too."""
        queued = [job for job in self._invariants.jobs.values() if job.state is State.QUEUED]
        if queued and self._rng.random() < 0.7:
            self._world.hang(self._world.machines[self._rng.choice(queued).domain], 300)
        elif self._rng.random() < 0.1:
            self._world.slow_files_until = self._world.loop.time() + 300
            self._world.trace.note("fault: hanging files")
        for machine in self._world.machines.values():
            self._clients.random_job(machine)

    def _lose_sharer(self) -> None:
        machine = self._machine()
        self._world.stop(machine, kill=self._rng.random() < 0.5)
        machine.off = True

    def _blip(self) -> None:
        qemu = self._machine().qemu
        if qemu is not None:
            for job in qemu.running:
                job.blip()
                self._world.trace.counts["blip"] += 1
            self._world.keep_moving(qemu)

    # Connections ------------------------------------------------------------------------------------------------------

    def _lose(self) -> None:
        machine = self._machine()
        ahead = self._rng.randint(0, 3)
        machine.monitor.faults += [0.0] * ahead + [self._rng.choice(["lost", "never"])]

    def _delay(self) -> None:
        machine = self._machine()
        machine.monitor.faults += [0.0] * self._rng.randint(0, 3) + [self._seconds(8)]

    def _cut(self) -> None:
        machine = self._machine()
        if machine.monitor.links:
            self._world.trace.note("fault: cut", machine.name)
            self._world.trouble(machine.name)
            machine.monitor.end_links(drop=self._rng.random() < 0.5)

    def _hold(self) -> None:
        machine = self._machine()
        machine.monitor.held_until = self._world.loop.time() + self._seconds(12)
        self._world.trace.note("fault: monitor held", machine.name)
        self._world.trouble(machine.name)
        machine.monitor.end_links()
        self._world.loop.call_at(machine.monitor.held_until, self._world.trouble, machine.name)

    # Other clients of QEMU --------------------------------------------------------------------------------------------

    def _job(self) -> tuple[Machine, Qemu, BlockJob] | None:
        machine = self._machine()
        qemu = machine.qemu
        if qemu is None or qemu.hung or not qemu.jobs:
            return None
        return machine, qemu, self._rng.choice(list(qemu.jobs.values()))

    def _meddle(self) -> None:
        found = self._job()
        if found is None:
            return
        machine, qemu, job = found
        what = self._rng.choice(["cancel", "cancel-force", "complete", "pause", "resume", "dismiss"])
        try:
            match what:
                case "cancel" | "cancel-force":
                    job.cancel(force=what == "cancel-force")
                case "complete":
                    job.ask_complete()
                    self._world.foreign_complete.add(job.id)
                case "pause":
                    job.pause()
                case "resume":
                    job.resume()
                case _:
                    qemu.dismiss(job.id)
        except QemuRefuses:
            return
        self._world.trace.note(f"foreign {what}", f"{machine.name} {job.id}")
        self._world.trouble(machine.name)
        self._world.keep_moving(qemu)

    def _grow(self) -> None:
        """Somebody takes a snapshot, where the chain is short enough."""
        machine = self._machine()
        if machine.qemu is None or machine.qemu.hung:
            return
        disk = self._rng.choice(machine.disks)
        short = len(machine.qemu.chain(disk.target)) < CHAIN_MAX
        if short and machine.qemu.job_on(disk.target) is None:
            node = self._world.new_overlay(machine, disk.target)
            with suppress(QemuRefuses):
                machine.qemu.snapshot(disk.target, node)
                self._world.touched = True
                self._world.trace.note("snapshot", f"{machine.name}/{disk.target}")

    def _revert(self) -> None:
        """While the service is away, a job is taken away, and the device is moved onto the base as it was before."""
        found = self._job()
        if found is None:
            return
        machine, qemu, job = found
        if job.status not in ("running", "ready") or not job.active:
            return
        self._world.trace.note("foreign revert", f"{machine.name} {job.id}")
        machine.monitor.held_until = self._world.loop.time() + 2
        machine.monitor.end_links(drop=True)
        job.cancel(force=True)
        qemu.move(0)
        self._world.note_ended(qemu)
        qemu.dismiss(job.id)
        qemu.revert(job)
        self._world.touched = True

    # Files and the service --------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        self._world.files.full = True
        self._world.trace.note("fault: file system full")
        self._world.loop.call_later(self._seconds(10), self._make_room)

    def _make_room(self) -> None:
        self._world.files.full = False

    def _slow_files(self) -> None:
        self._world.slow_files_until = self._world.loop.time() + self._seconds(8)
        self._world.trace.note("fault: slow files")
        self._world.trouble()

    def _blind(self) -> None:
        self._world.blind_until = self._world.loop.time() + self._seconds(10)
        self._world.trace.note("fault: blind")
        self._world.trouble()

    def _fill_journal(self) -> None:
        self._world.trace.note("fault: journal full")
        self._world.trouble()
        if self._rng.random() < 0.5:
            self._engine.faults.next.append("full")
        else:
            self._engine.faults.full_until = self._world.loop.time() + self._seconds(5)

    def _kill_service(self) -> None:
        if self._rng.random() < 0.5:
            self._engine.kill()
        else:
            self._engine.faults.next.append(self._rng.choice(["kill before", "kill after"]))

    def _restart_service(self) -> None:
        asyncio.get_running_loop().create_task(self._engine.stop())

    # Hazards of known defects -----------------------------------------------------------------------------------------

    def _put_twice(self) -> None:
        machine = self._machine()
        self._clients.put(machine, at_once=True)
        self._clients.put(machine, at_once=True)

    def _put_and_delete(self) -> None:
        machine = self._machine()
        self._clients.delete(machine.name, at_once=True)
        self._clients.put(machine, at_once=True)

    def _commit_and_delete(self) -> None:
        machine = self._machine()
        self._clients.random_job(machine)
        delay = self._rng.choice([0.0, 0.003, 0.006, 0.01, 0.02])
        self._world.loop.call_later(delay, lambda: self._clients.delete(machine.name, at_once=True))

    def _stream(self) -> None:
        """A domain's disks are read without a pause while a job runs there."""
        machine = self._machine()
        self._clients.random_job(machine)
        self._clients.stream(machine.name, self._world.loop.time() + 12)

    # The end ----------------------------------------------------------------------------------------------------------

    async def calm(self) -> None:
        """All faults are over: every QEMU answers or is known to have ended, and the service runs."""
        world = self._world
        world.trace.note("calm")
        world.files.full = False
        world.slow_files_until = world.blind_until = 0.0
        self._engine.faults.next.clear()
        self._engine.faults.full_until = 0.0
        while self._engine.service is None:  # noqa: ASYNC110 - the time is a simulated one
            await asyncio.sleep(1)
        for machine in world.machines.values():
            machine.monitor.faults.clear()
            machine.monitor.held_until = 0.0
            if machine.qemu is None and (machine.remote or self._rng.random() < 0.5):
                world.start(machine)
            if machine.qemu is not None:
                world.wake(machine, machine.qemu)
        world.trouble()


def _nothing() -> None:
    """Time passes."""
