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
from typing import Final

from app.core.job import ENDED, WITH_QEMU, EventType, Job, State
from app.core.machine.controls import (
    abort,
    abort_aborting,
    abort_concluding,
    abort_pivoting,
    abort_queued,
    abort_starting,
    finished,
    not_lost,
    not_pausable,
    not_paused,
    not_ready,
    nothing,
    pause,
    pause_paused,
    pivot,
    pivot_pivoting,
    resolve,
    resume,
    resume_running,
    set_speed,
    set_speed_later,
    set_speed_starting,
)
from app.core.machine.inputs import (
    Abort,
    Absent,
    Accepted,
    Checked,
    CleanedUp,
    CompleteDeclined,
    CompleteTaken,
    Gone,
    Input,
    Launch,
    Observed,
    Pause,
    Pivot,
    Rejected,
    Resolve,
    Resume,
    SetSpeed,
)
from app.core.machine.reports import (
    Step,
    StoredVersion,
    absent,
    absent_starting,
    accepted,
    checked,
    checked_starting,
    cleaned_up,
    complete_declined,
    complete_taken,
    gone,
    gone_concluding,
    gone_queued,
    launch,
    observed,
    observed_concluding,
    observed_starting,
    rejected,
    rejected_starting,
)


def start_job(job: Job) -> Step:
    """The first step of every job: it is stored as queued before anybody hears of it."""
    return Step(job, (StoredVersion(EventType.QUEUED, job),))


def step(job: Job, event: Input, now: int) -> Step:
    """What `event` makes of `job` at the time `now` (ms since 1970).

    Raises `Refused` where a request (pivot, abort, pause, resume, speed, resolve) does not fit the state. Other pairs
    that are not in the table change nothing, each for the reason in `IGNORED`.
    """
    handler = TRANSITIONS.get((job.state, type(event)))
    return handler(job, event, now) if handler else Step(job)


Handler = Callable[[Job, Input, int], Step]

TRANSITIONS: Final[Mapping[tuple[State, type[Input]], Handler]] = {
    (State.QUEUED, Launch): launch,
    (State.QUEUED, Rejected): rejected,
    (State.QUEUED, Gone): gone_queued,
    (State.QUEUED, Abort): abort_queued,
    (State.QUEUED, Pivot): not_ready,
    (State.QUEUED, Pause): not_pausable,
    (State.QUEUED, Resume): not_paused,
    (State.QUEUED, SetSpeed): set_speed_later,
    (State.STARTING, Accepted): accepted,
    (State.STARTING, Rejected): rejected_starting,
    (State.STARTING, Observed): observed_starting,
    (State.STARTING, Absent): absent_starting,
    (State.STARTING, Checked): checked_starting,
    (State.STARTING, Gone): gone,
    (State.STARTING, Abort): abort_starting,
    (State.STARTING, Pivot): not_ready,
    (State.STARTING, Pause): not_pausable,
    (State.STARTING, Resume): not_paused,
    (State.STARTING, SetSpeed): set_speed_starting,
    (State.CONCLUDING, Observed): observed_concluding,
    (State.CONCLUDING, Absent): observed_concluding,
    (State.CONCLUDING, Gone): gone_concluding,
    (State.CONCLUDING, Checked): checked,
    (State.CONCLUDING, CleanedUp): cleaned_up,
    (State.CONCLUDING, Abort): abort_concluding,
    (State.CONCLUDING, Pivot): not_ready,
    (State.CONCLUDING, Pause): not_pausable,
    (State.CONCLUDING, Resume): not_paused,
    (State.CONCLUDING, SetSpeed): set_speed_later,
    **{(state, Observed): observed for state in WITH_QEMU},
    **{(state, Absent): absent for state in WITH_QEMU},
    **{(state, Gone): gone for state in WITH_QEMU},
    **{(state, SetSpeed): set_speed for state in WITH_QEMU},
    (State.RUNNING, Abort): abort,
    (State.RUNNING, Pivot): not_ready,
    (State.RUNNING, Pause): pause,
    (State.RUNNING, Resume): resume_running,
    (State.PAUSED, Abort): abort,
    (State.PAUSED, Pivot): not_ready,
    (State.PAUSED, Pause): pause_paused,
    (State.PAUSED, Resume): resume,
    (State.READY, Abort): abort,
    (State.READY, Pivot): pivot,
    (State.READY, Pause): not_pausable,
    (State.READY, Resume): not_paused,
    (State.PIVOTING, CompleteTaken): complete_taken,
    (State.PIVOTING, CompleteDeclined): complete_declined,
    (State.PIVOTING, Abort): abort_pivoting,
    (State.PIVOTING, Pivot): pivot_pivoting,
    (State.PIVOTING, Pause): not_pausable,
    (State.PIVOTING, Resume): not_paused,
    (State.ABORTING, Abort): abort_aborting,
    (State.ABORTING, Pivot): not_ready,
    (State.ABORTING, Pause): not_pausable,
    (State.ABORTING, Resume): not_paused,
    (State.CANCELED, Abort): nothing,
    **{(state, Abort): finished for state in ENDED if state is not State.CANCELED},
    **{(state, request): finished for state in ENDED for request in (Pivot, Pause, Resume, SetSpeed)},
    (State.LOST, Resolve): resolve,
    **{(state, Resolve): not_lost for state in State if state is not State.LOST},
}

IGNORED: Final[Mapping[type[Input], str]] = {
    Launch: "the place was given before a restart, or the job was canceled while it waited",
    Accepted: "a look at query-jobs told of it first",
    Rejected: "QEMU refused a second start under the same id, as the first one had worked",
    Observed: "a job that waits is not in QEMU yet, and one that ended is only waiting to be dismissed",
    Absent: "a job that waits is not in QEMU yet, and one that ended has been dismissed",
    Gone: "the outcome was known before QEMU ended",
    Checked: "the chain was read for a question that has been answered meanwhile",
    CleanedUp: "only a concluding job is tidied up after",
    CompleteTaken: "the job concluded before QEMU's reply to job-complete was read",
    CompleteDeclined: "the job concluded before QEMU's reply to job-complete was read",
}
"""Why an event that is in no row of `TRANSITIONS` for a state changes nothing there."""
