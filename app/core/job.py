"""A block job as a value: what it is, where it is, and what it works on.

`app.core.machine.table` says how it moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from app.core.chain import Identity
from app.core.errors import Problem
from app.core.flags import CommitFlag


class State(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    PIVOTING = "pivoting"
    ABORTING = "aborting"
    CONCLUDING = "concluding"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELED = "canceled"
    LOST = "lost"


ENDED: Final = frozenset({State.COMPLETED, State.FAILED, State.CANCELED, State.LOST})
WITH_QEMU: Final = frozenset({State.RUNNING, State.PAUSED, State.READY, State.PIVOTING, State.ABORTING})
"""States in which QEMU has a job of ours that has not concluded."""


class JobType(StrEnum):
    """What kind of job it is."""

    COMMIT = "commit"
    ACTIVE_COMMIT = "active-commit"


class EventType(StrEnum):
    """What subscribers are told of a job."""

    QUEUED = "job.queued"
    STARTED = "job.started"
    PROGRESS = "job.progress"
    PAUSED = "job.paused"
    RESUMED = "job.resumed"
    READY = "job.ready"
    PIVOTING = "job.pivoting"
    ABORTING = "job.aborting"
    COMPLETED = "job.completed"
    FAILED = "job.failed"
    CANCELED = "job.canceled"
    LOST = "job.lost"
    ADOPTED = "job.adopted"


ENDINGS: Final = {
    State.COMPLETED: EventType.COMPLETED,
    State.FAILED: EventType.FAILED,
    State.CANCELED: EventType.CANCELED,
    State.LOST: EventType.LOST,
}


class OnReady(StrEnum):
    """What to do once the active layer is mirrored."""

    WAIT = "wait"
    PIVOT = "pivot"
    KEEP = "keep"


class OnError(StrEnum):
    """What an I/O error does to the job (QAPI `BlockdevOnError`, without the endless `ignore`)."""

    REPORT = "report"
    STOP = "stop"
    ENOSPC = "enospc"


class PauseReason(StrEnum):
    """Why a job is paused."""

    USER = "user"
    NO_SPACE = "no-space"
    IO_ERROR = "io-error"


class DataState(StrEnum):
    """What the job has done to the images so far."""

    UNTOUCHED = "untouched"
    BASE_MODIFIED = "base-modified"
    MERGED = "merged"


class Intent(StrEnum):
    """How the job is to end, as asked for last."""

    RUN = "run"
    PIVOT = "pivot"
    KEEP = "keep"
    ABORT = "abort"
    FORCE = "force"


class Verdict(StrEnum):
    """What QEMU said of the job at its end."""

    FINE = "fine"
    """Concluded, without error."""
    ERROR = "error"
    """Concluded, with an error; its text is in `Job.verdict_error`."""
    VANISHED = "vanished"
    """QEMU runs, and does not list the job any more."""
    GONE = "gone"
    """QEMU itself has ended."""


class Proof(StrEnum):
    """What the chain, read again, shows."""

    MERGED = "merged"
    UNCHANGED = "unchanged"
    UNKNOWN = "unknown"


class Command(StrEnum):
    """What the engine is to do next. Each may be done twice without harm."""

    START = "start"
    COMPLETE = "complete"
    CANCEL = "cancel"
    """As QEMU's block-job-cancel: at ready it waits for a consistent copy."""
    CANCEL_FORCE = "cancel-force"
    FINALIZE = "finalize"
    """Have the merged data written to the disk, and then have QEMU take the merged layers out of the chain."""
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    CHECK_CHAIN = "check-chain"
    """Read the chain from QEMU's graph."""
    CHECK_IMAGES = "check-images"
    """Read the chain from the images, as QEMU has ended."""
    CLEAN_UP = "settle"
    """Release nodes, delete images, dismiss the job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """Which QEMU it is: another pid, start time (clock ticks since boot) or uuid is another process."""

    pid: int | None
    started: int | None
    uuid: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the job does to which nodes and files, fixed when it is accepted; enough to go on after a restart.

    `chain` and `nodes` are the files and format nodes of the whole chain before the job, active layer first; `top`
    and `base` are positions in it. `release` are the nodes to delete after a merge, in that order. `backing_file` is
    the string for the header of the layer above `top`. `deletes` are the files to unlink once the merge is proven,
    `undeletable` those that are worthless then and stay, each with the reason. `identities` are those of the files in
    `chain`, None where the service did not see that QEMU has that file open.
    """

    disk_node: str
    qdev: str | None
    backend: str | None
    chain: tuple[str, ...]
    nodes: tuple[str, ...]
    top: int
    base: int
    release: tuple[str, ...]
    backing_file: str | None
    digest: str
    invalidates: tuple[str, ...]
    deletes: tuple[str, ...]
    undeletable: tuple[NotDeleted, ...] = ()
    identities: tuple[Identity | None, ...] = ()

    def identity(self, file: str) -> Identity | None:
        """Which file it was that the chain had under this name."""
        return dict(zip(self.chain, self.identities, strict=False)).get(file)

    @property
    def merged_nodes(self) -> tuple[str, ...]:
        """The format nodes that a merge takes out of the chain."""
        return self.nodes[self.top : self.base]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`current` of `end` bytes (QAPI `JobInfo`), `rate` in bytes/s, `eta` in seconds or None where nobody can say."""

    current: int = 0
    end: int = 0
    rate: int = 0
    eta: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NotDeleted:
    """An image that `delete` left in place, and why."""

    file: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The chain after the job, active layer first, and what became of the merged images."""

    chain: tuple[str, ...]
    invalidated: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    not_deleted: tuple[NotDeleted, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """A person's verdict on a job that was lost: who gave it, and when (ms since 1970)."""

    by: str
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One block job, from its request to its outcome. Times are milliseconds since 1970, UTC.

    `work` and the fields from `intent` on are the service's own and not shown outside. `unconfirmed` are commands that
    nothing in QEMU's status would show to be missing: they are sent again at the next look, in case that the service
    or the connection ended between the wish and its command. `pivot_asked` stays once a pivot was asked for: QEMU may
    have pivoted since, whatever was wished later. `start_again` says that an earlier command to start it may have got
    through, `rejection` is what QEMU answered to a later one then. `resolved` is set where a person has judged the
    outcome.
    """

    id: str
    type: JobType
    state: State
    domain: str
    disk: str
    top: str
    base: str
    overlay: str | None
    flags: CommitFlag
    on_ready: OnReady
    on_error: OnError
    bandwidth: int
    requested_by: str
    created_at: int
    work: Work
    pause_reason: PauseReason | None = None
    progress: Progress = field(default_factory=Progress)
    data_state: DataState = DataState.UNTOUCHED
    error: Problem | None = None
    result: Result | None = None
    started_at: int | None = None
    ready_at: int | None = None
    finished_at: int | None = None
    version: int = 1
    intent: Intent = Intent.RUN
    pivot_asked: bool = False
    pause_wanted: bool = False
    unconfirmed: tuple[Command, ...] = ()
    start_again: bool = False
    rejection: Problem | None = None
    process: Process | None = None
    complete_taken: bool = False
    complete_attempts: int = 0
    verdict: Verdict | None = None
    verdict_error: str | None = None
    ending: State | None = None
    resolved: Resolution | None = None

    @property
    def ended(self) -> bool:
        """Whether the outcome is final."""
        return self.state in ENDED

    @property
    def percent(self) -> float:
        """How much is done; 100 only once the job is ready or completed, whatever QEMU's numbers say."""
        if self.state is State.COMPLETED or (self.ready_at is not None and not self.ended):
            return 100.0
        if self.progress.end <= 0:
            return 0.0
        return min(99.9, int(1000 * self.progress.current / self.progress.end) / 10)

    @property
    def actions(self) -> tuple[str, ...]:
        """What the job takes now."""
        taken = ACTIONS.get(self.state, ())
        return taken if self.pivotable else tuple(action for action in taken if action != "pivot")

    @property
    def pivotable(self) -> bool:
        """Whether the job is one that a pivot can end; others end by themselves."""
        return self.type is not JobType.COMMIT and self.on_ready is not OnReady.KEEP


ACTIONS: Final[Mapping[State, tuple[str, ...]]] = {
    State.QUEUED: ("abort", "set-speed"),
    State.STARTING: ("abort",),
    State.RUNNING: ("abort", "pause", "set-speed"),
    State.PAUSED: ("resume", "abort", "set-speed"),
    State.READY: ("pivot", "abort", "set-speed"),
    State.LOST: ("resolve",),
}
