"""How jobs are carried out: drivers open runners, and a runner has jobs of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from app.core.chain import Disk
from app.core.errors import Problem
from app.core.evidence import Process
from app.core.job import Job
from app.core.machine.inputs import Observed
from app.core.orphan import OrphanJob
from app.core.plan import Guest, Survey


class MonitorError(Exception):
    """The monitor could not do what was asked."""


class Unreachable(MonitorError):
    """Nobody answers at the monitor's address, or the connection broke: whether a command took effect is unknown."""


class Busy(MonitorError):
    """Connected, but no greeting came: another client holds the monitor."""


class Unanswered(MonitorError):
    """No reply in time: whether the command took effect is unknown."""


class Declined(MonitorError):
    """QEMU refused; nothing has changed. `problem` has its words."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a monitor listens: the path of a unix socket, or host and port."""

    unix: str | None = None
    tcp: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuFacts:
    """Who answers at a monitor.

    `managed_by` is `libvirt` or None; `missing` are commands that a commit needs and this program does not have, so it
    is no QEMU system emulator.
    """

    name: str | None
    uuid: str | None
    version: str
    process: Process
    managed_by: str | None
    missing: tuple[str, ...] = ()


class Runner(Protocol):
    """A live connection to one QEMU.

    Every call is time-boxed by the connection itself and raises `Unanswered`, `Unreachable` or `Declined`.
    """

    facts: QemuFacts

    @property
    def connected(self) -> bool:
        """Whether the connection stands. It may be false long before a call finds out."""
        ...

    @property
    def final_reports(self) -> Mapping[str, Observed]:
        """How jobs ended, by QEMU's events, by id; all that is left to go by once QEMU has ended itself."""
        ...

    def heard_to_the_end(self, job_id: str) -> bool:
        """Whether QEMU itself ended the connection, and had not told by then that the job was about to take effect."""
        ...

    async def guest(self) -> Guest:
        """What QEMU says of its guest (QAPI `query-status`, `query-migrate`); also the heartbeat."""
        ...

    async def survey(self, probe: Sequence[str]) -> Survey:
        """What QEMU says before a job. The nodes to `probe` are opened for writing and for reading again."""
        ...

    async def disks(self) -> tuple[Disk, ...]:
        """The domain's disks and their chains, as they are now."""
        ...

    async def observe(self) -> Mapping[str, Observed]:
        """Every job that QEMU has, anybody's, by id."""
        ...

    async def orphan(self, job_id: str) -> OrphanJob | None:
        """What a job works on of which there is no record; None where QEMU's graph does not tell."""
        ...

    async def start(self, job: Job) -> None:
        """Start the block job (QAPI `block-commit`)."""
        ...

    async def pivot(self, job_id: str) -> None:
        """Ask a ready job to pivot (QAPI `job-complete`)."""
        ...

    async def abort(self, job_id: str, *, force: bool) -> None:
        """Cancel (QAPI `block-job-cancel`, or `job-cancel`, which is always by force)."""
        ...

    async def pause(self, job_id: str) -> None:
        """Pause at the next possible point; being paused already is no error."""
        ...

    async def resume(self, job_id: str) -> None:
        """Go on; not being paused is no error."""
        ...

    async def set_speed(self, job_id: str, bandwidth: int) -> None:
        """Change the speed, in bytes/s; 0 is no limit."""
        ...

    async def finalize(self, job_id: str) -> None:
        """Let a pending job take effect (QAPI `job-finalize`); one that is not pending is no error."""
        ...

    async def flush(self, node: str) -> None:
        """Have QEMU write to the disk what it holds back of the node's data; a read-only node has nothing to write."""
        ...

    async def conclude(self, job_id: str, nodes: Sequence[str] = (), read_only: Sequence[str] = ()) -> None:
        """Let QEMU forget a concluded job; a job that it does not know is no error.

        Then delete those of the `nodes` that are left, in this order; a node that has gone already is no error. Those
        that are to be `read_only` are open for reading only then, as far as nobody writes to them.
        """
        ...

    async def close(self) -> None:
        """End the connection; never raises."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverCapabilities:
    """What a driver can do. Everything is asked of this, nothing of a driver's name."""

    kinds: frozenset[str]
    """The kinds of jobs that its runners take (`app.core.kinds.KINDS`)."""


class Driver(Protocol):
    """Opens runners."""

    @property
    def capabilities(self) -> DriverCapabilities:
        """What it can do."""
        ...

    async def connect(self, address: Address, hint: Callable[[], None]) -> Runner:
        """A connection to the monitor at `address`; raises `Unreachable` or `Busy`.

        `hint` is called, from the event loop, when something may have changed: a job or device event of QEMU, or the
        end of the connection. What changed is for the caller to ask.
        """
        ...

    def alive(self, process: Process) -> bool | None:
        """Whether that very process still runs; None where it can't be seen from here."""
        ...
