"""How a job moves by itself: the handlers of what QEMU says and of what became of our own commands."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from app.core.errors import CANCELED, Code, Problem, qemu_problem
from app.core.job import (
    ENDINGS,
    Command,
    DataState,
    EventType,
    Intent,
    Job,
    JobType,
    NotDeleted,
    OnReady,
    PauseReason,
    Proof,
    State,
    Verdict,
    Work,
)
from app.core.machine.inputs import Accepted, Checked, CleanedUp, CompleteDeclined, Input, Launch, Observed, Rejected

PIVOT_ATTEMPTS: Final = 60
"""How often a pivot that QEMU declines is tried again (a mirror flips out of ready under writes) before the job is
given back as `ready`."""


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A version of the job that is stored, with the event that tells of it, if one does."""

    type: EventType | None
    job: Job


@dataclass(frozen=True, slots=True)
class Step:
    """What follows from an event: the job now, what to store (in this order, in one transaction), what to do then."""

    job: Job
    told: tuple[StoredVersion, ...] = ()
    commands: tuple[Command, ...] = ()


def save(job: Job, type_: EventType | None, *commands: Command) -> Step:
    stored = replace(job, version=job.version + 1)
    return Step(stored, (StoredVersion(type_, stored),), commands)


def _then(first: Step, second: Step) -> Step:
    once = tuple(command for command in second.commands if command not in first.commands)
    return Step(second.job, first.told + second.told, first.commands + once)


def asked(job: Job, command: Command) -> tuple[Command, ...]:
    """What is to be sent again at the next look, now that `command` is sent; the last wish of its kind counts."""
    same_kind = (Command.SET_SPEED,) if command is Command.SET_SPEED else (Command.PAUSE, Command.RESUME)
    return (*(other for other in job.unconfirmed if other not in same_kind), command)


# Handlers ------------------------------------------------------------------------------------------------------------


def launch(job: Job, event: Input, _now: int) -> Step:
    assert isinstance(event, Launch)
    return save(replace(job, state=State.STARTING, process=event.process), None, Command.START)


def accepted(job: Job, event: Input, now: int) -> Step:
    told = event.process if isinstance(event, Accepted | Observed) else None
    running = replace(
        job,
        state=State.RUNNING,
        started_at=now,
        process=told or job.process,
        rejection=None,
        # From here on QEMU may write into the base at any moment, whatever its counters say.
        data_state=DataState.BASE_MODIFIED,
    )
    started = save(running, EventType.STARTED)
    if job.intent in (Intent.ABORT, Intent.FORCE):
        return _then(started, begin_abort(started.job, force=job.intent is Intent.FORCE))
    return started


def rejected_starting(job: Job, event: Input, now: int) -> Step:
    assert isinstance(event, Rejected)
    if job.start_again:
        # An earlier attempt, whose reply was lost, may have got through after all, and be what is in the way: QEMU says
        # `Need a root block node` then, or `Job ID already in use`. The next look tells.
        return Step(replace(job, rejection=event.problem))
    return rejected(job, event, now)


def rejected(job: Job, event: Input, now: int) -> Step:
    assert isinstance(event, Rejected)
    return end(replace(job, error=event.problem), State.FAILED, now)


def end(job: Job, state: State, now: int) -> Step:
    progress = replace(job.progress, rate=0, eta=None)
    ended = replace(job, state=state, finished_at=now, pause_reason=None, progress=progress)
    return save(ended, ENDINGS[state])


def _conclude(job: Job, verdict: Verdict, look: Command) -> Step:
    done = replace(job, state=State.CONCLUDING, verdict=verdict, pause_reason=None, unconfirmed=())
    return save(done, None, look)


def observed_starting(job: Job, event: Input, now: int) -> Step:
    # The reply was lost (a timeout, a restart), but QEMU lists the job, so it took the command.
    started = accepted(job, event, now)
    return _then(started, observed(started.job, event, now))


def observed(job: Job, event: Input, now: int) -> Step:
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
    failing = event.status == "standby" and event.io_status != "ok"
    if job.state is State.ABORTING:
        # Sent again as long as it shows no effect: a restart may have come between storing the wish and the command.
        if event.status in ("waiting", "aborting") or (event.status == "pending" and job.type is not JobType.COMMIT):
            return Step(job)
        # A copy that can't be made consistent is not waited for.
        hard = job.intent is Intent.FORCE or event.status == "paused" or failing
        return Step(job, (), (Command.CANCEL_FORCE,) if hard else (*_awake(event), Command.CANCEL))
    if event.status == "pending" and job.type is JobType.COMMIT:
        return Step(job, (), (Command.FINALIZE,))
    if event.status == "paused" or failing:
        return _observed_paused(job, event, again)
    if event.status in ("ready", "standby"):
        return _observed_ready(job, event, now)
    if event.status == "running" and job.state is State.RUNNING and job.pause_wanted:
        return Step(job, (), (Command.PAUSE,))
    if event.status == "running" and job.state is State.PAUSED:
        # Somebody resumed it, unless a pause was asked for that may not have reached QEMU yet.
        wanted = Command.PAUSE in again
        return save(replace(job, state=State.RUNNING, pause_reason=None, pause_wanted=wanted), EventType.RESUMED)
    # created, waiting, pending, aborting: QEMU is on its way to a status that tells more.
    return Step(job)


def _awake(event: Observed) -> tuple[Command, ...]:
    # A ready job that somebody paused is in standby: it takes no gentle cancel, and its pivot would wait for ever.
    # One of QEMU's own short breaks looks the same, and resuming it does nothing.
    return (Command.RESUME,) if event.status == "standby" else ()


def _observed_paused(job: Job, event: Observed, again: tuple[Command, ...]) -> Step:
    resumed = Command.RESUME in again
    if job.state is State.PIVOTING and resumed:
        # Whether the cause has gone shows once the resume has surely arrived.
        return Step(job)
    reason: PauseReason | None = None
    if event.io_status == "nospace":
        reason = PauseReason.NO_SPACE
    elif event.io_status == "failed":
        reason = PauseReason.IO_ERROR
    elif job.pause_reason is PauseReason.USER and not job.pause_wanted:
        return Step(job, (), (Command.RESUME,))
    elif job.pause_wanted or event.paused_for >= FOREIGN_PAUSE:
        reason = PauseReason.USER
    # A job that falls back so fast that no look saw it run has paused anew all the same.
    told = reason is job.pause_reason and not resumed
    if reason is None or job.state not in PAUSABLE or told:
        return Step(job)
    wanted = job.pause_wanted or reason is PauseReason.USER
    return save(replace(job, state=State.PAUSED, pause_reason=reason, pause_wanted=wanted), EventType.PAUSED)


PAUSABLE: Final = frozenset({State.RUNNING, State.PAUSED, State.READY, State.PIVOTING})
"""States in which a pause that QEMU shows, or its reason, is news. From ready on, only an I/O error pauses a job."""

FOREIGN_PAUSE: Final = 2.0
"""Seconds after which a pause that nobody here asked for is not one of QEMU's own short ones any more."""


def _observed_ready(job: Job, event: Observed, now: int) -> Step:
    if job.state is State.READY:
        # Only a `keep` that QEMU has not obeyed yet has anything to do here.
        return Step(job, (), (*_awake(event), Command.CANCEL) if job.intent is Intent.KEEP else ())
    if job.state is State.PIVOTING:
        # Declined before, so asked again; taken already, so it is converging under the guest's writes.
        return Step(job, (), (*_awake(event), *(() if job.complete_taken else (Command.COMPLETE,))))
    if job.intent is Intent.PIVOT:
        # An I/O error paused it on its way, and another client has resumed it.
        return begin_pivot(job)
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
    told = save(ready, EventType.READY, *resume)
    if job.on_ready is OnReady.PIVOT:
        return _then(told, begin_pivot(told.job))
    if job.on_ready is OnReady.KEEP:
        return _then(told, save(replace(told.job, intent=Intent.KEEP), None, Command.CANCEL))
    return told


def begin_pivot(job: Job, *first: Command) -> Step:
    pivoting = replace(
        job,
        state=State.PIVOTING,
        intent=Intent.PIVOT,
        pivot_asked=True,
        pause_reason=None,
        pause_wanted=False,
        complete_taken=False,
        complete_attempts=0,
    )
    return save(pivoting, EventType.PIVOTING, *first, Command.COMPLETE)


def begin_abort(job: Job, *, force: bool) -> Step:
    # A paused job takes no gentle cancel; before ready there is no consistent copy to wait for anyway.
    hard = force or job.state is State.PAUSED
    intent = Intent.FORCE if force else Intent.ABORT
    aborting = replace(job, state=State.ABORTING, intent=intent, pause_reason=None, unconfirmed=())
    return save(aborting, EventType.ABORTING, Command.CANCEL_FORCE if hard else Command.CANCEL)


def complete_taken(job: Job, _event: Input, _now: int) -> Step:
    # Not stored: after a restart the command is sent again, which does no harm.
    return Step(replace(job, complete_taken=True))


def complete_declined(job: Job, event: Input, _now: int) -> Step:
    assert isinstance(event, CompleteDeclined)
    tried = replace(job, complete_attempts=job.complete_attempts + 1)
    if tried.complete_attempts < PIVOT_ATTEMPTS:
        return Step(tried)
    back = replace(tried, state=State.READY, intent=Intent.RUN, on_ready=OnReady.WAIT, error=event.problem)
    return save(back, EventType.READY)


def absent_starting(job: Job, _event: Input, _now: int) -> Step:
    # It was never started, or ran and was dismissed by somebody: the chain tells which.
    return Step(job, (), (Command.CHECK_CHAIN,))


def checked_starting(job: Job, event: Input, now: int) -> Step:
    assert isinstance(event, Checked)
    if event.proof is Proof.UNCHANGED:
        if job.intent in (Intent.ABORT, Intent.FORCE):
            return end(job, State.CANCELED, now)
        if job.rejection is not None:
            return rejected(job, Rejected(job.rejection), now)
        return Step(replace(job, start_again=True), (), (Command.START,))
    if event.proof is Proof.MERGED:
        started = accepted(job, event, now)
        done = replace(started.job, state=State.CONCLUDING, verdict=Verdict.VANISHED)
        concluding = _then(started, Step(done))
        return _then(concluding, checked(done, event, now))
    problem = Problem(
        code=Code.CHAIN_CHANGED,
        detail="the chain is not the one that the job was accepted for, and the job was never started; "
        "read the disk again and send the request again",
    )
    return end(replace(job, error=problem), State.FAILED, now)


def absent(job: Job, _event: Input, _now: int) -> Step:
    return _conclude(job, Verdict.VANISHED, Command.CHECK_CHAIN)


def gone(job: Job, _event: Input, _now: int) -> Step:
    return _conclude(replace(job, data_state=DataState.BASE_MODIFIED), Verdict.GONE, Command.CHECK_IMAGES)


def gone_queued(job: Job, _event: Input, now: int) -> Step:
    return end(replace(job, error=_domain_gone("before the job was started")), State.FAILED, now)


def gone_concluding(job: Job, _event: Input, _now: int) -> Step:
    if job.ending is not None:
        return Step(job, (), (Command.CLEAN_UP,))
    # What QEMU said at the end is kept: with it, an image that proves nothing may still be judged.
    return Step(job, (), (Command.CHECK_IMAGES,))


def observed_concluding(job: Job, _event: Input, _now: int) -> Step:
    """After a restart: what was being done at the end is done again."""
    return Step(job, (), (Command.CLEAN_UP if job.ending else Command.CHECK_CHAIN,))


def _domain_gone(when: str) -> Problem:
    return Problem(
        code=Code.DOMAIN_GONE,
        detail=f"QEMU ended {when}; the chain was not merged. Start the domain from the same active layer and "
        "send the request again.",
    )


def checked(job: Job, event: Input, _now: int) -> Step:
    assert isinstance(event, Checked)
    if job.ending is not None:
        # Judged already, and the tidying may have changed the chain since.
        return Step(job)
    state, error = _outcome(job, event.proof)
    data = DataState.MERGED if state is State.COMPLETED else job.data_state
    work = job.work if event.flushed else _kept(job.work)
    judged = replace(job, ending=state, error=error, data_state=data, work=work)
    return save(judged, None, Command.CLEAN_UP)


def _kept(work: Work) -> Work:
    """The work without its deletions: until the base is on the disk, the merged layers hold the only lasting copy."""
    reason = "QEMU has not confirmed that all of the merged data is in the base on the disk"
    kept = tuple(NotDeleted(file=file, reason=reason) for file in work.deletes)
    return replace(work, deletes=(), undeletable=work.undeletable + kept)


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


def cleaned_up(job: Job, event: Input, now: int) -> Step:
    assert isinstance(event, CleanedUp)
    # A job in this state always has an ending: it is stored in the same step that asks for the tidying.
    left = job.work.undeletable if job.ending is State.COMPLETED else ()
    result = replace(event.result, not_deleted=left + event.result.not_deleted)
    return end(replace(job, result=result), job.ending or State.LOST, now)
