"""The handlers of reports: what QEMU says, and what became of our own commands."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from app.core.errors import Code, Problem
from app.core.evidence import Evidence, Proof, Verdict
from app.core.job import Job
from app.core.kinds import kind_of
from app.core.kinds.outcome import domain_gone
from app.core.machine.inputs import (
    Accepted,
    CleanedUp,
    Gathered,
    Input,
    Launch,
    Observed,
    PivotDeclined,
    Rejected,
)
from app.core.machine.step import Step, begin_abort, begin_pivot, end, save
from app.core.sameness import Sameness
from app.core.states import Command, EventType, Intent, OnReady, PauseReason, State

PIVOT_ATTEMPTS: Final = 60
"""How often a pivot that QEMU declines is tried again (a mirror flips out of ready under writes) before the job is
given back as `ready`."""

PAUSABLE: Final = frozenset({State.RUNNING, State.PAUSED, State.READY, State.PIVOTING})
"""States in which a pause that QEMU shows, or its reason, is news. From ready on, only an I/O error pauses a job."""

FOREIGN_PAUSE: Final = 2.0
"""Seconds after which a pause that nobody here asked for is not one of QEMU's own short ones any more."""

ABORTED: Final = frozenset({Intent.ABORT, Intent.FORCE})


# Starting ------------------------------------------------------------------------------------------------------------


def launch(job: Job, event: Input, _now: int) -> Step:
    assert isinstance(event, Launch)
    control = replace(job.control, process=event.process)
    return save(replace(job, state=State.STARTING, control=control), None, Command.START)


def accepted(job: Job, event: Input, now: int) -> Step:
    told = event.process if isinstance(event, Accepted | Observed) else None
    running = replace(
        job,
        state=State.RUNNING,
        started_at=now,
        # From here on QEMU may write at any moment, whatever its counters say.
        data_state=job.capabilities.data_at_start,
        control=replace(job.control, process=told or job.control.process, rejection=None),
    )
    started = save(running, EventType.STARTED)
    if job.control.intent in ABORTED:
        return started.then(begin_abort(started.job, force=job.control.intent is Intent.FORCE))
    return started


def rejected_starting(job: Job, event: Input, now: int) -> Step:
    assert isinstance(event, Rejected)
    if job.control.start_again:
        # An earlier attempt, whose reply was lost, may have got through after all, and be what is in the way: QEMU says
        # `Need a root block node` then, or `Job ID already in use`. The next look tells.
        return Step(replace(job, control=replace(job.control, rejection=event.problem)))
    return rejected(job, event, now)


def rejected(job: Job, event: Input, now: int) -> Step:
    assert isinstance(event, Rejected)
    return end(replace(job, error=event.problem), State.FAILED, now)


def absent_starting(job: Job, _event: Input, _now: int) -> Step:
    # It was never started, or ran and was dismissed by somebody: the chain tells which.
    return Step(job, (), (Command.GATHER,))


def _is_that_disk(job: Job, evidence: Evidence) -> bool:
    """Whether the images that QEMU has are known to be those that the job was accepted for."""
    known = {layer.identity for layer in (*job.spec.merged, job.spec.lasting)}
    return evidence.graph is not None and None not in known and known.issubset(evidence.graph.identities)


def gathered_starting(job: Job, event: Input, now: int) -> Step:
    assert isinstance(event, Gathered)
    proof = kind_of(job.spec).prove(job.spec, event.evidence)
    # Where neither the process nor the images can be told from others, it may be another machine's disk, and the job at
    # work in a QEMU that nobody sees.
    doubtful = event.evidence.process is Sameness.UNKNOWN and not _is_that_disk(job, event.evidence)
    if proof is Proof.UNCHANGED and not doubtful:
        if job.control.intent in ABORTED:
            return end(job, State.CANCELED, now)
        if job.control.rejection is not None:
            return rejected(job, Rejected(job.control.rejection), now)
        return Step(replace(job, control=replace(job.control, start_again=True)), (), (Command.START,))
    if proof is not Proof.UNKNOWN or event.evidence.process is not Sameness.SAME:
        # Another QEMU's chain says nothing of whether the command got through to the one before.
        started = accepted(job, event, now)
        control = replace(started.job.control, verdict=Verdict.VANISHED)
        done = replace(started.job, state=State.CONCLUDING, control=control)
        return started.then(Step(done)).then(gathered(done, event, now))
    problem = Problem(
        code=Code.CHAIN_CHANGED,
        detail="the chain is not the one that the job was accepted for, and the job was never started; "
        "read the disk again and send the request again",
    )
    return end(replace(job, error=problem), State.FAILED, now)


# Running -------------------------------------------------------------------------------------------------------------


def observed_starting(job: Job, event: Input, now: int) -> Step:
    # The reply was lost (a timeout, a restart), but QEMU lists the job, so it took the command.
    started = accepted(job, event, now)
    return started.then(observed(started.job, event, now))


def observed(job: Job, event: Input, now: int) -> Step:
    assert isinstance(event, Observed)
    job = replace(job, progress=event.progress)
    if event.status == "concluded":
        verdict = Verdict.ERROR if event.error else Verdict.FINE
        return _conclude(replace(job, control=replace(job.control, verdict_error=event.error)), verdict)
    # There is nothing left to pause in a job that is ready.
    unconfirmed = job.control.unconfirmed
    again = tuple(c for c in unconfirmed if c is not Command.PAUSE or event.status in ("running", "paused"))
    sent = Step(replace(job, control=replace(job.control, unconfirmed=())), (), again)
    return sent.then(_observed_alive(sent.job, event, now, again))


def _observed_alive(job: Job, event: Observed, now: int, again: tuple[Command, ...]) -> Step:
    failing = event.status == "standby" and event.io_status != "ok"
    held = event.status == "pending" and job.capabilities.held_at_pending
    if job.state is State.ABORTING:
        # Sent again as long as it shows no effect: a restart may have come between storing the wish and the command.
        if event.status in ("waiting", "aborting") or (event.status == "pending" and not held):
            return Step(job)
        # A copy that can't be made consistent is not waited for.
        hard = job.control.intent is Intent.FORCE or event.status == "paused" or failing
        return Step(job, (), (Command.ABORT_FORCE,) if hard else (*_awake(event), Command.ABORT))
    if held:
        return Step(job, (), (Command.FINALIZE,))
    if event.status == "paused" or failing:
        return _observed_paused(job, event, again)
    if event.status in ("ready", "standby"):
        return _observed_ready(job, event, now)
    if event.status == "running" and job.state is State.RUNNING and job.control.pause_wanted:
        return Step(job, (), (Command.PAUSE,))
    if event.status == "running" and job.state is State.PAUSED:
        # Somebody resumed it, unless a pause was asked for that may not have reached QEMU yet.
        control = replace(job.control, pause_wanted=Command.PAUSE in again)
        return save(replace(job, state=State.RUNNING, pause_reason=None, control=control), EventType.RESUMED)
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
    elif job.pause_reason is PauseReason.USER and not job.control.pause_wanted:
        return Step(job, (), (Command.RESUME,))
    elif job.control.pause_wanted or event.paused_for >= FOREIGN_PAUSE:
        reason = PauseReason.USER
    # A job that pauses again between two polls still counts as a new pause.
    told = reason is job.pause_reason and not resumed
    if reason is None or job.state not in PAUSABLE or told:
        return Step(job)
    control = replace(job.control, pause_wanted=job.control.pause_wanted or reason is PauseReason.USER)
    return save(replace(job, state=State.PAUSED, pause_reason=reason, control=control), EventType.PAUSED)


def _observed_ready(job: Job, event: Observed, now: int) -> Step:
    intent = job.control.intent
    if job.state is State.READY:
        # Only a `keep` that QEMU has not obeyed yet has anything to do here.
        return Step(job, (), (*_awake(event), Command.ABORT) if intent is Intent.KEEP else ())
    if job.state is State.PIVOTING:
        # Declined before, so asked again; taken already, so it is converging under the guest's writes.
        return Step(job, (), (*_awake(event), *(() if job.control.pivot_taken else (Command.PIVOT,))))
    if intent is Intent.PIVOT:
        # An I/O error paused it on its way, and another client has resumed it.
        return begin_pivot(job)
    # A pause that was asked for while it ran has no meaning for a job that has nothing left to copy.
    resume = (Command.RESUME,) if job.control.pause_wanted else ()
    control = replace(job.control, pause_wanted=False, unconfirmed=resume)
    ready = replace(job, state=State.READY, ready_at=job.ready_at or now, pause_reason=None, control=control)
    told = save(ready, EventType.READY, *resume)
    if job.on_ready is OnReady.PIVOT:
        return told.then(begin_pivot(told.job))
    if job.on_ready is OnReady.KEEP:
        keeping = replace(told.job, control=replace(told.job.control, intent=Intent.KEEP))
        return told.then(save(keeping, None, Command.ABORT))
    return told


def pivot_taken(job: Job, _event: Input, _now: int) -> Step:
    # Not stored: after a restart the command is sent again, which does no harm.
    return Step(replace(job, control=replace(job.control, pivot_taken=True)))


def pivot_declined(job: Job, event: Input, _now: int) -> Step:
    assert isinstance(event, PivotDeclined)
    control = replace(job.control, pivot_attempts=job.control.pivot_attempts + 1)
    if control.pivot_attempts < PIVOT_ATTEMPTS:
        return Step(replace(job, control=control))
    control = replace(control, intent=Intent.RUN)
    back = replace(job, state=State.READY, on_ready=OnReady.WAIT, error=event.problem, control=control)
    return save(back, EventType.READY)


# Ending --------------------------------------------------------------------------------------------------------------


def _conclude(job: Job, verdict: Verdict) -> Step:
    control = replace(job.control, verdict=verdict, unconfirmed=())
    return save(replace(job, state=State.CONCLUDING, pause_reason=None, control=control), None, Command.GATHER)


def absent(job: Job, _event: Input, _now: int) -> Step:
    return _conclude(job, Verdict.VANISHED)


def gone(job: Job, _event: Input, _now: int) -> Step:
    return _conclude(replace(job, data_state=job.capabilities.data_at_start), Verdict.GONE)


def gone_queued(job: Job, _event: Input, now: int) -> Step:
    return end(replace(job, error=domain_gone("before the job was started")), State.FAILED, now)


def concluding_again(job: Job, _event: Input, _now: int) -> Step:
    """After a restart, or once QEMU has ended: what was being done at the end is done again.

    What QEMU said at the end is kept: with it, an image that proves nothing may still be judged.
    """
    return Step(job, (), (Command.GATHER if job.control.judgement is None else Command.CLEAN_UP,))


def gathered(job: Job, event: Input, now: int) -> Step:
    assert isinstance(event, Gathered)
    control = job.control
    if control.judgement is not None:
        # Judged already, and the tidying may have changed the chain since.
        return Step(job)
    # Another client may have ended it at ready before anybody here has seen that it was, or may have had it pivot.
    merged = kind_of(job.spec).prove(job.spec, event.evidence) is Proof.MERGED
    meddled = control.intent is Intent.RUN or (control.intent in ABORTED and merged)
    unseen = job.on_ready is OnReady.KEEP and meddled
    evidence = replace(
        event.evidence,
        verdict=control.verdict,
        verdict_error=control.verdict_error,
        intent=Intent.KEEP if unseen and control.verdict is not Verdict.GONE else control.intent,
        pivot_asked=control.pivot_asked,
    )
    judgement = kind_of(job.spec).judge(job.spec, evidence)
    judged = replace(
        job,
        error=judgement.error,
        data_state=judgement.data_state or job.data_state,
        control=replace(control, judgement=judgement, judged_at=now),
    )
    return save(judged, None, Command.CLEAN_UP)


def cleaned_up(job: Job, event: Input, now: int) -> Step:
    assert isinstance(event, CleanedUp)
    # A job in this state always has a judgement: it is stored in the same step that asks for the tidying.
    assert job.control.judgement is not None
    if event.problem is not None:
        return end(replace(job, result=event.result, error=event.problem), State.FAILED, now)
    return end(replace(job, result=event.result), job.control.judgement.state, now)
