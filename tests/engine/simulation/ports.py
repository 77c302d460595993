"""The engine's ports on the simulated world: the driver and its runners, the images, the discovery."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from app.core.chain import Disk
from app.core.evidence import Process
from app.core.job import Job
from app.core.kinds import KINDS, kind_of
from app.core.machine.inputs import Observed
from app.core.orphan import OrphanJob
from app.core.plan import Guest, Survey
from app.engine.ports.driver import Address, DriverCapabilities, QemuFacts, Unanswered, Unreachable
from tests.engine.simulation.blockjob import QemuRefuses
from tests.engine.simulation.life import Life
from tests.engine.simulation.monitor import Link
from tests.engine.simulation.qemu import Qemu
from tests.engine.simulation.world import World

TIMEOUT: Final = 5.0
"""The most seconds that one command may take."""

RESCAN: Final = 1.0
"""Seconds between two looks for monitors."""


class SimDriver:
    """The `Driver` port."""

    def __init__(self, world: World, life: Life) -> None:
        self._world = world
        self._life = life
        self.capabilities = DriverCapabilities(kinds=frozenset(KINDS))

    async def connect(self, address: Address, hint: Callable[[], None]) -> SimRunner:
        """A connection to the monitor at `address`."""
        self._life.check()
        machine = self._world.machine_at(address)
        if machine is None:
            await asyncio.sleep(self._world.latency())
            raise Unreachable(f"no monitor at {address}")
        link = await machine.monitor.connect(hint)
        if self._life.over:
            link.end()
        self._life.check()
        self._world.trace.note("connected", f"{self._life.name} to {machine.name}")
        qemu = link.qemu
        facts = QemuFacts(name=machine.name, uuid=machine.uuid, version="7.2.22", process=qemu.process, managed_by=None)
        return SimRunner(self._world, self._life, link, facts)

    def alive(self, process: Process) -> bool | None:
        """Whether that very process still runs."""
        return self._world.alive(process)


class SimRunner:
    """The `Runner` port. Each call reaches QEMU at one moment; how its reply fares is the monitor's business."""

    def __init__(self, world: World, life: Life, link: Link, facts: QemuFacts) -> None:
        self.facts = facts
        self._world = world
        self._life = life
        self._link = link

    @property
    def connected(self) -> bool:
        """Whether the connection stands."""
        return self._link.connected

    @property
    def final_reports(self) -> Mapping[str, Observed]:
        """How jobs ended, by QEMU's events."""
        return self._link.client.final_reports

    def heard_to_the_end(self, job_id: str) -> bool:
        """Whether QEMU itself ended the connection, and had not told that the job was about to take effect."""
        return self._link.heard_all and job_id not in self._link.client.leaving

    async def _ask(self, what: str, effect: Callable[[Qemu], Any]) -> Any:
        self._life.check()
        if not self._link.connected:
            raise Unreachable("the connection to QEMU has ended")
        self._world.trace.note_call(what.partition(" ")[0])
        reply = self._link.monitor.send(self._link, what, effect)
        try:
            async with asyncio.timeout(TIMEOUT):
                return await reply
        except TimeoutError:
            raise Unanswered(f"QEMU has not answered {what} for {TIMEOUT:.0f} s") from None

    async def guest(self) -> Guest:
        """What QEMU says of its guest."""
        await self._ask("observe-guest", lambda _qemu: True)
        return Guest.RUNNING

    async def survey(self, probe: Sequence[str]) -> Survey:
        """What QEMU says before a job."""
        await self._ask(f"survey {' '.join(probe)}", lambda _qemu: True)
        return Survey()

    async def disks(self) -> tuple[Disk, ...]:
        """The domain's disks and their chains, as they are now."""
        return await self._ask("disks", lambda qemu: qemu.describe())

    async def observe(self) -> Mapping[str, Observed]:
        """Every job that QEMU has, by id."""
        return await self._ask("observe", lambda qemu: {id_: job.observed for id_, job in qemu.jobs.items()})

    async def orphan(self, job_id: str) -> OrphanJob | None:
        """What a job works on of which there is no record."""

        def look(qemu: Qemu) -> OrphanJob | None:
            job = qemu.jobs.get(job_id)
            if job is None:
                return None
            disk = next(disk for disk in qemu.describe() if disk.name == job.target)
            names = disk.nodes
            if job.stream:
                held = {"active node": (job.base.name,), "intermediate node": tuple(node.name for node in job.layers)}
                if job.layers[0].name not in names:
                    return None
                return OrphanJob(job_type="stream", speed=job.speed, disks=qemu.describe(), held=held)
            if job.base.name not in names or job.layers[0].name not in names:
                return None
            merged = tuple(node.name for node in job.layers)
            held = (
                {"source": merged, "target": (job.base.name,)}
                if job.active
                else {"intermediate node": merged, "base": (job.base.name,)}
            )
            return OrphanJob(job_type="commit", speed=job.speed, disks=qemu.describe(), held=held)

        return await self._ask(f"orphan {job_id}", look)

    async def start(self, job: Job) -> None:
        """Start the job."""
        command = kind_of(job.spec).command(job.spec, bandwidth=job.bandwidth, on_error=job.on_error)
        arguments: Mapping[str, Any] = command.arguments
        named: dict[str, Any] = {name.replace("-", "_"): value for name, value in arguments.items()}
        verbs: dict[str, Callable[[Qemu], Callable[..., None]]] = {
            "block-commit": lambda qemu: qemu.block_commit,
            "block-stream": lambda qemu: qemu.block_stream,
        }
        verb = verbs[command.execute]
        await self._ask(f"start {job.id}", lambda qemu: verb(qemu)(job_id=job.id, **named))

    async def pivot(self, job_id: str) -> None:
        """Ask a ready job to pivot."""
        await self._ask(f"pivot {job_id}", lambda qemu: qemu.job(job_id).ask_complete())

    async def abort(self, job_id: str, *, force: bool) -> None:
        """Cancel."""

        def cancel(qemu: Qemu) -> None:
            job = qemu.job(job_id)
            if not force and job.paused:
                job.resume()
            job.cancel(force=force)

        await self._ask(f"abort {job_id} {force=}", _tolerant(cancel, "cannot accept command verb", "not found"))

    async def pause(self, job_id: str) -> None:
        """Pause at the next possible point."""
        await self._ask(f"pause {job_id}", _tolerant(lambda qemu: qemu.job(job_id).pause(), "already paused"))

    async def resume(self, job_id: str) -> None:
        """Go on."""
        await self._ask(f"resume {job_id}", _tolerant(lambda qemu: qemu.job(job_id).resume(), "was not paused"))

    async def set_speed(self, job_id: str, bandwidth: int) -> None:
        """Change the speed."""

        def change(qemu: Qemu) -> None:
            qemu.job(job_id).speed = bandwidth

        await self._ask(f"speed {job_id}", change)

    async def finalize(self, job_id: str) -> None:
        """Let a pending job take effect."""
        harmless = ("cannot accept command verb", "not found")
        await self._ask(f"finalize {job_id}", _tolerant(lambda qemu: qemu.finalize(job_id), *harmless))

    async def flush(self, node: str) -> None:
        """Have QEMU write to the disk what it holds back of the node's data."""

        def flush(qemu: Qemu) -> None:
            if node not in qemu.nodes:
                raise QemuRefuses(f"Cannot find device='' nor node-name='{node}'")
            qemu.flush(qemu.nodes[node])

        await self._ask(f"flush {node}", flush)

    async def conclude(self, job_id: str, nodes: Sequence[str] = (), read_only: Sequence[str] = ()) -> None:
        """Let QEMU forget a concluded job, and delete the nodes that are left of it."""

        def conclude(qemu: Qemu) -> None:
            refusal: QemuRefuses | None = None
            try:
                _tolerant(lambda qemu: qemu.dismiss(job_id), "not found")(qemu)
            except QemuRefuses as refuses:
                refusal = refuses
            for node in nodes:
                with suppress(QemuRefuses):
                    qemu.delete_node(node)
            for node in read_only:
                if node in qemu.nodes:
                    qemu.nodes[node].read_only = True
            if refusal is not None:
                raise refusal

        await self._ask(f"conclude {job_id} {' '.join(nodes)}", conclude)
        self._link.client.final_reports.pop(job_id, None)

    async def close(self) -> None:
        """End the connection."""
        self._link.end()


def _tolerant(effect: Callable[[Qemu], None], *harmless: str) -> Callable[[Qemu], None]:
    def tried(qemu: Qemu) -> None:
        try:
            effect(qemu)
        except QemuRefuses as refuses:
            if not any(text in refuses.desc for text in harmless):
                raise

    return tried


class SimDiscovery:
    """The `Discovery` port: a folder in which some machines have their monitors."""

    def __init__(self, world: World, life: Life) -> None:
        self._world = world
        self._life = life

    def path_of(self, domain: str) -> str | None:
        """Where the socket of a domain of that id would be."""
        return f"/qmp/{domain}.qmp"

    async def looks(self) -> AsyncIterator[Mapping[str, str]]:
        """All sockets that are there, at each look. One of a process that was killed stays."""
        while True:
            self._life.check()
            machines = self._world.machines.values()
            yield {m.name: f"/qmp/{m.name}.qmp" for m in machines if m.discovered and m.monitor.qemu is not None}
            await asyncio.sleep(RESCAN)
