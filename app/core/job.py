r"""A block job as a value, and the one table of how it moves.

    queued -> starting -> running <-> paused
                             |  \
                             |   ready -> pivoting
                             |     |         |
                             +-- aborting ---+--> concluding -> completed | failed | canceled | lost

`step(job, event, now)` is pure: it returns the job as it is now, what to store and tell, and what to do next. The
engine stores before it acts, so that a crash between the two is repaired by asking QEMU (`app.core.reconcile`).

QEMU's side of the story (QAPI `JobStatus`): its job is created, running, paused, ready, standby, waiting, pending,
aborting, concluded. It goes through internal pauses of its own at any time, so `paused` there is not `paused` here
unless we asked for it, or an I/O error did. `ready` is QEMU's status and never a comparison of two numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from app.core.errors import CANCELED, Code, Problem, Refused, qemu_problem
from app.core.flags import CommitFlag

PIVOT_ATTEMPTS: Final = 60
"""How often a pivot that QEMU declines is tried again (a mirror flips out of ready under writes) before the job is
given back as `ready`."""


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
    `undeletable` those that are worthless then and stay, each with the reason.
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
class Job:
    """One block job, from its request to its outcome. Times are milliseconds since 1970, UTC.

    `work` and the fields from `intent` on are the service's own and not shown outside. `unconfirmed` are commands that
    nothing in QEMU's status would show to be missing: they are sent again at the next look, in case that the service
    or the connection ended between the wish and its command.
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
    pause_wanted: bool = False
    unconfirmed: tuple[Command, ...] = ()
    process: Process | None = None
    complete_taken: bool = False
    complete_attempts: int = 0
    verdict: Verdict | None = None
    verdict_error: str | None = None
    ending: State | None = None

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
}


# What happens to a job -----------------------------------------------------------------------------------------------


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
class Checked:
    """The chain has been read again."""

    proof: Proof
    chain: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Settled:
    """What there was to tidy after the job's end is tidied."""

    result: Result


@dataclass(frozen=True, slots=True)
class CompleteTaken:
    """QEMU took the command to pivot (which does not mean that it has pivoted)."""


@dataclass(frozen=True, slots=True)
class CompleteDeclined:
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


Event = (
    Launch
    | Accepted
    | Rejected
    | Observed
    | Absent
    | Gone
    | Checked
    | Settled
    | CompleteTaken
    | CompleteDeclined
    | Pivot
    | Abort
    | Pause
    | Resume
    | SetSpeed
)


class Command(StrEnum):
    """What the engine is to do next. Each may be done twice without harm."""

    START = "start"
    COMPLETE = "complete"
    CANCEL = "cancel"
    """As QEMU's block-job-cancel: at ready it waits for a consistent copy."""
    CANCEL_FORCE = "cancel-force"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    CHECK_CHAIN = "check-chain"
    """Read the chain from QEMU's graph."""
    CHECK_IMAGES = "check-images"
    """Read the chain from the images, as QEMU has ended."""
    SETTLE = "settle"
    """Release nodes, delete images, dismiss the job."""


@dataclass(frozen=True, slots=True)
class Told:
    """A version of the job that is stored, with the event that tells of it, if one does."""

    type: EventType | None
    job: Job


@dataclass(frozen=True, slots=True)
class Step:
    """What follows from an event: the job now, what to store (in this order, in one transaction), what to do then."""

    job: Job
    told: tuple[Told, ...] = ()
    commands: tuple[Command, ...] = ()


def start_job(job: Job) -> Step:
    """The first step of every job: it is stored as queued before anybody hears of it."""
    return Step(job, (Told(EventType.QUEUED, job),))


def step(job: Job, event: Event, now: int) -> Step:
    """What `event` makes of `job` at the time `now` (ms since 1970).

    Raises `Refused` where a request (pivot, abort, pause, resume, speed) does not fit the state. Other pairs that are
    not in the table change nothing, each for the reason in `IGNORED`.
    """
    handler = TRANSITIONS.get((job.state, type(event)))
    return handler(job, event, now) if handler else Step(job)


def _save(job: Job, type_: EventType | None, *commands: Command) -> Step:
    stored = replace(job, version=job.version + 1)
    return Step(stored, (Told(type_, stored),), commands)


def _then(first: Step, second: Step) -> Step:
    once = tuple(command for command in second.commands if command not in first.commands)
    return Step(second.job, first.told + second.told, first.commands + once)


def _asked(job: Job, command: Command) -> tuple[Command, ...]:
    """What is to be sent again at the next look, now that `command` is sent; the last wish of its kind counts."""
    same_kind = (Command.SET_SPEED,) if command is Command.SET_SPEED else (Command.PAUSE, Command.RESUME)
    return (*(other for other in job.unconfirmed if other not in same_kind), command)


# Handlers ------------------------------------------------------------------------------------------------------------


def _launch(job: Job, event: Event, _now: int) -> Step:
    assert isinstance(event, Launch)
    return _save(replace(job, state=State.STARTING, process=event.process), None, Command.START)


def _accepted(job: Job, event: Event, now: int) -> Step:
    told = event.process if isinstance(event, Accepted | Observed) else None
    running = replace(
        job,
        state=State.RUNNING,
        started_at=now,
        process=told or job.process,
        # From here on QEMU may write into the base at any moment, whatever its counters say.
        data_state=DataState.BASE_MODIFIED,
    )
    started = _save(running, EventType.STARTED)
    if job.intent in (Intent.ABORT, Intent.FORCE):
        return _then(started, _begin_abort(started.job, force=job.intent is Intent.FORCE))
    return started


def _rejected_starting(job: Job, event: Event, now: int) -> Step:
    assert isinstance(event, Rejected)
    if f"Job ID '{job.id}' already in use" in event.problem.detail:
        # The first attempt, whose reply was lost, got through after all. The next look finds the job.
        return Step(job)
    return _rejected(job, event, now)


def _rejected(job: Job, event: Event, now: int) -> Step:
    assert isinstance(event, Rejected)
    return _end(replace(job, error=event.problem), State.FAILED, now)


def _end(job: Job, state: State, now: int) -> Step:
    progress = replace(job.progress, rate=0, eta=None)
    ended = replace(job, state=state, finished_at=now, pause_reason=None, progress=progress)
    return _save(ended, ENDINGS[state])


def _conclude(job: Job, verdict: Verdict, look: Command) -> Step:
    done = replace(job, state=State.CONCLUDING, verdict=verdict, pause_reason=None, unconfirmed=())
    return _save(done, None, look)


def _observed_starting(job: Job, event: Event, now: int) -> Step:
    # The reply was lost (a timeout, a restart), but QEMU lists the job, so it took the command.
    started = _accepted(job, event, now)
    return _then(started, step(started.job, event, now))


def _observed(job: Job, event: Event, now: int) -> Step:
    assert isinstance(event, Observed)
    job = replace(job, progress=event.progress)
    if event.status == "concluded":
        verdict = Verdict.ERROR if event.error else Verdict.FINE
        return _conclude(replace(job, verdict_error=event.error), verdict, Command.CHECK_CHAIN)
    # There is nothing left to pause in a job that is ready.
    again = tuple(c for c in job.unconfirmed if c is not Command.PAUSE or event.status in ("running", "paused"))
    sent = Step(replace(job, unconfirmed=()), (), again)
    return _then(sent, _observed_alive(sent.job, event, now, again))


def _observed_alive(job: Job, event: Observed, now: int, again: tuple[Command, ...]) -> Step:
    if job.state is State.ABORTING:
        # Sent again as long as it shows no effect: a restart may have come between storing the wish and the command.
        if event.status in ("waiting", "pending", "aborting"):
            return Step(job)
        hard = job.intent is Intent.FORCE or event.status == "paused"
        return Step(job, (), (Command.CANCEL_FORCE,) if hard else (*_awake(event), Command.CANCEL))
    failing = event.status == "standby" and event.io_status != "ok"
    if event.status == "paused" or (failing and job.intent is Intent.RUN):
        return _observed_paused(job, event)
    if event.status in ("ready", "standby"):
        return _observed_ready(job, event, now)
    if event.status == "running" and job.state is State.RUNNING and job.pause_wanted:
        return Step(job, (), (Command.PAUSE,))
    if event.status == "running" and job.state is State.PAUSED:
        # Somebody resumed it, unless a pause was asked for that may not have reached QEMU yet.
        wanted = Command.PAUSE in again
        return _save(replace(job, state=State.RUNNING, pause_reason=None, pause_wanted=wanted), EventType.RESUMED)
    # created, waiting, pending, aborting: QEMU is on its way to a status that tells more.
    return Step(job)


def _awake(event: Observed) -> tuple[Command, ...]:
    # A ready job that somebody paused is in standby: it takes no gentle cancel, and its pivot would wait for ever.
    # One of QEMU's own short breaks looks the same, and resuming it does nothing.
    return (Command.RESUME,) if event.status == "standby" else ()


def _observed_paused(job: Job, event: Observed) -> Step:
    reason: PauseReason | None = None
    if event.io_status == "nospace":
        reason = PauseReason.NO_SPACE
    elif event.io_status == "failed":
        reason = PauseReason.IO_ERROR
    elif job.pause_reason is PauseReason.USER and not job.pause_wanted:
        return Step(job, (), (Command.RESUME,))
    elif job.pause_wanted or event.paused_for >= FOREIGN_PAUSE:
        reason = PauseReason.USER
    if reason is None or job.state not in PAUSABLE or reason is job.pause_reason:
        return Step(job)
    wanted = job.pause_wanted or reason is PauseReason.USER
    return _save(replace(job, state=State.PAUSED, pause_reason=reason, pause_wanted=wanted), EventType.PAUSED)


PAUSABLE: Final = frozenset({State.RUNNING, State.PAUSED, State.READY})
"""States in which a pause that QEMU shows, or its reason, is news. A ready job is paused by an I/O error only."""

FOREIGN_PAUSE: Final = 2.0
"""Seconds after which a pause that nobody here asked for is not one of QEMU's own short ones any more."""


def _observed_ready(job: Job, event: Observed, now: int) -> Step:
    if job.state is State.READY:
        # Only a `keep` that QEMU has not obeyed yet has anything to do here.
        return Step(job, (), (*_awake(event), Command.CANCEL) if job.intent is Intent.KEEP else ())
    if job.state is State.PIVOTING:
        # Declined before, so asked again; taken already, so it is converging under the guest's writes.
        return Step(job, (), (*_awake(event), *(() if job.complete_taken else (Command.COMPLETE,))))
    # A pause that was asked for while it ran has no meaning for a job that has nothing left to copy.
    resume = (Command.RESUME,) if job.pause_wanted else ()
    ready = replace(
        job,
        state=State.READY,
        ready_at=job.ready_at or now,
        pause_reason=None,
        pause_wanted=False,
        unconfirmed=resume,
    )
    told = _save(ready, EventType.READY, *resume)
    if job.on_ready is OnReady.PIVOT:
        return _then(told, _begin_pivot(told.job))
    if job.on_ready is OnReady.KEEP:
        return _then(told, _save(replace(told.job, intent=Intent.KEEP), None, Command.CANCEL))
    return told


def _begin_pivot(job: Job) -> Step:
    pivoting = replace(job, state=State.PIVOTING, intent=Intent.PIVOT, complete_taken=False, complete_attempts=0)
    return _save(pivoting, EventType.PIVOTING, Command.COMPLETE)


def _begin_abort(job: Job, *, force: bool) -> Step:
    # A paused job takes no gentle cancel; before ready there is no consistent copy to wait for anyway.
    hard = force or job.state is State.PAUSED
    intent = Intent.FORCE if force else Intent.ABORT
    aborting = replace(job, state=State.ABORTING, intent=intent, pause_reason=None, unconfirmed=())
    return _save(aborting, EventType.ABORTING, Command.CANCEL_FORCE if hard else Command.CANCEL)


def _complete_taken(job: Job, _event: Event, _now: int) -> Step:
    # Not stored: after a restart the command is sent again, which does no harm.
    return Step(replace(job, complete_taken=True))


def _complete_declined(job: Job, event: Event, _now: int) -> Step:
    assert isinstance(event, CompleteDeclined)
    tried = replace(job, complete_attempts=job.complete_attempts + 1)
    if tried.complete_attempts < PIVOT_ATTEMPTS:
        return Step(tried)
    back = replace(tried, state=State.READY, intent=Intent.RUN, on_ready=OnReady.WAIT, error=event.problem)
    return _save(back, EventType.READY)


def _absent_starting(job: Job, _event: Event, _now: int) -> Step:
    # It was never started, or ran and was dismissed by somebody: the chain tells which.
    return Step(job, (), (Command.CHECK_CHAIN,))


def _checked_starting(job: Job, event: Event, now: int) -> Step:
    assert isinstance(event, Checked)
    if event.proof is Proof.UNCHANGED:
        if job.intent in (Intent.ABORT, Intent.FORCE):
            return _end(job, State.CANCELED, now)
        return Step(job, (), (Command.START,))
    if event.proof is Proof.MERGED:
        started = _accepted(job, event, now)
        done = replace(started.job, state=State.CONCLUDING, verdict=Verdict.VANISHED)
        concluding = _then(started, Step(done))
        return _then(concluding, _checked(done, event, now))
    problem = Problem(
        code=Code.CHAIN_CHANGED,
        detail="the chain is not the one that the job was accepted for, and the job was never started; "
        "read the disk again and send the request again",
    )
    return _end(replace(job, error=problem), State.FAILED, now)


def _absent(job: Job, _event: Event, _now: int) -> Step:
    return _conclude(job, Verdict.VANISHED, Command.CHECK_CHAIN)


def _gone(job: Job, _event: Event, _now: int) -> Step:
    return _conclude(replace(job, data_state=DataState.BASE_MODIFIED), Verdict.GONE, Command.CHECK_IMAGES)


def _gone_queued(job: Job, _event: Event, now: int) -> Step:
    return _end(replace(job, error=_domain_gone("before the job was started")), State.FAILED, now)


def _gone_concluding(job: Job, _event: Event, _now: int) -> Step:
    if job.ending is not None:
        return Step(job, (), (Command.SETTLE,))
    # What QEMU said at the end is kept: with it, an image that proves nothing may still be judged.
    return Step(job, (), (Command.CHECK_IMAGES,))


def _observed_concluding(job: Job, _event: Event, _now: int) -> Step:
    """After a restart: what was being done at the end is done again."""
    return Step(job, (), (Command.SETTLE if job.ending else Command.CHECK_CHAIN,))


def _domain_gone(when: str) -> Problem:
    return Problem(
        code=Code.DOMAIN_GONE,
        detail=f"QEMU ended {when}; the chain was not merged. Start the domain from the same active layer and "
        "send the request again.",
    )


def _checked(job: Job, event: Event, _now: int) -> Step:
    assert isinstance(event, Checked)
    if job.ending is not None:
        # Judged already, and the tidying may have changed the chain since.
        return Step(job)
    state, error = _outcome(job, event.proof)
    data = DataState.MERGED if state is State.COMPLETED else job.data_state
    judged = replace(job, ending=state, error=error, data_state=data)
    return _save(judged, None, Command.SETTLE)


def _outcome(job: Job, proof: Proof) -> tuple[State, Problem | None]:
    """The ending that QEMU's last word and the chain prove together."""
    aborted = job.intent in (Intent.ABORT, Intent.FORCE)
    match job.verdict, proof:
        case Verdict.ERROR, _:
            text = job.verdict_error or ""
            if text == CANCELED:
                return State.CANCELED, None
            return State.FAILED, qemu_problem("GenericError", text, doing="the job ended with an error")
        case _, Proof.MERGED:
            return State.COMPLETED, None
        case Verdict.FINE, Proof.UNCHANGED if job.intent is Intent.KEEP:
            return State.COMPLETED, None
        case Verdict.FINE, Proof.UNCHANGED if job.type is JobType.ACTIVE_COMMIT:
            # A gentle cancel at ready, ours or another client's, ends without error and without pivot.
            return State.CANCELED, None
        case Verdict.FINE, Proof.UNCHANGED:
            return State.FAILED, Problem(
                code=Code.NOT_MERGED,
                detail="QEMU concluded the job without error, but the chain still holds the layers to be merged",
            )
        case Verdict.VANISHED, Proof.UNCHANGED if aborted:
            return State.CANCELED, None
        case Verdict.VANISHED, Proof.UNCHANGED if job.intent is not Intent.KEEP:
            return State.FAILED, Problem(
                code=Code.JOB_VANISHED,
                detail="another client of QEMU took the job away; the chain was not merged",
            )
        case Verdict.GONE, Proof.UNCHANGED if job.intent is not Intent.KEEP:
            return State.FAILED, _domain_gone("while the job ran")
        case _:
            return State.LOST, Problem(
                code=Code.OUTCOME_UNKNOWN,
                detail=f"QEMU's last word on the job: {job.verdict}; the chain shows: {proof}. "
                "Neither proves whether the layers were merged; no image was deleted.",
            )


def _settled(job: Job, event: Event, now: int) -> Step:
    assert isinstance(event, Settled)
    # A job in this state always has an ending: it is stored in the same step that asks for the tidying.
    left = job.work.undeletable if job.ending is State.COMPLETED else ()
    result = replace(event.result, not_deleted=left + event.result.not_deleted)
    return _end(replace(job, result=result), job.ending or State.LOST, now)


# Requests ------------------------------------------------------------------------------------------------------------


def _abort_queued(job: Job, _event: Event, now: int) -> Step:
    return _end(replace(job, intent=Intent.ABORT), State.CANCELED, now)


def _abort_starting(job: Job, event: Event, _now: int) -> Step:
    assert isinstance(event, Abort)
    # Whether there is a job to cancel is known once QEMU has answered; `_accepted` obeys then.
    return _save(replace(job, intent=Intent.FORCE if event.force else Intent.ABORT), None)


def _abort(job: Job, event: Event, _now: int) -> Step:
    assert isinstance(event, Abort)
    return _begin_abort(job, force=event.force)


def _abort_aborting(job: Job, event: Event, _now: int) -> Step:
    assert isinstance(event, Abort)
    if event.force and job.intent is not Intent.FORCE:
        return _save(replace(job, intent=Intent.FORCE), None, Command.CANCEL_FORCE)
    return Step(job)


def _abort_concluding(job: Job, _event: Event, _now: int) -> Step:
    if job.intent in (Intent.ABORT, Intent.FORCE):
        return Step(job)
    code = Code.JOB_PIVOTING if job.intent is Intent.PIVOT else Code.JOB_FINISHED
    raise Refused(Problem(code=code, detail=f"the job {job.id} is concluding; its outcome is being read"))


def _pivot(job: Job, event: Event, now: int) -> Step:
    return _begin_pivot(job) if job.pivotable else _not_ready(job, event, now)


def _pivot_pivoting(job: Job, _event: Event, _now: int) -> Step:
    return Step(job)


def _not_ready(job: Job, _event: Event, _now: int) -> Step:
    if not job.pivotable:
        why = "merges below the active layer" if job.type is JobType.COMMIT else "keeps the overlay active"
        raise Refused(
            Problem(
                code=Code.JOB_NOT_PIVOTABLE,
                detail=f"the job {job.id} {why} and ends by itself; there is nothing to pivot",
            )
        )
    raise Refused(
        Problem(
            code=Code.JOB_NOT_READY,
            detail=f"the job {job.id} is {job.state}; a pivot is taken once it is ready (event job.ready)",
        )
    )


def _pause(job: Job, _event: Event, _now: int) -> Step:
    return _save(replace(job, pause_wanted=True, unconfirmed=_asked(job, Command.PAUSE)), None, Command.PAUSE)


def _pause_paused(job: Job, event: Event, now: int) -> Step:
    # A pause by an I/O error, or one that was asked to end, may be over any moment; this one is to last.
    return Step(job) if job.pause_wanted else _pause(job, event, now)


def _not_pausable(job: Job, _event: Event, _now: int) -> Step:
    raise Refused(
        Problem(code=Code.JOB_NOT_PAUSABLE, detail=f"the job {job.id} is {job.state}; only a running job can be paused")
    )


def _resume(job: Job, _event: Event, _now: int) -> Step:
    return _save(replace(job, pause_wanted=False, unconfirmed=_asked(job, Command.RESUME)), None, Command.RESUME)


def _resume_running(job: Job, event: Event, now: int) -> Step:
    # A pause that was asked for and has not been seen yet is taken back.
    return _resume(job, event, now) if job.pause_wanted else _not_paused(job, event, now)


def _not_paused(job: Job, _event: Event, _now: int) -> Step:
    raise Refused(Problem(code=Code.JOB_NOT_PAUSED, detail=f"the job {job.id} is {job.state}, not paused"))


def _set_speed(job: Job, event: Event, _now: int) -> Step:
    assert isinstance(event, SetSpeed)
    faster = replace(job, bandwidth=event.bandwidth, unconfirmed=_asked(job, Command.SET_SPEED))
    return _save(faster, None, Command.SET_SPEED)


def _set_speed_starting(job: Job, event: Event, _now: int) -> Step:
    # Whether the command that starts the job had this speed is not known, so the next look sets it.
    assert isinstance(event, SetSpeed)
    return _save(replace(job, bandwidth=event.bandwidth, unconfirmed=_asked(job, Command.SET_SPEED)), None)


def _set_speed_later(job: Job, event: Event, _now: int) -> Step:
    """Before the job is started it is a wish, which the start carries out; at its end it has no effect."""
    assert isinstance(event, SetSpeed)
    return _save(replace(job, bandwidth=event.bandwidth), None)


def _finished(job: Job, _event: Event, _now: int) -> Step:
    raise Refused(Problem(code=Code.JOB_FINISHED, detail=f"the job {job.id} has ended: {job.state}"))


def _nothing(job: Job, _event: Event, _now: int) -> Step:
    return Step(job)


def _abort_pivoting(job: Job, _event: Event, _now: int) -> Step:
    raise Refused(
        Problem(code=Code.JOB_PIVOTING, detail=f"the job {job.id} is moving the guest onto the base; too late to abort")
    )


Handler = Callable[[Job, Event, int], Step]

TRANSITIONS: Final[Mapping[tuple[State, type[Event]], Handler]] = {
    (State.QUEUED, Launch): _launch,
    (State.QUEUED, Rejected): _rejected,
    (State.QUEUED, Gone): _gone_queued,
    (State.QUEUED, Abort): _abort_queued,
    (State.QUEUED, Pivot): _not_ready,
    (State.QUEUED, Pause): _not_pausable,
    (State.QUEUED, Resume): _not_paused,
    (State.QUEUED, SetSpeed): _set_speed_later,
    (State.STARTING, Accepted): _accepted,
    (State.STARTING, Rejected): _rejected_starting,
    (State.STARTING, Observed): _observed_starting,
    (State.STARTING, Absent): _absent_starting,
    (State.STARTING, Checked): _checked_starting,
    (State.STARTING, Gone): _gone,
    (State.STARTING, Abort): _abort_starting,
    (State.STARTING, Pivot): _not_ready,
    (State.STARTING, Pause): _not_pausable,
    (State.STARTING, Resume): _not_paused,
    (State.STARTING, SetSpeed): _set_speed_starting,
    (State.CONCLUDING, Observed): _observed_concluding,
    (State.CONCLUDING, Absent): _observed_concluding,
    (State.CONCLUDING, Gone): _gone_concluding,
    (State.CONCLUDING, Checked): _checked,
    (State.CONCLUDING, Settled): _settled,
    (State.CONCLUDING, Abort): _abort_concluding,
    (State.CONCLUDING, Pivot): _not_ready,
    (State.CONCLUDING, Pause): _not_pausable,
    (State.CONCLUDING, Resume): _not_paused,
    (State.CONCLUDING, SetSpeed): _set_speed_later,
    **{(state, Observed): _observed for state in WITH_QEMU},
    **{(state, Absent): _absent for state in WITH_QEMU},
    **{(state, Gone): _gone for state in WITH_QEMU},
    **{(state, SetSpeed): _set_speed for state in WITH_QEMU},
    (State.RUNNING, Abort): _abort,
    (State.RUNNING, Pivot): _not_ready,
    (State.RUNNING, Pause): _pause,
    (State.RUNNING, Resume): _resume_running,
    (State.PAUSED, Abort): _abort,
    (State.PAUSED, Pivot): _not_ready,
    (State.PAUSED, Pause): _pause_paused,
    (State.PAUSED, Resume): _resume,
    (State.READY, Abort): _abort,
    (State.READY, Pivot): _pivot,
    (State.READY, Pause): _not_pausable,
    (State.READY, Resume): _not_paused,
    (State.PIVOTING, CompleteTaken): _complete_taken,
    (State.PIVOTING, CompleteDeclined): _complete_declined,
    (State.PIVOTING, Abort): _abort_pivoting,
    (State.PIVOTING, Pivot): _pivot_pivoting,
    (State.PIVOTING, Pause): _not_pausable,
    (State.PIVOTING, Resume): _not_paused,
    (State.ABORTING, Abort): _abort_aborting,
    (State.ABORTING, Pivot): _not_ready,
    (State.ABORTING, Pause): _not_pausable,
    (State.ABORTING, Resume): _not_paused,
    (State.CANCELED, Abort): _nothing,
    **{(state, Abort): _finished for state in ENDED if state is not State.CANCELED},
    **{(state, request): _finished for state in ENDED for request in (Pivot, Pause, Resume, SetSpeed)},
}

IGNORED: Final[Mapping[type[Event], str]] = {
    Launch: "the place was given before a restart, or the job was canceled while it waited",
    Accepted: "a look at query-jobs told of it first",
    Rejected: "QEMU refused a second start under the same id, as the first one had worked",
    Observed: "a job that waits is not in QEMU yet, and one that ended is only waiting to be dismissed",
    Absent: "a job that waits is not in QEMU yet, and one that ended has been dismissed",
    Gone: "the outcome was known before QEMU ended",
    Checked: "the chain was read for a question that has been answered meanwhile",
    Settled: "only a concluding job is tidied up after",
    CompleteTaken: "the job concluded before QEMU's reply to job-complete was read",
    CompleteDeclined: "the job concluded before QEMU's reply to job-complete was read",
}
"""Why an event that is in no row of `TRANSITIONS` for a state changes nothing there."""
