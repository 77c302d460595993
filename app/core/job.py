"""A block job as a value: an envelope that all jobs have, the spec of its kind, and what the service keeps for itself.

`app.core.machine.table` says how a job moves, `app.core.kinds` what each kind does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from app.core.errors import Problem
from app.core.evidence import Judgement, Process, Verdict
from app.core.kinds import Spec, capabilities_of
from app.core.kinds.base import Capabilities, NotDeleted
from app.core.orphan import UNKNOWN
from app.core.plan import Plan
from app.core.states import ENDED, Command, DataState, Intent, JobType, OnError, OnReady, PauseReason, State


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`current` of `end` bytes (QAPI `JobInfo`), `rate` in bytes/s, `eta` in seconds or None where nobody can say."""

    current: int = 0
    end: int = 0
    rate: int = 0
    eta: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The chain after the job, active layer first, and what became of the merged images.

    `verified` are the bytes that were compared; None where nobody asked for that. `unused` are the files that the disk
    does not use any more, all of them right; None of a kind that does not leave such.
    """

    chain: tuple[str, ...]
    invalidated: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    not_deleted: tuple[NotDeleted, ...] = ()
    verified: int | None = None
    unused: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """A person's verdict on a job that was lost: who gave it, and when (ms since 1970)."""

    by: str
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """What the service remembers of a job for itself; clients never see it.

    `unconfirmed` are commands that nothing in QEMU's status would show to be missing: they are sent again at the next
    look, in case that the service or the connection ended between the wish and its command. `pivot_asked` stays once a
    pivot was asked for: QEMU may have pivoted since, whatever was wished later. `start_again` says that an earlier
    command to start the job may have got through, `rejection` is what QEMU answered to a later one then. `judgement` is
    the outcome that the tidying follows, `judged_at` when it was stored (ms since 1970).
    """

    intent: Intent = Intent.RUN
    pivot_asked: bool = False
    pause_wanted: bool = False
    unconfirmed: tuple[Command, ...] = ()
    start_again: bool = False
    rejection: Problem | None = None
    process: Process | None = None
    pivot_taken: bool = False
    pivot_attempts: int = 0
    verdict: Verdict | None = None
    verdict_error: str | None = None
    judgement: Judgement | None = None
    judged_at: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One block job, from its request to its outcome. Times are milliseconds since 1970, UTC.

    The fields down to `resolved` are shown to clients, and so is what `spec` says under `type`, `top_file`,
    `base_file`, `overlay_file` and `flag_names`. `control` and the rest of `spec` are the service's own. `bandwidth` is
    in bytes/s. `resolved` is set where a person has judged the outcome. `parent` is the job that this one is a step of.
    """

    id: str
    state: State
    domain: str
    disk: str
    on_ready: OnReady
    on_error: OnError
    bandwidth: int
    requested_by: str
    created_at: int
    pause_reason: PauseReason | None = None
    progress: Progress = field(default_factory=Progress)
    data_state: DataState = DataState.UNTOUCHED
    error: Problem | None = None
    result: Result | None = None
    started_at: int | None = None
    ready_at: int | None = None
    finished_at: int | None = None
    version: int = 1
    resolved: Resolution | None = None
    parent: str | None = None
    spec: Spec
    control: Control = field(default_factory=Control)

    @property
    def type(self) -> JobType:
        """What the job is called outside."""
        return self.spec.type

    @property
    def top_file(self) -> str:
        """The topmost image that the job works on."""
        return self.spec.top_file

    @property
    def base_file(self) -> str | None:
        """The image at the bottom of what the job works on; None where nothing is below then."""
        return self.spec.base_file

    @property
    def overlay_file(self) -> str | None:
        """The image above `top_file`; None where that is the active layer."""
        return self.spec.overlay_file

    @property
    def capabilities(self) -> Capabilities:
        """What a job of this kind is capable of."""
        return capabilities_of(self.spec)

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
        return self.capabilities.pivots and self.on_ready is not OnReady.KEEP


ACTIONS: Final[Mapping[State, tuple[str, ...]]] = {
    State.QUEUED: ("abort", "set-speed"),
    State.STARTING: ("abort",),
    State.RUNNING: ("abort", "pause", "set-speed"),
    State.PAUSED: ("resume", "abort", "set-speed"),
    State.READY: ("pivot", "abort", "set-speed"),
    State.LOST: ("resolve",),
}


def accept(
    plan: Plan[Spec],
    *,
    id_: str,
    domain: str,
    requested_by: str,
    now: int,
    process: Process | None = None,
    parent: str | None = None,
) -> Job:
    """The job that carries a plan out, queued; `now` is in ms since 1970, `process` the QEMU that it is for."""
    return Job(
        id=id_,
        state=State.QUEUED,
        domain=domain,
        disk=plan.disk.name,
        on_ready=plan.on_ready,
        on_error=plan.on_error,
        bandwidth=plan.bandwidth,
        requested_by=requested_by,
        created_at=now,
        parent=parent,
        spec=plan.spec,
        control=Control(process=process),
    )


def adopted(plan: Plan[Spec], *, id_: str, domain: str, process: Process, now: int) -> Job:
    """The record of a job that QEMU has and the journal did not, running; `now` is in ms since 1970."""
    job = accept(plan, id_=id_, domain=domain, requested_by=UNKNOWN, now=now, process=process)
    return replace(job, state=State.RUNNING, started_at=now, data_state=job.capabilities.data_at_start)


def refusal_of(job: Job) -> Problem | None:
    """How the request for a job is refused that QEMU did not even start; None for any other job."""
    if job.state is not State.FAILED or job.error is None or job.started_at is not None:
        return None
    return replace(job.error, extra={**job.error.extra, "job": job.id})
