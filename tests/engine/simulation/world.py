"""The simulated world: virtual machines, their QEMU processes, their images, and what goes wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Final

from app.core.evidence import Process
from app.engine.ports.driver import Address, MonitorError
from tests.engine.simulation.files import CLUSTERS, Content, FileSystem, Image, merged
from tests.engine.simulation.hazards import Hazards
from tests.engine.simulation.loop import START, SimLoop
from tests.engine.simulation.monitor import Monitor
from tests.engine.simulation.nodes import GuestDisk, Node
from tests.engine.simulation.qemu import Qemu
from tests.engine.simulation.trace import Trace

PACES: Final = ((0.02, 0.4), (0.1, 1.5))
"""Ranges of seconds between two moves of a job; each run has one."""

QUICK: Final = 0.2
"""How likely a job is to be over, or ready, before the reply to its start."""


@dataclass(slots=True, kw_only=True, eq=False)
class Machine:
    """A virtual machine. `pinned`: its process stays, as others' chains have images in common with it.

    `blockdev`: its nodes are made by whoever starts it, and stay after a merge; else QEMU makes them (`-drive`).
    `stable`: a new process gets the same node-names. `off`: it is not started again.
    """

    name: str
    monitor: Monitor
    disks: tuple[GuestDisk, ...]
    uuid: str | None
    blockdev: bool
    stable: bool
    remote: bool
    discovered: bool
    offline: bool
    pinned: bool = False
    off: bool = False
    generation: int = 0
    troubled_at: float = 0.0

    @property
    def qemu(self) -> Qemu | None:
        """The process, if one runs."""
        qemu = self.monitor.qemu
        return qemu if qemu is not None and qemu.up else None

    @property
    def address(self) -> Address:
        """Where its monitor is for the service."""
        return Address(tcp=(self.name, 4444)) if self.remote else Address(unix=f"/qmp/{self.name}.qmp")


class World:
    """Everything outside of the service. `truth` is what became of the data of each job that QEMU has ended.

    `touched`: data, or what leads to it, has changed since somebody last set it to false. `instant`: some jobs are
    over before the reply to their start.
    """

    def __init__(self, rng: Random, loop: SimLoop, hazards: Hazards) -> None:
        self.rng = rng
        self.loop = loop
        self.hazards = hazards
        self.trace = Trace(loop.time)
        self.files = FileSystem()
        self.machines: dict[str, Machine] = {}
        self.processes: list[Qemu] = []
        self.truth: dict[str, str] = {}
        self.foreign_complete: set[str] = set()
        self.slow_files_until = 0.0
        self.blind_until = 0.0
        self.touched = True
        self.instant = True
        self.troubled_at = START
        self.service_at = START
        self._pids = 1000
        self._writes = 0
        self._names = 0
        self._moving: set[int] = set()
        self._pace = rng.choice(PACES)

    # What the ports ask -----------------------------------------------------------------------------------------------

    def latency(self) -> float:
        """Seconds that a message takes."""
        return self.rng.random() * 0.004 + 0.0005

    def machine_at(self, address: Address) -> Machine | None:
        """Who listens at an address."""
        return next((machine for machine in self.machines.values() if machine.address == address), None)

    def alive(self, process: Process) -> bool | None:
        """Whether that very process runs; None where it can't be seen."""
        if process.pid is None or process.started is None or self.blind_until > self.loop.time():
            return None
        return any(qemu.up and qemu.process == process for qemu in self.processes)

    def openers(self, asking: Process | Qemu | None, image: Image) -> list[Qemu]:
        """The other processes that have the file open."""
        own = asking.process if isinstance(asking, Qemu) else asking
        return [qemu for qemu in self.processes if qemu.up and qemu.process != own and qemu.has_open(image)]

    def executed(self, qemu: Qemu, what: str, error: MonitorError | None) -> None:
        """A command has been carried out."""
        if not what.startswith("observe"):
            self.trace.note(f"qemu: {what}", f"by {qemu.process.pid}" + (f": {error}" if error else ""), count=False)
        if what.startswith("start") and error is None and self.instant and self.rng.random() < QUICK:
            for _ in range(self.rng.randint(1, 6)):
                qemu.move(CLUSTERS)
        self.note_ended(qemu)
        self.touched = True
        self.keep_moving(qemu)

    def trouble(self, name: str | None = None) -> None:
        """Something went wrong just now, with one machine or with all."""
        if name is None:
            self.troubled_at = self.loop.time()
        else:
            self.machines[name].troubled_at = self.loop.time()

    def quiet_since(self, machine: Machine) -> float:
        """Since when nothing has gone wrong with a machine."""
        return max(machine.troubled_at, self.troubled_at, self.service_at)

    # Time -------------------------------------------------------------------------------------------------------------

    def keep_moving(self, qemu: Qemu) -> None:
        """Have the jobs of a process go on."""
        if qemu.running and id(qemu) not in self._moving:
            self._moving.add(id(qemu))
            self.loop.call_later(self.rng.uniform(*self._pace), self._move, qemu)

    def _move(self, qemu: Qemu) -> None:
        self._moving.discard(id(qemu))
        if not qemu.up or qemu.hung:
            return
        qemu.move(self.rng.randint(1, 3))
        self.touched = True
        self.note_ended(qemu)
        self.keep_moving(qemu)

    def note_ended(self, qemu: Qemu) -> None:
        """Write down what became of jobs."""
        for id_, job in qemu.ended.items():
            if not job.noted and job.outcome is not None:
                # Started twice under one id, as another client took the first one away, it is the later that counts.
                self.truth[id_], job.noted = job.outcome, True
                self.trace.counts[f"in QEMU: {job.outcome}"] += 1

    # Building ---------------------------------------------------------------------------------------------------------

    def make_chain(self, folder: str, name: str, layers: int, base: list[str] | None = None) -> str:
        """A chain of images over `base` (paths, topmost first); the path of its active layer."""
        below = base[0] if base else None
        seen = not folder.startswith("/remote")
        for number in range(layers):
            path = f"{folder}/{name}-{number}.qcow2"
            header = None
            if below is not None:
                relative = self.rng.random() < 0.5 and below.startswith(folder + "/")
                header = below.rpartition("/")[2] if relative else below
            self.files.make(path, header, self._some_writes(), seen=seen)
            below = path
        assert below is not None
        return below

    def _some_writes(self) -> Content:
        return {self.rng.randrange(CLUSTERS): self.next_write() for _ in range(self.rng.randint(1, 6))}

    def next_write(self) -> int:
        """The number of a new write."""
        self._writes += 1
        return self._writes

    def make_disk(self, target: str, active: str, *, backend: str | None) -> GuestDisk:
        """A disk of a guest over a chain that is there."""
        expected = merged([image.clusters for image in self.files.chain(active)])
        return GuestDisk(target=target, qdev=f"dev-{target}", backend=backend, active=active, expected=expected)

    # Processes --------------------------------------------------------------------------------------------------------

    def start(self, machine: Machine) -> bool:
        """Start a process on the machine's images; False where an image can't be opened."""
        chains = {disk.target: self.files.chain(disk.active) for disk in machine.disks}
        for chain in chains.values():
            for number, image in enumerate(chain):
                writers = [qemu for qemu in self.openers(None, image) if number == 0 or qemu.writes_to(image)]
                if writers:
                    self.trace.note("start refused", f"{machine.name}: {image.path} is locked")
                    return False
        qemu = Qemu(
            process=self._new_process(machine),
            disks=machine.disks,
            files=self.files,
            openers=self.openers,
            note=lambda text: self.trace.note("job", text, count=False),
        )
        machine.generation += 1
        for target, chain in chains.items():
            node: Node | None = None
            for image in reversed(chain):
                node = qemu.add_node(self._node(machine, target, image, node))
            assert node is not None
            node.read_only = False
            qemu.roots[target] = node
        self.touched = True
        self.processes.append(qemu)
        machine.monitor.qemu = qemu
        self.trouble(machine.name)
        self.trace.note("QEMU started", f"{machine.name} as {qemu.process.pid}")
        return True

    def _new_process(self, machine: Machine) -> Process:
        dead = [qemu.process.pid for qemu in self.processes if not qemu.up and qemu.process.pid]
        alive = {qemu.process.pid for qemu in self.processes if qemu.up}
        again = [pid for pid in dead if pid not in alive]
        self._pids += 1
        pid = again[-1] if again and self.rng.random() < 0.3 else self._pids
        started = round(self.loop.time() * 100) * 1000 + self._pids
        if machine.remote:
            return Process(pid=None, started=None, uuid=machine.uuid)
        return Process(pid=pid, started=started, uuid=machine.uuid)

    def _node(self, machine: Machine, target: str, image: Image, below: Node | None) -> Node:
        if not machine.blockdev:
            self._names += 1
            return Node(name=f"#block{self._names}", image=image, below=below, implicit=True)
        mark = "n" if machine.stable else f"n{machine.generation}"
        name = f"{mark}-{target}-{image.path.rpartition('/')[2].removesuffix('.qcow2')}"
        return Node(name=name, image=image, below=below, carrier="f" + name)

    def new_overlay(self, machine: Machine, target: str) -> Node:
        """A new image over the active layer, and its node."""
        disk = next(disk for disk in machine.disks if disk.target == target)
        assert machine.qemu is not None
        self._names += 1
        path = f"{disk.active.rpartition('/')[0]}/{machine.name}-s{self._names}.qcow2"
        image = self.files.make(path, disk.active, {}, seen=not machine.remote)
        return self._node(machine, target, image, machine.qemu.roots[target])

    def stop(self, machine: Machine, *, kill: bool) -> None:
        """End the process, if one runs."""
        qemu = machine.qemu
        if qemu is None:
            return
        self.trace.note("QEMU killed" if kill else "QEMU quit", machine.name)
        self.trouble(machine.name)
        if kill:
            qemu.kill()
        else:
            qemu.quit()
        self.note_ended(qemu)
        self.touched = True
        machine.monitor.end_links()
        self.loop.call_later(self.rng.uniform(1, 25), self._start_again, machine)

    def _start_again(self, machine: Machine) -> None:
        if machine.qemu is None and not machine.off:
            self.start(machine)

    def hang(self, machine: Machine, seconds: float) -> None:
        """Stop the process (SIGSTOP) for that long."""
        qemu = machine.qemu
        if qemu is None or qemu.hung:
            return
        qemu.hung = True
        self.trace.note("QEMU hangs", f"{machine.name} for {seconds:.1f} s")
        self.trouble(machine.name)
        self.loop.call_later(seconds, self.wake, machine, qemu)

    def wake(self, machine: Machine, qemu: Qemu) -> None:
        """Have a stopped process go on."""
        if qemu.up and qemu.hung:
            qemu.hung = False
            self.trace.note("QEMU wakes", machine.name)
            self.trouble(machine.name)
            machine.monitor.wake()
            self.keep_moving(qemu)

    def guest_writes(self, machine: Machine) -> None:
        """A guest writes somewhere."""
        if machine.qemu is not None:
            disk = self.rng.choice(machine.disks)
            if machine.qemu.write(disk.target, self.rng.randrange(CLUSTERS), self.next_write()):
                self.trace.counts["guest writes"] += 1
                self.touched = True
