"""What happens to a job: what QEMU says, what became of our own commands, and what people ask for."""

from __future__ import annotations

from dataclasses import dataclass

from app.core.errors import Problem
from app.core.evidence import Evidence, Process
from app.core.job import Progress, Result
from app.core.states import State


@dataclass(frozen=True, slots=True)
class Launch:
    """The job has its place among the running ones; `process` is the QEMU that is going to be asked."""

    process: Process | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """QEMU answered the command that starts the job: it runs."""

    process: Process


@dataclass(frozen=True, slots=True)
class Rejected:
    """The job can't be started; nothing has happened."""

    problem: Problem


@dataclass(frozen=True, slots=True)
class Observed:
    """What QEMU says of the job now (QAPI `query-jobs` and `query-block-jobs`).

    `paused_for` is for how many seconds it has been seen paused without a break, `process` the QEMU that says so.
    """

    status: str
    progress: Progress
    error: str | None = None
    io_status: str = "ok"
    paused_for: float = 0.0
    process: Process | None = None


@dataclass(frozen=True, slots=True)
class Absent:
    """QEMU answers, is the process that was asked, and does not list the job."""


@dataclass(frozen=True, slots=True)
class Gone:
    """The QEMU process that ran the job has ended."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """What could be read of the outcome has been read.

    `evidence` has what was read. What QEMU said and what was asked of it stand in the job.
    """

    evidence: Evidence


@dataclass(frozen=True, slots=True)
class CleanedUp:
    """What there was to tidy after the job's end is tidied; `problem` is why the job has failed after all."""

    result: Result
    problem: Problem | None = None


@dataclass(frozen=True, slots=True)
class PivotTaken:
    """QEMU took the command to pivot (which does not mean that it has pivoted)."""


@dataclass(frozen=True, slots=True)
class PivotDeclined:
    """QEMU refused to pivot just now."""

    problem: Problem


@dataclass(frozen=True, slots=True)
class Pivot:
    """Somebody asks to move the guest onto the base."""


@dataclass(frozen=True, slots=True)
class Abort:
    """Somebody asks to end the job without merging; `force`: without a consistent copy in the base."""

    force: bool = False


@dataclass(frozen=True, slots=True)
class Pause:
    """Somebody asks to pause."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Somebody asks to go on."""


@dataclass(frozen=True, slots=True)
class SetSpeed:
    """Somebody asks for another speed, in bytes/s; 0 is no limit."""

    bandwidth: int


@dataclass(frozen=True, slots=True)
class Resolve:
    """Somebody who has looked at the images says how a lost job ended; `by` is their name."""

    outcome: State
    by: str


Input = (
    Launch
    | Accepted
    | Rejected
    | Observed
    | Absent
    | Gone
    | Gathered
    | CleanedUp
    | PivotTaken
    | PivotDeclined
    | Pivot
    | Abort
    | Pause
    | Resume
    | SetSpeed
    | Resolve
)
