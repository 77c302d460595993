"""The handlers of controls: what people ask of a job.

Each raises `Refused` where the request does not fit the state.
"""

from __future__ import annotations

from dataclasses import replace

from app.core.errors import Code, Problem, Refused
from app.core.job import Job, Resolution
from app.core.machine.inputs import Abort, Input, Resolve, SetSpeed
from app.core.machine.step import Step, asked, begin_abort, begin_pivot, end, save
from app.core.states import ENDINGS, Command, DataState, Intent, State


def abort_queued(job: Job, _event: Input, now: int) -> Step:
    return end(replace(job, control=replace(job.control, intent=Intent.ABORT)), State.CANCELED, now)


def abort_starting(job: Job, event: Input, _now: int) -> Step:
    assert isinstance(event, Abort)
    # Whether there is a job to cancel is known once QEMU has answered; `accepted` obeys then.
    intent = Intent.FORCE if event.force else Intent.ABORT
    return save(replace(job, control=replace(job.control, intent=intent)), None)


def abort(job: Job, event: Input, _now: int) -> Step:
    assert isinstance(event, Abort)
    return begin_abort(job, force=event.force)


def abort_aborting(job: Job, event: Input, _now: int) -> Step:
    assert isinstance(event, Abort)
    if event.force and job.control.intent is not Intent.FORCE:
        forced = replace(job, control=replace(job.control, intent=Intent.FORCE))
        return save(forced, None, Command.ABORT_FORCE)
    return Step(job)


def abort_concluding(job: Job, _event: Input, _now: int) -> Step:
    if job.control.intent in (Intent.ABORT, Intent.FORCE):
        return Step(job)
    code = Code.JOB_PIVOTING if job.control.intent is Intent.PIVOT else Code.JOB_FINISHED
    raise Refused(Problem(code=code, detail=f"the job {job.id} is concluding; its outcome is being read"))


def pivot(job: Job, event: Input, now: int) -> Step:
    return begin_pivot(job) if job.pivotable else not_ready(job, event, now)


def pivot_pivoting(job: Job, _event: Input, _now: int) -> Step:
    return Step(job)


def not_ready(job: Job, _event: Input, _now: int) -> Step:
    if not job.pivotable:
        why = job.capabilities.ends_because or "keeps the overlay active"
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


def pause(job: Job, _event: Input, _now: int) -> Step:
    control = replace(job.control, pause_wanted=True, unconfirmed=asked(job, Command.PAUSE))
    return save(replace(job, control=control), None, Command.PAUSE)


def pause_paused(job: Job, event: Input, now: int) -> Step:
    # A pause by an I/O error, or one that was asked to end, may be over any moment; this one is to last.
    return Step(job) if job.control.pause_wanted else pause(job, event, now)


def not_pausable(job: Job, _event: Input, _now: int) -> Step:
    raise Refused(
        Problem(code=Code.JOB_NOT_PAUSABLE, detail=f"the job {job.id} is {job.state}; only a running job can be paused")
    )


def resume(job: Job, _event: Input, _now: int) -> Step:
    control = replace(job.control, pause_wanted=False, unconfirmed=asked(job, Command.RESUME))
    going = replace(job, control=control)
    # From here on it may have pivoted at any moment, as before the I/O error that paused it.
    return begin_pivot(going, Command.RESUME) if control.intent is Intent.PIVOT else save(going, None, Command.RESUME)


def resume_running(job: Job, event: Input, now: int) -> Step:
    # A pause that was asked for and has not been seen yet is taken back.
    return resume(job, event, now) if job.control.pause_wanted else not_paused(job, event, now)


def not_paused(job: Job, _event: Input, _now: int) -> Step:
    raise Refused(Problem(code=Code.JOB_NOT_PAUSED, detail=f"the job {job.id} is {job.state}, not paused"))


def set_speed(job: Job, event: Input, _now: int) -> Step:
    assert isinstance(event, SetSpeed)
    control = replace(job.control, unconfirmed=asked(job, Command.SET_SPEED))
    return save(replace(job, bandwidth=event.bandwidth, control=control), None, Command.SET_SPEED)


def set_speed_starting(job: Job, event: Input, _now: int) -> Step:
    # Whether the command that starts the job had this speed is not known, so the next look sets it.
    assert isinstance(event, SetSpeed)
    control = replace(job.control, unconfirmed=asked(job, Command.SET_SPEED))
    return save(replace(job, bandwidth=event.bandwidth, control=control), None)


def set_speed_later(job: Job, event: Input, _now: int) -> Step:
    """Before the job is started it is a request, which the start carries out; at its end it has no effect."""
    assert isinstance(event, SetSpeed)
    return save(replace(job, bandwidth=event.bandwidth), None)


def finished(job: Job, _event: Input, _now: int) -> Step:
    raise Refused(Problem(code=Code.JOB_FINISHED, detail=f"the job {job.id} has ended: {job.state}"))


def resolve(job: Job, event: Input, now: int) -> Step:
    assert isinstance(event, Resolve)
    merged = event.outcome is State.COMPLETED
    # A failed job keeps what is known of its outcome as its error; the others have none.
    judged = replace(
        job,
        state=event.outcome,
        data_state=DataState.MERGED if merged else job.data_state,
        error=job.error if event.outcome is State.FAILED else None,
        resolved=Resolution(by=event.by, at=now),
    )
    return save(judged, ENDINGS[event.outcome])


def not_lost(job: Job, _event: Input, _now: int) -> Step:
    known = "its outcome is known" if job.ended else "its outcome is still open"
    raise Refused(
        Problem(
            code=Code.JOB_NOT_LOST,
            detail=f"the job {job.id} is {job.state}: {known}; a verdict is taken on lost jobs only",
        )
    )


def nothing(job: Job, _event: Input, _now: int) -> Step:
    return Step(job)


def abort_pivoting(job: Job, _event: Input, _now: int) -> Step:
    raise Refused(
        Problem(code=Code.JOB_PIVOTING, detail=f"the job {job.id} is moving the guest onto the base; too late to abort")
    )
