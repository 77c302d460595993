r"""A block job as a value, and the one table of how it moves.

    queued -> starting -> running <-> paused
                             |  \
                             |   ready -> pivoting
                             |     |         |
                             +-- aborting ---+--> concluding -> completed | failed | canceled | lost

Each row says for a state and an input which handler decides, and to which states it may lead. The picture in
`docs/job-states.md` is drawn from the rows.

`step(job, event, now)` is pure: it returns the job as it is now, what to store and tell, and what to do next. The
engine stores before it acts, so that a crash between the two is repaired by asking QEMU (`app.core.reconcile`).

QEMU's side of the story (QAPI `JobStatus`): its job is created, running, paused, ready, standby, waiting, pending,
aborting, concluded. It goes through internal pauses of its own at any time, so `paused` there is not `paused` here
unless we asked for it, or an I/O error did. `ready` is QEMU's status and never a comparison of two numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from app.core.job import Job
from app.core.machine import controls, reports
from app.core.machine.inputs import (
    Abort,
    Absent,
    Accepted,
    CleanedUp,
    Gathered,
    Gone,
    Input,
    Launch,
    Observed,
    Pause,
    Pivot,
    PivotDeclined,
    PivotTaken,
    Rejected,
    Resolve,
    Resume,
    SetSpeed,
)
from app.core.machine.step import Step, StoredVersion
from app.core.states import ENDED, WITH_QEMU, EventType, State

Handler = Callable[[Job, Input, int], Step]


class IllegalMove(AssertionError):
    """A handler led to a state that its row does not name: a mistake of ours, found before anything is stored."""


@dataclass(frozen=True, slots=True)
class Row:
    """What an input does in a state: `handler` decides, and leads to one of `leads_to`, or refuses.

    A row that leads nowhere always refuses.
    """

    handler: Handler
    leads_to: frozenset[State]


def start_job(job: Job) -> Step:
    """The first step of every job: it is stored as queued before anybody hears of it."""
    return Step(job, (StoredVersion(EventType.QUEUED, job),))


def step(job: Job, event: Input, now: int) -> Step:
    """What `event` makes of `job` at the time `now` (ms since 1970).

    Raises `Refused` where a request (pivot, abort, pause, resume, speed, resolve) does not fit the state. Other pairs
    that are not in the table change nothing, each for the reason in `IGNORED`.
    """
    row = TRANSITIONS.get((job.state, type(event)))
    if row is None:
        return Step(job)
    # A clock that is set back makes no job end before it began.
    now = max(now, job.created_at, job.started_at or 0, job.ready_at or 0)
    following = row.handler(job, event, now)
    if following.job.state not in row.leads_to:
        raise IllegalMove(f"{job.state} with {type(event).__name__} leads to {following.job.state}")
    return following


def _to(handler: Handler, *states: State) -> Row:
    return Row(handler, frozenset(states))


def _refuse(handler: Handler) -> Row:
    return Row(handler, frozenset())


_ON_ITS_WAY: Final = (State.PAUSED, State.READY, State.PIVOTING, State.CONCLUDING)

TRANSITIONS: Final[Mapping[tuple[State, type[Input]], Row]] = {
    (State.QUEUED, Launch): _to(reports.launch, State.STARTING),
    (State.QUEUED, Rejected): _to(reports.rejected, State.FAILED),
    (State.QUEUED, Gone): _to(reports.gone_queued, State.FAILED),
    (State.QUEUED, Abort): _to(controls.abort_queued, State.CANCELED),
    (State.QUEUED, Pivot): _refuse(controls.not_ready),
    (State.QUEUED, Pause): _refuse(controls.not_pausable),
    (State.QUEUED, Resume): _refuse(controls.not_paused),
    (State.QUEUED, SetSpeed): _to(controls.set_speed_later, State.QUEUED),
    (State.STARTING, Accepted): _to(reports.accepted, State.RUNNING, State.ABORTING),
    (State.STARTING, Rejected): _to(reports.rejected_starting, State.STARTING, State.FAILED),
    (State.STARTING, Observed): _to(reports.observed_starting, State.RUNNING, State.ABORTING, *_ON_ITS_WAY),
    (State.STARTING, Absent): _to(reports.absent_starting, State.STARTING),
    (State.STARTING, Gathered): _to(
        reports.gathered_starting, State.STARTING, State.CANCELED, State.FAILED, State.CONCLUDING
    ),
    (State.STARTING, Gone): _to(reports.gone, State.CONCLUDING),
    (State.STARTING, Abort): _to(controls.abort_starting, State.STARTING),
    (State.STARTING, Pivot): _refuse(controls.not_ready),
    (State.STARTING, Pause): _refuse(controls.not_pausable),
    (State.STARTING, Resume): _refuse(controls.not_paused),
    (State.STARTING, SetSpeed): _to(controls.set_speed_starting, State.STARTING),
    (State.RUNNING, Observed): _to(reports.observed, State.RUNNING, *_ON_ITS_WAY),
    (State.RUNNING, Abort): _to(controls.abort, State.ABORTING),
    (State.RUNNING, Pivot): _refuse(controls.not_ready),
    (State.RUNNING, Pause): _to(controls.pause, State.RUNNING),
    (State.RUNNING, Resume): _to(controls.resume_running, State.RUNNING, State.PIVOTING),
    (State.PAUSED, Observed): _to(reports.observed, State.RUNNING, *_ON_ITS_WAY),
    (State.PAUSED, Abort): _to(controls.abort, State.ABORTING),
    (State.PAUSED, Pivot): _refuse(controls.not_ready),
    (State.PAUSED, Pause): _to(controls.pause_paused, State.PAUSED),
    (State.PAUSED, Resume): _to(controls.resume, State.PAUSED, State.PIVOTING),
    (State.READY, Observed): _to(reports.observed, State.READY, State.PAUSED, State.CONCLUDING),
    (State.READY, Abort): _to(controls.abort, State.ABORTING),
    (State.READY, Pivot): _to(controls.pivot, State.PIVOTING),
    (State.READY, Pause): _refuse(controls.not_pausable),
    (State.READY, Resume): _refuse(controls.not_paused),
    (State.PIVOTING, Observed): _to(reports.observed, State.PIVOTING, State.PAUSED, State.CONCLUDING),
    (State.PIVOTING, PivotTaken): _to(reports.pivot_taken, State.PIVOTING),
    (State.PIVOTING, PivotDeclined): _to(reports.pivot_declined, State.PIVOTING, State.READY),
    (State.PIVOTING, Abort): _refuse(controls.abort_pivoting),
    (State.PIVOTING, Pivot): _to(controls.pivot_pivoting, State.PIVOTING),
    (State.PIVOTING, Pause): _refuse(controls.not_pausable),
    (State.PIVOTING, Resume): _refuse(controls.not_paused),
    (State.ABORTING, Observed): _to(reports.observed, State.ABORTING, State.CONCLUDING),
    (State.ABORTING, Abort): _to(controls.abort_aborting, State.ABORTING),
    (State.ABORTING, Pivot): _refuse(controls.not_ready),
    (State.ABORTING, Pause): _refuse(controls.not_pausable),
    (State.ABORTING, Resume): _refuse(controls.not_paused),
    **{(state, Absent): _to(reports.absent, State.CONCLUDING) for state in WITH_QEMU},
    **{(state, Gone): _to(reports.gone, State.CONCLUDING) for state in WITH_QEMU},
    **{(state, SetSpeed): _to(controls.set_speed, state) for state in WITH_QEMU},
    (State.CONCLUDING, Observed): _to(reports.concluding_again, State.CONCLUDING),
    (State.CONCLUDING, Absent): _to(reports.concluding_again, State.CONCLUDING),
    (State.CONCLUDING, Gone): _to(reports.concluding_again, State.CONCLUDING),
    (State.CONCLUDING, Gathered): _to(reports.gathered, State.CONCLUDING),
    (State.CONCLUDING, CleanedUp): _to(reports.cleaned_up, *ENDED),
    (State.CONCLUDING, Abort): _to(controls.abort_concluding, State.CONCLUDING),
    (State.CONCLUDING, Pivot): _refuse(controls.not_ready),
    (State.CONCLUDING, Pause): _refuse(controls.not_pausable),
    (State.CONCLUDING, Resume): _refuse(controls.not_paused),
    (State.CONCLUDING, SetSpeed): _to(controls.set_speed_later, State.CONCLUDING),
    (State.CANCELED, Abort): _to(controls.nothing, State.CANCELED),
    **{(state, Abort): _refuse(controls.finished) for state in ENDED if state is not State.CANCELED},
    **{(state, asked): _refuse(controls.finished) for state in ENDED for asked in (Pivot, Pause, Resume, SetSpeed)},
    (State.LOST, Resolve): _to(controls.resolve, State.COMPLETED, State.FAILED, State.CANCELED),
    **{(state, Resolve): _refuse(controls.not_lost) for state in State if state is not State.LOST},
}

IGNORED: Final[Mapping[type[Input], str]] = {
    Launch: "the place was given before a restart, or the job was canceled while it waited",
    Accepted: "a look at query-jobs told of it first",
    Rejected: "QEMU refused a second start under the same id, as the first one had worked",
    Observed: "a job that waits is not in QEMU yet, and one that ended is only waiting to be dismissed",
    Absent: "a job that waits is not in QEMU yet, and one that ended has been dismissed",
    Gone: "the outcome was known before QEMU ended",
    Gathered: "the chain was read for a question that has been answered meanwhile",
    CleanedUp: "only a concluding job is tidied up after",
    PivotTaken: "the job concluded before QEMU's reply to job-complete was read",
    PivotDeclined: "the job concluded before QEMU's reply to job-complete was read",
}
"""Why an input that is in no row of `TRANSITIONS` for a state changes nothing there."""
