from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from app.core.errors import CANCELED, OUT_OF_SPACE, Code, Problem, Refused, qemu_problem
from app.core.evidence import Evidence, Proof, Verdict
from app.core.job import ACTIONS, Job, Progress, Resolution, Result
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
from app.core.machine.reports import FOREIGN_PAUSE, PIVOT_ATTEMPTS
from app.core.machine.table import IGNORED, TRANSITIONS, start_job, step
from app.core.sameness import Sameness
from app.core.states import ENDED, DataState, Intent, OnError, OnReady, PauseReason, State
from tests.core.samples import FILES, PROCESS, Story, active_job, intermediate_job, job_for, request, shows

EVENTS: tuple[type[Input], ...] = get_args(Input)
REQUESTS = (Pivot, Abort, Pause, Resume, SetSpeed, Resolve)
NO = Problem(code=Code.QEMU_ERROR, detail="no")
DONE = CleanedUp(Result(chain=("/images/base.qcow2",)))
SAMPLES: dict[type[Input], Input] = {
    Launch: Launch(),
    Accepted: Accepted(PROCESS),
    Rejected: Rejected(NO),
    Observed: Observed("running", Progress()),
    Absent: Absent(),
    Gone: Gone(),
    Gathered: shows(Proof.UNKNOWN),
    CleanedUp: DONE,
    PivotTaken: PivotTaken(),
    PivotDeclined: PivotDeclined(NO),
    Pivot: Pivot(),
    Abort: Abort(),
    Pause: Pause(),
    Resume: Resume(),
    SetSpeed: SetSpeed(5),
    Resolve: Resolve(State.COMPLETED, "ada"),
}


def seen(status: str, current: int = 50, end: int = 100, **more: object) -> Observed:
    """What QEMU says of a job in `status`."""
    return replace(Observed(status, Progress(current=current, end=end)), **more)  # pyright: ignore[reportArgumentType]


def at(state: State, job: Job | None = None) -> Job:
    """A job that stands in `state`, otherwise untouched."""
    return replace(job or active_job(), state=state)


def started(job: Job) -> Story:
    """The story of a job that runs."""
    story = Story(job)
    story.on(Launch(PROCESS))
    story.on(Accepted(PROCESS))
    assert story.job.state is State.RUNNING
    return story


def ending_of(job: Job) -> State | None:
    """The outcome that the tidying follows."""
    return job.control.judgement.state if job.control.judgement else None


def with_control(job: Job, **changes: object) -> Job:
    """The job with something else in what the service remembers of it."""
    return replace(job, control=replace(job.control, **changes))  # pyright: ignore[reportArgumentType]


def ended_by(job: Job) -> State | None:
    """How a job is judged whose QEMU ends now, with images that prove nothing."""
    gone = step(job, Gone(), 200).job
    return ending_of(step(gone, Gathered(Evidence(ended=True)), 201).job)


def ready(job: Job) -> Story:
    """The story of a job that is ready, or does what it is to do then."""
    story = started(job)
    story.on(seen("ready", 100, 100))
    return story


# The table -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("state", State)
def test_every_pair_is_in_the_table_or_ignored_with_a_reason(state: State, event: type[Input]) -> None:
    """What an event does in a state is decided for every pair; one that does nothing has its reason written down."""
    if (state, event) in TRANSITIONS:
        return
    assert IGNORED[event]
    job = at(state)
    following = step(job, SAMPLES[event], 200)
    assert (following.job, following.versions, following.commands) == (job, (), ())


def test_the_table_names_no_stranger() -> None:
    """Reasons stand for events that are left out somewhere, and requests are never ignored."""
    for event in IGNORED:
        assert any((state, event) not in TRANSITIONS for state in State), event
    for request_ in REQUESTS:
        assert request_ not in IGNORED
        assert all((state, request_) in TRANSITIONS for state in State)


ANSWERS: dict[State, dict[str, Code | None]] = {
    state: dict(
        zip(
            ("abort", "pivot", "pause", "resume", "speed", "resolve"),
            (*answers, None if state is State.LOST else Code.JOB_NOT_LOST),
            strict=True,
        )
    )
    for state, answers in {
        State.QUEUED: (None, Code.JOB_NOT_READY, Code.JOB_NOT_PAUSABLE, Code.JOB_NOT_PAUSED, None),
        State.STARTING: (None, Code.JOB_NOT_READY, Code.JOB_NOT_PAUSABLE, Code.JOB_NOT_PAUSED, None),
        State.RUNNING: (None, Code.JOB_NOT_READY, None, Code.JOB_NOT_PAUSED, None),
        State.PAUSED: (None, Code.JOB_NOT_READY, None, None, None),
        State.READY: (None, None, Code.JOB_NOT_PAUSABLE, Code.JOB_NOT_PAUSED, None),
        State.PIVOTING: (Code.JOB_PIVOTING, None, Code.JOB_NOT_PAUSABLE, Code.JOB_NOT_PAUSED, None),
        State.ABORTING: (None, Code.JOB_NOT_READY, Code.JOB_NOT_PAUSABLE, Code.JOB_NOT_PAUSED, None),
        State.CONCLUDING: (Code.JOB_FINISHED, Code.JOB_NOT_READY, Code.JOB_NOT_PAUSABLE, Code.JOB_NOT_PAUSED, None),
        State.COMPLETED: (Code.JOB_FINISHED,) * 5,
        State.FAILED: (Code.JOB_FINISHED,) * 5,
        State.LOST: (Code.JOB_FINISHED,) * 5,
        State.CANCELED: (None, *(Code.JOB_FINISHED,) * 4),
    }.items()
}
ASKED: dict[str, Input] = {
    "abort": Abort(),
    "pivot": Pivot(),
    "pause": Pause(),
    "resume": Resume(),
    "speed": SetSpeed(5),
    "resolve": Resolve(State.FAILED, "ada"),
}


def answer(job: Job, asked: str) -> Code | None:
    """The code with which a request is refused, or None where it is taken."""
    try:
        step(job, ASKED[asked], 200)
    except Refused as refused:
        problem = refused.problem
    else:
        return None
    assert job.id in problem.detail
    return problem.code


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("state", State)
def test_what_is_refused_in_which_state(state: State, asked: str) -> None:
    """Each request in each state is taken, or refused with the contract's code for it."""
    assert answer(at(state), asked) is ANSWERS[state][asked]


@pytest.mark.parametrize("state", [state for state in State if state not in ENDED])
def test_a_job_without_a_pivot_says_so_at_any_time(state: State) -> None:
    """An inner commit and a `keep` end by themselves: a pivot is not early, it is impossible."""
    expected = None if state is State.PIVOTING else Code.JOB_NOT_PIVOTABLE
    assert answer(at(state, intermediate_job()), "pivot") is expected
    assert answer(at(state, active_job(on_ready=OnReady.KEEP)), "pivot") is expected


@pytest.mark.parametrize(
    ("intent", "code"),
    [
        (Intent.RUN, Code.JOB_FINISHED),
        (Intent.KEEP, Code.JOB_FINISHED),
        (Intent.PIVOT, Code.JOB_PIVOTING),
        (Intent.ABORT, None),
        (Intent.FORCE, None),
    ],
)
def test_an_abort_that_comes_at_the_end(intent: Intent, code: Code | None) -> None:
    """While the outcome is read, an abort is too late, unless one is what is being carried out."""
    assert answer(with_control(at(State.CONCLUDING), intent=intent), "abort") is code


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("job", [intermediate_job(), active_job(), active_job(on_ready=OnReady.KEEP)])
def test_actions_are_taken(state: State, job: Job) -> None:
    """What a job says it takes, it takes; and a pivot, pause or resume that it takes and obeys is said."""
    names = {"set-speed": "speed"}
    job = at(state, job)
    for action in job.actions:
        assert answer(job, names.get(action, action)) is None
    for action in ("pivot", "pause", "resume", "abort"):
        if answer(job, action) is None and step(job, ASKED[action], 200).commands and state is not State.PAUSED:
            assert action in job.actions
    assert ACTIONS.keys() & ENDED == {State.LOST}


@pytest.mark.parametrize("state", [State.COMPLETED, State.FAILED, State.CANCELED, State.LOST])
@pytest.mark.parametrize("event", [event for event in EVENTS if event not in REQUESTS])
def test_an_ended_job_never_changes(state: State, event: type[Input]) -> None:
    """Whatever QEMU or the engine says later, an outcome is final."""
    job = at(state)
    assert step(job, SAMPLES[event], 200).job is job


@pytest.mark.parametrize(
    ("outcome", "data_state", "error"),
    [
        (State.COMPLETED, DataState.MERGED, None),
        (State.CANCELED, DataState.BASE_MODIFIED, None),
        (State.FAILED, DataState.BASE_MODIFIED, Code.OUTCOME_UNKNOWN),
    ],
)
def test_a_verdict_on_a_lost_job(outcome: State, data_state: DataState, error: Code | None) -> None:
    """What a person has found out becomes the outcome, with their name; the end stays when it was."""
    story = ready(active_job(on_ready=OnReady.PIVOT))
    story.on(Gone())
    story.on(shows(Proof.UNKNOWN))
    story.on(DONE)
    assert (story.job.state, story.job.actions) == (State.LOST, ("resolve",))
    finished_at = story.job.finished_at
    assert story.on(Resolve(outcome, "ada")) == ()
    job = story.job
    assert (job.state, job.data_state, job.error and job.error.code) == (outcome, data_state, error)
    assert (job.resolved, job.finished_at) == (Resolution(by="ada", at=story.now), finished_at)
    assert story.told[-2:] == ["lost", outcome.value]
    assert answer(job, "resolve") is Code.JOB_NOT_LOST


# Stories -------------------------------------------------------------------------------------------------------------


def test_an_inner_commit_from_queue_to_end() -> None:
    """queued, started, completed; QEMU is asked to start it once it has its place, and its nodes go after the proof."""
    story = Story(intermediate_job("delete"))
    assert (story.told, story.job.state, story.last) == (["queued"], State.QUEUED, ())
    assert story.on(Launch(PROCESS)) == ("start",)
    assert (story.job.state, story.job.control.process) == (State.STARTING, PROCESS)
    assert story.on(Accepted(PROCESS)) == ()
    assert story.job.data_state is DataState.BASE_MODIFIED
    assert story.on(seen("running", 10, 40)) == ()
    assert story.job.percent == 25.0
    for status in ("waiting", "aborting", "created"):
        assert story.on(seen(status, 40, 40)) == ()
    # The header is changed once what was merged is on the disk.
    assert story.on(seen("pending", 40, 40)) == ("finalize",)
    assert story.job.percent == 99.9
    assert story.on(seen("concluded", 40, 40)) == ("gather",)
    assert (story.job.state, story.job.control.verdict, story.job.percent) == (State.CONCLUDING, Verdict.FINE, 99.9)
    assert story.on(shows(Proof.MERGED)) == ("clean-up",)
    assert (story.job.state, ending_of(story.job)) == (State.CONCLUDING, State.COMPLETED)
    result = Result(chain=("/images/s3.qcow2", "/images/base.qcow2"), invalidated=FILES[1:3], deleted=FILES[1:3])
    assert story.on(CleanedUp(result)) == ()
    assert story.told == ["queued", "started", "completed"]
    job = story.job
    assert (job.state, job.result, job.error, job.data_state) == (State.COMPLETED, result, None, DataState.MERGED)
    assert (job.percent, job.actions) == (100.0, ())
    assert (job.created_at, job.started_at, job.ready_at, job.finished_at) == (100, 102, None, 110)
    assert story.versions == list(range(1, 7))


def test_an_active_commit_waits_and_is_pivoted() -> None:
    """queued, started, ready, pivoting, completed; nothing is asked of QEMU between ready and the pivot's request."""
    story = started(active_job())
    assert story.on(seen("running", 100, 100)) == ()
    assert story.job.percent == 99.9
    assert story.on(seen("ready", 90, 100)) == ()
    assert (story.job.state, story.job.percent, story.job.ready_at) == (State.READY, 100.0, 104)
    assert story.job.actions == ("pivot", "abort", "set-speed")
    assert story.on(seen("standby")) == ()
    assert story.on(seen("ready")) == ()
    assert story.on(Pivot()) == ("pivot",)
    assert (story.job.state, story.job.control.intent) == (State.PIVOTING, Intent.PIVOT)
    assert story.on(PivotTaken()) == ()
    assert story.on(seen("ready")) == ()
    assert story.on(Pivot()) == ()
    assert story.on(seen("concluded")) == ("gather",)
    story.on(shows(Proof.MERGED))
    story.on(DONE)
    assert story.told == ["queued", "started", "ready", "pivoting", "completed"]
    assert story.job.data_state is DataState.MERGED


def test_on_ready_pivot_needs_no_request() -> None:
    """The job pivots in the same step in which it becomes ready; both are told, in this order."""
    story = started(active_job(on_ready=OnReady.PIVOT))
    assert story.on(seen("ready")) == ("pivot",)
    assert story.told == ["queued", "started", "ready", "pivoting"]
    assert (story.job.ready_at, story.job.state) == (103, State.PIVOTING)


def test_keep_ends_the_job_at_ready_and_completes() -> None:
    """`keep` cancels gently at ready; concluded without error and unchanged is then what was asked for."""
    story = started(active_job(on_ready=OnReady.KEEP))
    assert story.on(seen("ready")) == ("abort",)
    assert (story.job.state, story.job.control.intent) == (State.READY, Intent.KEEP)
    assert story.job.actions == ("abort", "set-speed")
    story.on(seen("concluded"))
    story.on(shows(Proof.UNCHANGED))
    story.on(DONE)
    assert story.told == ["queued", "started", "ready", "completed"]


def test_a_keep_is_not_pivoted_by_a_request() -> None:
    """A pivot sent to a job that is ending by `keep` would turn its success into a cancellation."""
    story = ready(active_job(on_ready=OnReady.KEEP))
    assert answer(story.job, "pivot") is Code.JOB_NOT_PIVOTABLE


def test_a_keep_can_be_aborted() -> None:
    """An abort at ready of a `keep` takes its place: what was not asked for any more is not a success."""
    story = ready(active_job(on_ready=OnReady.KEEP))
    assert story.on(Abort()) == ("abort",)
    story.on(seen("concluded"))
    story.on(shows(Proof.UNCHANGED))
    story.on(DONE)
    assert story.job.state is State.CANCELED


def test_a_queued_job_is_aborted_at_once() -> None:
    """Nothing has happened, so nothing is waited for."""
    story = Story(active_job())
    assert story.on(Abort()) == ()
    assert (story.job.state, story.job.error, story.job.data_state) == (State.CANCELED, None, DataState.UNTOUCHED)
    assert (story.told, story.job.finished_at) == (["queued", "canceled"], 101)


@pytest.mark.parametrize("force", [False, True])
def test_an_abort_while_the_start_is_on_its_way(*, force: bool) -> None:
    """Whether there is something to cancel is known with QEMU's answer; the abort is obeyed then."""
    story = Story(active_job())
    story.on(Launch(PROCESS))
    assert story.on(Abort(force=force)) == ()
    assert story.job.state is State.STARTING
    assert story.on(Accepted(PROCESS)) == ("abort-force" if force else "abort",)
    assert story.told == ["queued", "started", "aborting"]


def test_an_aborted_start_is_not_tried_again() -> None:
    """A job that was to be aborted and that QEMU never got is canceled, not started after all."""
    story = Story(active_job())
    story.on(Launch(PROCESS))
    story.on(Abort())
    assert story.on(Absent()) == ("gather",)
    assert story.on(shows(Proof.UNCHANGED)) == ()
    assert (story.job.state, story.job.data_state) == (State.CANCELED, DataState.UNTOUCHED)
    assert story.told == ["queued", "canceled"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("job", [intermediate_job(), active_job()])
def test_an_abort_while_it_runs(job: Job, *, force: bool) -> None:
    """The job is canceled; QEMU's word for that is an error that is none."""
    story = started(job)
    cancel = ("abort-force" if force else "abort",)
    assert story.on(Abort(force=force)) == cancel
    assert (story.job.state, story.job.actions) == (State.ABORTING, ())
    for status in ("aborting", "waiting"):
        assert story.on(seen(status)) == ()
    # Only a merge below the active layer waits there, and would for ever.
    assert story.on(seen("pending")) == (cancel if not job.capabilities.pivots else ())
    assert story.on(seen("concluded", error=CANCELED)) == ("gather",)
    assert story.on(Abort()) == ()
    assert story.on(shows(Proof.UNCHANGED)) == ("clean-up",)
    story.on(DONE)
    assert story.told == ["queued", "started", "aborting", "canceled"]
    assert (story.job.error, story.job.data_state) == (None, DataState.BASE_MODIFIED)
    assert story.on(Abort()) == ()


def test_an_abort_at_ready_leaves_a_consistent_copy() -> None:
    """At ready the gentle cancel ends without error and without pivot: canceled, the overlay stays active."""
    story = ready(active_job())
    assert story.on(Abort()) == ("abort",)
    story.on(seen("concluded"))
    story.on(shows(Proof.UNCHANGED))
    story.on(DONE)
    assert story.told == ["queued", "started", "ready", "aborting", "canceled"]


def test_an_abort_grows_impatient() -> None:
    """Force after a gentle abort is passed on once; gentle after force changes nothing."""
    story = ready(active_job())
    story.on(Abort())
    assert story.on(Abort()) == ()
    assert story.on(Abort(force=True)) == ("abort-force",)
    assert story.on(Abort(force=True)) == ()
    assert story.on(Abort()) == ()
    assert story.on(seen("ready")) == ("abort-force",)


def test_an_abort_of_a_paused_job_is_by_force() -> None:
    """QEMU refuses a gentle cancel of a job that somebody paused."""
    story = started(active_job())
    story.on(Pause())
    story.on(seen("paused"))
    assert story.on(Abort()) == ("abort-force",)
    assert story.job.pause_reason is None
    assert story.on(seen("paused")) == ("abort-force",)


def test_an_abort_that_comes_too_late() -> None:
    """What the chain proves counts: a merge that was done when the cancel came is a completed one."""
    story = started(intermediate_job())
    story.on(Abort())
    story.on(seen("concluded"))
    story.on(shows(Proof.MERGED))
    story.on(DONE)
    assert story.job.state is State.COMPLETED


def test_a_user_pauses_and_resumes() -> None:
    """Paused and resumed are told when QEMU shows them, not when they are asked for; twice asked is once done."""
    story = started(intermediate_job())
    assert story.on(Pause()) == ("pause",)
    assert story.job.state is State.RUNNING
    assert story.on(seen("paused")) == ("pause",)
    assert (story.job.state, story.job.pause_reason) == (State.PAUSED, PauseReason.USER)
    assert story.job.actions == ("resume", "abort", "set-speed")
    assert story.on(seen("paused")) == ()
    assert story.on(Pause()) == ()
    assert story.on(Resume()) == ("resume",)
    assert story.job.state is State.PAUSED
    assert story.on(seen("running")) == ("resume",)
    assert (story.job.state, story.job.pause_reason) == (State.RUNNING, None)
    assert story.told == ["queued", "started", "paused", "resumed"]


def test_a_pause_is_taken_back_before_it_is_seen() -> None:
    """Resume right after pause is no error; the job may not stay paused after all."""
    story = started(intermediate_job())
    story.on(Pause())
    assert story.on(Resume()) == ("resume",)
    assert story.on(seen("paused")) == ("resume",)
    assert story.told == ["queued", "started"]


def test_a_resume_is_taken_back_before_it_is_seen() -> None:
    """Pause right after resume pauses again, even if QEMU is seen running in between."""
    story = started(intermediate_job())
    story.on(Pause())
    story.on(seen("paused"))
    story.on(Resume())
    assert story.on(Pause()) == ("pause",)
    assert story.on(seen("running")) == ("pause",)
    assert (story.job.state, story.job.control.pause_wanted) == (State.RUNNING, True)
    assert story.on(seen("running")) == ("pause",)
    story.on(seen("paused"))
    assert story.told == ["queued", "started", "paused", "resumed", "paused"]


def test_a_resume_that_qemu_has_not_obeyed_is_sent_again() -> None:
    """As long as QEMU shows the pause that was to end, it is asked again."""
    story = started(intermediate_job())
    story.on(Pause())
    story.on(seen("paused"))
    story.on(Resume())
    assert [story.on(seen("paused", paused_for=9.0)) for _ in range(3)] == [("resume",)] * 3
    assert story.job.state is State.PAUSED


def test_qemus_own_short_pauses_are_not_told() -> None:
    """Internal drains show as paused or standby for moments; nobody paused anything."""
    story = started(active_job())
    assert story.on(seen("paused")) == ()
    assert story.on(seen("paused", paused_for=FOREIGN_PAUSE - 0.1)) == ()
    assert story.on(seen("running")) == ()
    assert (story.job.state, story.told) == (State.RUNNING, ["queued", "started"])


def test_another_client_pauses() -> None:
    """A pause that lasts was made by somebody; it can be resumed here, or is resumed there."""
    story = started(active_job())
    story.on(seen("paused", paused_for=FOREIGN_PAUSE))
    assert (story.job.state, story.job.pause_reason) == (State.PAUSED, PauseReason.USER)
    story.on(seen("running"))
    story.on(seen("paused", paused_for=FOREIGN_PAUSE))
    assert story.on(Resume()) == ("resume",)
    story.on(seen("running"))
    assert story.told == ["queued", "started", "paused", "resumed", "paused", "resumed"]


@pytest.mark.parametrize(("io_status", "reason"), [("nospace", PauseReason.NO_SPACE), ("failed", PauseReason.IO_ERROR)])
def test_an_io_error_pauses_and_is_resumed(io_status: str, reason: PauseReason) -> None:
    """The reason is told once; while the cause lasts the job falls back, and with it gone the job goes on."""
    story = started(active_job(on_error=OnError.STOP))
    assert story.on(seen("paused", io_status=io_status)) == ()
    assert (story.job.state, story.job.pause_reason) == (State.PAUSED, reason)
    assert story.on(seen("paused", io_status=io_status)) == ()
    assert story.on(Resume()) == ("resume",)
    story.on(seen("running"))
    story.on(seen("paused", io_status=io_status))
    story.on(Resume())
    story.on(seen("running"))
    story.on(seen("ready"))
    assert story.told == ["queued", "started", "paused", "resumed", "paused", "resumed", "ready"]


def test_each_fall_back_is_told() -> None:
    """A resumed job that falls back before anybody has seen it run has paused anew: who resumed it has to know."""
    story = started(active_job(on_error=OnError.ENOSPC))
    full = seen("paused", io_status="nospace")
    story.on(full)
    story.on(Resume())
    story.on(full)
    assert story.on(full) == ()
    assert story.told == ["queued", "started", "paused", "paused"]


def test_a_user_pause_runs_out_of_space() -> None:
    """The reason follows QEMU: a resumed job that runs out of space is not resumed for ever, it says why it stands."""
    story = started(active_job(on_error=OnError.ENOSPC))
    story.on(Pause())
    story.on(seen("paused"))
    story.on(Resume())
    story.on(seen("paused", io_status="nospace"))
    assert (story.job.pause_reason, story.job.state) == (PauseReason.NO_SPACE, State.PAUSED)
    assert story.on(seen("paused", io_status="nospace")) == ()
    assert story.told == ["queued", "started", "paused", "paused"]


def test_a_pause_on_top_of_an_io_error_is_kept() -> None:
    """Somebody who pauses a job that stands for lack of space wants it to stand when there is space again."""
    story = started(active_job(on_error=OnError.ENOSPC))
    story.on(seen("paused", io_status="nospace"))
    assert story.on(Pause()) == ("pause",)
    assert story.on(seen("paused", io_status="nospace")) == ("pause",)
    assert story.on(Pause()) == ()
    story.on(seen("paused"))
    assert story.job.pause_reason is PauseReason.USER


def test_a_ready_job_runs_out_of_space() -> None:
    """The guest's writes may not fit into the base any more: paused, and ready again after a resume."""
    story = ready(active_job(on_error=OnError.ENOSPC))
    assert story.on(seen("standby", io_status="nospace")) == ()
    assert (story.job.state, story.job.pause_reason, story.job.percent) == (State.PAUSED, PauseReason.NO_SPACE, 100.0)
    assert story.on(seen("standby", io_status="nospace")) == ()
    assert story.on(Resume()) == ("resume",)
    assert story.on(seen("ready")) == ("resume",)
    assert (story.job.state, story.job.pause_reason, story.job.ready_at) == (State.READY, None, 103)
    assert story.told == ["queued", "started", "ready", "paused", "ready"]


def test_a_job_that_becomes_ready_while_it_is_to_pause_is_resumed() -> None:
    """Nothing is left to pause, and a ready job that QEMU holds paused could not pivot."""
    story = started(active_job(on_ready=OnReady.PIVOT))
    story.on(Pause())
    assert story.on(seen("standby")) == ("resume", "pivot")
    assert (story.job.control.pause_wanted, story.job.state) == (False, State.PIVOTING)


def test_a_ready_job_that_somebody_paused_is_woken_to_end() -> None:
    """In standby a pivot would wait for ever and a gentle cancel is refused, so a resume goes first."""
    story = ready(active_job())
    story.on(Pivot())
    assert story.on(seen("standby")) == ("resume", "pivot")
    story.on(PivotTaken())
    assert story.on(seen("standby")) == ("resume",)
    story = ready(active_job())
    story.on(Abort())
    assert story.on(seen("standby")) == ("resume", "abort")
    story = ready(active_job(on_ready=OnReady.KEEP))
    assert story.on(seen("standby")) == ("resume", "abort")


@pytest.mark.parametrize("on_ready", [OnReady.KEEP, OnReady.PIVOT])
def test_a_job_on_its_way_out_runs_out_of_space(on_ready: OnReady) -> None:
    """It says why it stands, each time, and goes on to the end that was asked for once it is resumed."""
    ending = {OnReady.KEEP: "abort", OnReady.PIVOT: "pivot"}[on_ready]
    story = ready(active_job(on_ready=on_ready, on_error=OnError.ENOSPC))
    full = seen("standby", io_status="nospace")
    story.on(full)
    assert (story.job.state, story.job.pause_reason) == (State.PAUSED, PauseReason.NO_SPACE)
    assert story.on(full) == ()
    assert story.on(Resume())[0] == "resume"
    # The resume is sent again, as it might not have arrived.
    assert story.on(full)[0] == "resume"
    story.on(full)
    assert (story.job.state, story.job.pause_reason) == (State.PAUSED, PauseReason.NO_SPACE)
    assert story.on(Resume())[0] == "resume"
    assert ending in story.on(seen("ready"))
    again = ["pivoting", "paused"] if on_ready is OnReady.PIVOT else ["paused"]
    going = ["pivoting"] if on_ready is OnReady.PIVOT else ["ready"]
    assert story.told[3:] == [*(["pivoting"] if on_ready is OnReady.PIVOT else []), "paused", *again, *going]


def test_a_pivot_that_stands_is_resumed_by_another_client() -> None:
    """The pivot goes on with the job, and an abort comes too late again."""
    story = ready(active_job(on_ready=OnReady.PIVOT, on_error=OnError.ENOSPC))
    story.on(seen("standby", io_status="nospace"))
    assert story.on(seen("ready")) == ("pivot",)
    assert story.told[-2:] == ["paused", "pivoting"]
    with pytest.raises(Refused):
        story.on(Abort())


def test_a_pivot_that_stands_is_aborted() -> None:
    """It can be given up; but if QEMU ends before it has said so, nothing proves that it had not pivoted."""
    story = ready(active_job(on_ready=OnReady.PIVOT, on_error=OnError.ENOSPC))
    story.on(seen("standby", io_status="nospace"))
    assert story.on(Abort()) == ("abort-force",)
    assert ended_by(story.job) is State.LOST


def test_an_abort_does_not_wait_for_space() -> None:
    """Where the base takes no more data there is no consistent copy to wait for."""
    story = ready(active_job(on_error=OnError.ENOSPC))
    assert story.on(Abort()) == ("abort",)
    assert story.on(seen("standby", io_status="nospace")) == ("abort-force",)


def test_a_pivot_that_qemu_declines_is_tried_again_and_given_back_in_the_end() -> None:
    """A mirror may flip out of ready under writes: the pivot is asked for at each look, but not for ever."""
    story = ready(active_job(on_ready=OnReady.PIVOT))
    for _ in range(PIVOT_ATTEMPTS - 1):
        assert story.on(PivotDeclined(NO)) == ()
        assert story.job.state is State.PIVOTING
        assert story.on(seen("ready")) == ("pivot",)
    story.on(PivotDeclined(NO))
    assert (story.job.state, story.job.error, story.job.control.intent) == (State.READY, NO, Intent.RUN)
    assert story.on(seen("ready")) == ()
    assert "abort" in story.job.actions
    story.on(Pivot())
    assert story.job.control.pivot_attempts == 0
    story.on(seen("concluded"))
    story.on(shows(Proof.MERGED))
    story.on(DONE)
    assert story.told == ["queued", "started", "ready", "pivoting", "ready", "pivoting", "completed"]
    assert story.job.error is None


def test_qemu_refuses_the_start() -> None:
    """The job failed before it did anything, for the reason that QEMU gave."""
    story = Story(active_job())
    story.on(Launch(PROCESS))
    problem = qemu_problem("GenericError", 'Failed to get "write" lock', doing="block-commit")
    assert story.on(Rejected(problem)) == ()
    job = story.job
    assert (job.state, job.error, job.data_state) == (State.FAILED, problem, DataState.UNTOUCHED)
    assert (story.told, job.started_at, job.finished_at) == (["queued", "failed"], None, 102)


@pytest.mark.parametrize("desc", ["Job ID 'bj-1' already in use", "Need a root block node"])
@pytest.mark.parametrize("got_through", [True, False])
def test_a_second_start_is_refused(desc: str, *, got_through: bool) -> None:
    """After a start whose reply was lost, a refused one is believed only once QEMU does not list the job."""
    story = Story(active_job())
    story.on(Launch(PROCESS))
    story.on(Absent())
    assert story.on(shows(Proof.UNCHANGED)) == ("start",)
    refusal = qemu_problem("GenericError", desc, doing="block-commit")
    assert story.on(Rejected(refusal)) == ()
    assert (story.job.state, story.job.error) == (State.STARTING, None)
    if got_through:
        story.on(seen("running"))
        assert (story.job.state, story.job.error) == (State.RUNNING, None)
    else:
        assert story.on(Absent()) == ("gather",)
        assert story.on(shows(Proof.UNCHANGED)) == ()
        assert (story.job.state, story.job.error) == (State.FAILED, refusal)
        assert story.told == ["queued", "failed"]


def test_a_queued_job_that_can_not_be_started() -> None:
    """A job whose disk has changed or whose QEMU has ended while it waited fails untouched."""
    story = Story(active_job())
    story.on(Rejected(NO))
    assert (story.job.state, story.job.error) == (State.FAILED, NO)
    story = Story(active_job())
    story.on(Gone())
    assert story.job.error is not None
    assert (story.job.error.code, story.job.data_state) == (Code.DOMAIN_GONE, DataState.UNTOUCHED)


@pytest.mark.parametrize(
    ("text", "state", "code"),
    [
        (CANCELED, State.CANCELED, None),
        (OUT_OF_SPACE, State.FAILED, Code.INSUFFICIENT_STORAGE),
        ("Input/output error", State.FAILED, Code.QEMU_ERROR),
    ],
)
@pytest.mark.parametrize("proof", Proof)
def test_an_error_is_an_error_whatever_the_chain_shows(
    text: str, state: State, code: Code | None, proof: Proof
) -> None:
    """A job that QEMU concluded with an error is never completed: a failed header leaves a graph that looks merged.

    Only QEMU's word for a cancellation makes it a canceled one.
    """
    story = started(intermediate_job())
    story.on(seen("concluded", error=text))
    story.on(shows(proof))
    assert story.last == ("clean-up",)
    story.on(DONE)
    assert story.job.state is state
    assert (story.job.error.code if story.job.error else None) is code
    assert story.job.error is None or story.job.error.extra == {"qmp": {"class": "GenericError", "desc": text}}
    assert story.told[-1] == state.value


def outcome(job: Job, verdict: Verdict, proof: Proof, intent: Intent) -> tuple[State | None, Code | None]:
    """How a job ends after QEMU's last word, given what the chain shows."""
    concluding = with_control(replace(job, state=State.CONCLUDING), verdict=verdict, intent=intent)
    judged = step(concluding, shows(proof), 200)
    assert [told.type for told in judged.versions] == [None]
    assert [str(command) for command in judged.commands] == ["clean-up"]
    return ending_of(judged.job), judged.job.error.code if judged.job.error else None


@pytest.mark.parametrize("intent", Intent)
@pytest.mark.parametrize("verdict", [Verdict.FINE, Verdict.VANISHED, Verdict.GONE])
def test_a_header_that_leads_to_the_base_proves_the_merge(verdict: Verdict, intent: Intent) -> None:
    """Below the active layer the header has the last word; where nothing shows it, nobody knows."""
    assert outcome(intermediate_job(), verdict, Proof.MERGED, intent) == (State.COMPLETED, None)
    assert outcome(intermediate_job(), verdict, Proof.UNKNOWN, intent) == (State.LOST, Code.OUTCOME_UNKNOWN)


@pytest.mark.parametrize("intent", [Intent.RUN, Intent.ABORT, Intent.FORCE])
def test_a_pivot_that_nobody_here_wanted(intent: Intent) -> None:
    """Of a job that was to keep the overlay it is no completion, whatever was asked for since."""
    keeping = active_job(on_ready=OnReady.KEEP)
    assert outcome(keeping, Verdict.FINE, Proof.MERGED, intent) == (State.LOST, Code.OUTCOME_UNKNOWN)


@pytest.mark.parametrize("intent", Intent)
@pytest.mark.parametrize("verdict", [Verdict.FINE, Verdict.VANISHED, Verdict.GONE])
def test_a_chain_that_looks_like_a_pivot_proves_none(verdict: Verdict, intent: Intent) -> None:
    """Of the active layer only QEMU's own verdict makes it one; `keep` asked for no pivot."""
    proven = verdict is Verdict.FINE and intent is not Intent.KEEP
    expected = (State.COMPLETED, None) if proven else (State.LOST, Code.OUTCOME_UNKNOWN)
    assert outcome(active_job(), verdict, Proof.MERGED, intent) == expected
    assert outcome(active_job(), verdict, Proof.UNKNOWN, intent) == (State.LOST, Code.OUTCOME_UNKNOWN)


@pytest.mark.parametrize(
    ("job", "verdict", "intent", "ending"),
    [
        (active_job(), Verdict.FINE, Intent.RUN, (State.CANCELED, None)),
        (active_job(), Verdict.FINE, Intent.ABORT, (State.CANCELED, None)),
        (active_job(), Verdict.FINE, Intent.PIVOT, (State.CANCELED, None)),
        (active_job(), Verdict.FINE, Intent.KEEP, (State.COMPLETED, None)),
        (intermediate_job(), Verdict.FINE, Intent.RUN, (State.FAILED, Code.NOT_MERGED)),
        (active_job(), Verdict.VANISHED, Intent.RUN, (State.FAILED, Code.JOB_VANISHED)),
        (active_job(), Verdict.VANISHED, Intent.PIVOT, (State.FAILED, Code.JOB_VANISHED)),
        (active_job(), Verdict.VANISHED, Intent.ABORT, (State.CANCELED, None)),
        (active_job(), Verdict.VANISHED, Intent.FORCE, (State.CANCELED, None)),
        (active_job(), Verdict.VANISHED, Intent.KEEP, (State.LOST, Code.OUTCOME_UNKNOWN)),
        (intermediate_job(), Verdict.GONE, Intent.RUN, (State.FAILED, Code.DOMAIN_GONE)),
        (intermediate_job(), Verdict.VANISHED, Intent.RUN, (State.FAILED, Code.JOB_VANISHED)),
        (intermediate_job(), Verdict.VANISHED, Intent.ABORT, (State.CANCELED, None)),
        (active_job(), Verdict.GONE, Intent.ABORT, (State.LOST, Code.OUTCOME_UNKNOWN)),
        (active_job(), Verdict.GONE, Intent.KEEP, (State.LOST, Code.OUTCOME_UNKNOWN)),
    ],
)
def test_what_an_unchanged_chain_means(
    job: Job, verdict: Verdict, intent: Intent, ending: tuple[State, Code | None]
) -> None:
    """With the chain as before, QEMU's last word and what was asked for decide together."""
    assert outcome(job, verdict, Proof.UNCHANGED, intent) == ending


def test_another_client_cancels_gently() -> None:
    """Concluded without error and without pivot looks like success; the chain shows that it is a cancellation."""
    story = ready(active_job())
    story.on(seen("concluded"))
    story.on(shows(Proof.UNCHANGED))
    story.on(DONE)
    assert story.told == ["queued", "started", "ready", "canceled"]
    assert story.job.data_state is DataState.BASE_MODIFIED


def test_a_job_vanishes() -> None:
    """Taken away by another client: the chain is read, and tells that nothing was merged."""
    story = started(intermediate_job())
    assert story.on(Absent()) == ("gather",)
    assert (story.job.state, story.job.control.verdict) == (State.CONCLUDING, Verdict.VANISHED)
    story.on(shows(Proof.UNCHANGED))
    story.on(DONE)
    assert story.told == ["queued", "started", "failed"]


@pytest.mark.parametrize("state", [State.RUNNING, State.PAUSED, State.READY, State.PIVOTING, State.ABORTING])
def test_qemu_ends_in_the_middle(state: State) -> None:
    """The images are read; the base must be taken as modified."""
    following = step(at(state), Gone(), 200)
    job = following.job
    assert (job.state, job.control.verdict, job.data_state) == (State.CONCLUDING, Verdict.GONE, DataState.BASE_MODIFIED)
    assert [str(command) for command in following.commands] == ["gather"]
    assert step(job, Gone(), 201).commands == following.commands


@pytest.mark.parametrize("end", [seen("concluded", error=CANCELED), Absent(), Gone()])
def test_a_paused_job_that_ends_is_not_paused_any_more(end: Input) -> None:
    """The reason of a pause goes with the pause, before the outcome is known."""
    story = started(active_job(on_error=OnError.STOP))
    story.on(seen("paused", io_status="failed"))
    story.on(end)
    assert (story.job.state, story.job.pause_reason) == (State.CONCLUDING, None)


def test_qemu_ends_while_the_start_is_on_its_way() -> None:
    """It may have begun to write, so the images decide here too."""
    story = Story(intermediate_job())
    story.on(Launch(PROCESS))
    assert story.on(Gone()) == ("gather",)
    story.on(shows(Proof.UNCHANGED))
    story.on(DONE)
    assert story.told == ["queued", "failed"]
    assert story.job.data_state is DataState.BASE_MODIFIED


def test_qemu_ends_before_its_last_word_is_checked() -> None:
    """What QEMU said before it ended counts, whatever the images show of it."""
    story = started(intermediate_job())
    story.on(seen("concluded", error=OUT_OF_SPACE))
    assert story.on(Gone()) == ("gather",)
    assert story.job.control.verdict is Verdict.ERROR
    story.on(shows(Proof.UNKNOWN))
    assert ending_of(story.job) is State.FAILED
    assert story.on(Gone()) == ("clean-up",)


def test_an_outcome_is_judged_once() -> None:
    """A chain that is read again after its tidying has begun proves nothing any more."""
    story = started(intermediate_job())
    story.on(seen("concluded"))
    story.on(shows(Proof.MERGED))
    assert story.on(shows(Proof.UNKNOWN)) == ()
    assert ending_of(story.job) is State.COMPLETED


@pytest.mark.parametrize("flushed", [True, False])
def test_whether_the_merge_is_on_the_disk_is_kept_with_the_judgement(*, flushed: bool) -> None:
    """A restart in the middle of the tidying has to know whether the merged images hold the only lasting copy."""
    story = started(intermediate_job("delete"))
    story.on(seen("concluded"))
    assert story.on(shows(Proof.MERGED, flushed=flushed)) == ("clean-up",)
    story.crash()
    assert story.job.control.judgement is not None
    assert story.job.control.judgement.durable is flushed


# Lost replies and crashes --------------------------------------------------------------------------------------------


def test_the_reply_to_the_start_is_lost_and_the_job_is_seen() -> None:
    """QEMU lists it, so it took it: started, by the process that lists it, and what is seen counts at once."""
    story = Story(active_job(on_ready=OnReady.PIVOT))
    story.on(Launch())
    assert story.on(seen("ready", process=PROCESS)) == ("pivot",)
    assert story.told == ["queued", "started", "ready", "pivoting"]
    assert (story.job.control.process, story.job.data_state) == (PROCESS, DataState.BASE_MODIFIED)


def test_the_reply_is_lost_and_the_job_has_concluded() -> None:
    """A tiny job may be over before it is seen at all."""
    story = Story(intermediate_job())
    story.on(Launch(PROCESS))
    assert story.on(seen("concluded")) == ("gather",)
    assert story.told == ["queued", "started"]
    assert story.job.control.process == PROCESS


def test_the_reply_is_lost_and_the_job_is_to_be_aborted() -> None:
    """An abort that came meanwhile is carried out as soon as the job is seen."""
    story = Story(active_job())
    story.on(Launch(PROCESS))
    story.on(Abort())
    assert story.on(seen("running")) == ("abort",)
    assert story.job.state is State.ABORTING


def test_the_speed_changes_while_the_start_is_on_its_way() -> None:
    """Which speed the start carried is not known, so the next look sets the last one wished for."""
    for reply in (Accepted(PROCESS), seen("running")):
        story = Story(active_job())
        story.on(Launch(PROCESS))
        assert story.on(SetSpeed(7)) == ()
        asked = [*story.on(reply), *story.on(seen("running"))]
        assert asked == ["set-speed"]
        assert story.job.bandwidth == 7


def test_the_speed_changes_before_the_start_and_at_the_end() -> None:
    """In the queue it is a wish that the start carries out; at the end it is only noted."""
    story = Story(active_job())
    assert story.on(SetSpeed(7)) == ()
    story.on(Launch(PROCESS))
    story.on(Accepted(PROCESS))
    assert story.on(seen("concluded")) == ("gather",)
    assert story.on(SetSpeed(8)) == ()
    assert (story.job.bandwidth, story.job.state) == (8, State.CONCLUDING)


@pytest.mark.parametrize("state", [State.RUNNING, State.PAUSED, State.READY, State.PIVOTING, State.ABORTING])
def test_the_speed_changes_while_qemu_has_the_job(state: State) -> None:
    """The wish is stored and sent; nobody is told of it."""
    following = step(at(state), SetSpeed(9), 200)
    assert following.job.bandwidth == 9
    assert [str(command) for command in following.commands] == ["set-speed"]
    assert [told.type for told in following.versions] == [None]


def test_the_start_is_lost_and_nothing_has_happened() -> None:
    """QEMU does not list the job and the chain is as before: it is started again."""
    story = Story(active_job())
    story.on(Launch(PROCESS))
    story.crash()
    assert story.on(Absent()) == ("gather",)
    assert story.on(shows(Proof.UNCHANGED)) == ("start",)
    assert story.job.state is State.STARTING


def test_the_start_is_lost_and_the_chain_is_merged() -> None:
    """It ran, and somebody dismissed it: the chain is proof enough."""
    story = Story(intermediate_job())
    story.on(Launch(PROCESS))
    story.on(Absent())
    assert story.on(shows(Proof.MERGED)) == ("clean-up",)
    assert (story.job.control.process, ending_of(story.job)) == (PROCESS, State.COMPLETED)
    story.on(DONE)
    assert story.told == ["queued", "started", "completed"]
    assert story.versions == sorted(set(story.versions))


@pytest.mark.parametrize("process", [Sameness.OTHER, Sameness.UNKNOWN])
def test_the_start_is_lost_and_the_chain_of_another_qemu_is_another(process: Sameness) -> None:
    """It says nothing of whether the command got through to the QEMU before: another client may have completed it."""
    story = Story(intermediate_job())
    story.on(Launch(PROCESS))
    story.on(Absent())
    found = shows(Proof.UNKNOWN)
    assert story.on(replace(found, evidence=replace(found.evidence, process=process))) == ("clean-up",)
    assert ending_of(story.job) is State.LOST


def test_the_start_is_lost_and_the_chain_is_another() -> None:
    """A job is not started on a chain that it was not accepted for."""
    story = Story(intermediate_job())
    story.on(Launch(PROCESS))
    story.on(Absent())
    story.on(shows(Proof.UNKNOWN))
    assert story.job.error is not None
    assert (story.job.state, story.job.error.code) == (State.FAILED, Code.CHAIN_CHANGED)


@pytest.mark.parametrize(
    ("before", "wish", "after", "command"),
    [
        ((), Pause(), seen("running"), "pause"),
        ((), Pause(), seen("paused"), "pause"),
        ((), Abort(), seen("running"), "abort"),
        ((), Abort(force=True), seen("running"), "abort-force"),
        ((), SetSpeed(5), seen("running"), "set-speed"),
        ((Pause(), seen("paused")), Resume(), seen("paused"), "resume"),
        ((seen("paused", io_status="nospace"),), Resume(), seen("paused", io_status="nospace"), "resume"),
        ((Pause(),), Resume(), seen("paused"), "resume"),
        ((seen("ready"),), Pivot(), seen("ready"), "pivot"),
        ((seen("ready"),), Abort(), seen("ready"), "abort"),
        ((seen("ready"),), SetSpeed(5), seen("ready"), "set-speed"),
        ((Pause(),), seen("standby"), seen("standby"), "resume"),
        ((), seen("concluded"), seen("concluded"), "gather"),
        ((), seen("concluded"), Absent(), "gather"),
        ((), Gone(), Gone(), "gather"),
        ((seen("concluded"),), shows(Proof.MERGED), seen("concluded"), "clean-up"),
        ((seen("concluded"),), shows(Proof.MERGED), Absent(), "clean-up"),
        ((seen("concluded"),), shows(Proof.MERGED), Gone(), "clean-up"),
    ],
)
def test_a_crash_between_storing_and_acting_loses_no_command(
    before: tuple[Input, ...], wish: Input, after: Input, command: str
) -> None:
    """The wish is stored, the service dies before it acts, and the next look sends the command again."""
    story = started(active_job())
    for event in before:
        story.on(event)
    assert command in story.on(wish)
    story.crash()
    assert command in story.on(after)


def test_a_keep_is_not_lost_in_a_crash() -> None:
    """At ready the end by `keep` is stored in the same step, and asked for again until QEMU obeys."""
    story = ready(active_job(on_ready=OnReady.KEEP))
    story.crash()
    assert story.on(seen("ready")) == ("abort",)


def test_a_taken_pivot_is_asked_for_again_after_a_crash() -> None:
    """That QEMU took the command is not stored; asking twice does no harm."""
    story = ready(active_job())
    story.on(Pivot())
    story.on(PivotTaken())
    story.crash()
    assert story.on(seen("ready")) == ("pivot",)


def test_what_is_confirmed_is_not_sent_for_ever() -> None:
    """A command whose effect no status shows goes out at the next look once more, and then no more."""
    story = started(active_job())
    story.on(SetSpeed(5))
    story.on(SetSpeed(6))
    assert story.on(seen("running")) == ("set-speed",)
    assert story.on(seen("running")) == ()


# What is stored ------------------------------------------------------------------------------------------------------


def test_each_stored_change_raises_the_version_by_one() -> None:
    """Versions are the ETag: none is skipped or used twice, also where one step tells of two events."""
    story = ready(active_job(on_ready=OnReady.PIVOT))
    story.on(PivotTaken())
    story.on(seen("ready"))
    story.on(seen("concluded"))
    story.on(shows(Proof.MERGED))
    story.on(DONE)
    assert story.versions == list(range(1, len(story.versions) + 1))
    assert story.job == story.stored


def test_the_first_thing_stored_is_the_queued_job() -> None:
    """A job is in the journal, and told of, before anything is done for it."""
    job = active_job()
    first = start_job(job)
    assert (first.job, first.commands) == (job, ())
    assert [(told.type, told.job) for told in first.versions] == [("job.queued", job)]


def test_progress_alone_is_not_stored() -> None:
    """Progress moves with every look and is worth no transaction."""
    story = started(active_job())
    versions = list(story.versions)
    story.on(seen("running", 30, 90))
    assert (story.job.progress.current, story.versions) == (30, versions)


@pytest.mark.parametrize(
    ("current", "end", "percent"), [(0, 0, 0.0), (0, 100, 0.0), (1, 3, 33.3), (999, 1000, 99.9), (1000, 1000, 99.9)]
)
def test_percent_of_a_running_job(current: int, end: int, percent: float) -> None:
    """Before ready, 100 is never shown, not even when all that is known of is copied."""
    job = replace(at(State.RUNNING), progress=Progress(current=current, end=end))
    assert job.percent == percent
    assert replace(job, ready_at=5, state=State.READY).percent == 100.0
    assert replace(job, state=State.COMPLETED).percent == 100.0
    assert replace(job, ready_at=5, state=State.FAILED).percent == percent


def test_an_ended_job_goes_nowhere() -> None:
    """The rate and the time left belong to a job at work, and the reason of a pause to a paused one."""
    story = started(job_for(request(flags=["active"])))
    story.on(Observed("paused", Progress(current=1, end=9, rate=5, eta=2.0), io_status="nospace"))
    story.on(Observed("concluded", Progress(current=1, end=9, rate=5, eta=2.0), error=CANCELED))
    story.on(shows(Proof.UNCHANGED))
    story.on(DONE)
    assert story.job.progress == Progress(current=1, end=9)
    assert story.job.pause_reason is None


def test_a_comparison_that_fails() -> None:
    """The merge is done, and the job has failed all the same: what was merged is not what the base shows."""
    story = started(intermediate_job("delete"))
    story.on(seen("concluded"))
    story.on(shows(Proof.MERGED))
    problem = Problem(code=Code.VERIFICATION_FAILED, detail="they differ")
    story.on(CleanedUp(Result(chain=FILES[:1]), problem))
    assert (story.told[-1], story.job.error) == ("failed", problem)


def test_a_clock_that_is_set_back_ends_no_job_before_it_began() -> None:
    """Times of a job rise, whatever the clock says."""
    job = replace(active_job(), created_at=1_000_000)
    ended = step(job, Abort(force=False), 5).job
    assert ended.ended
    assert ended.finished_at == 1_000_000


@pytest.mark.parametrize(
    ("proof", "state"),
    [(Proof.UNCHANGED, State.COMPLETED), (Proof.MERGED, State.LOST), (Proof.UNKNOWN, State.LOST)],
)
def test_a_keep_that_another_client_has_ended_before_ready_was_seen(proof: Proof, state: State) -> None:
    """A gentle cancel at ready is what was asked for; a pivot is not, and nobody is told that the overlay was kept."""
    story = started(active_job(on_ready=OnReady.KEEP))
    story.on(seen("concluded"))
    story.on(shows(proof))
    assert story.job.control.judgement is not None
    assert story.job.control.judgement.state is state


@pytest.mark.parametrize("seen_before", [True, False])
@pytest.mark.parametrize("wish", [None, Abort(force=False)])
def test_a_start_without_a_trace_in_a_qemu_that_nobody_knows(wish: Abort | None, *, seen_before: bool) -> None:
    """It is started again only on the very images that it was accepted for; else it may be another machine's disk."""
    job = active_job()
    if seen_before:
        layers = [replace(layer, identity=(1, number)) for number, layer in enumerate(job.spec.disk.layers)]
        job = replace(job, spec=replace(job.spec, disk=replace(job.spec.disk, layers=tuple(layers))))
    story = Story(job)
    story.on(Launch(None))
    if wish is not None:
        story.on(wish)
    story.crash()
    story.on(Absent())
    found = shows(Proof.UNCHANGED).evidence
    assert found.graph is not None
    identities = tuple((1, number) if seen_before else None for number in range(len(found.graph.nodes)))
    graph = replace(found.graph, identities=identities)
    after = story.on(Gathered(replace(found, process=Sameness.UNKNOWN, ended=False, graph=graph)))
    if seen_before:
        assert after == (("start",) if wish is None else ())
        assert story.job.state is (State.STARTING if wish is None else State.CANCELED)
    else:
        assert "start" not in after
        assert story.job.control.judgement is not None
        assert story.job.control.judgement.state is State.LOST
