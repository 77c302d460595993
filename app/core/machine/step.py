"""What follows from an input, and the moves that the handlers of reports and of controls share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from app.core.job import Job
from app.core.states import ENDINGS, Command, EventType, Intent, State


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A version of the job that is stored, with the event that tells of it, if one does."""

    type: EventType | None
    job: Job


@dataclass(frozen=True, slots=True)
class Step:
    """What follows from an input: the job now, what to store (in this order, in one transaction), what to do then."""

    job: Job
    versions: tuple[StoredVersion, ...] = ()
    commands: tuple[Command, ...] = ()

    def then(self, following: Step) -> Step:
        """Both steps as one; a command that both ask for is carried out once."""
        new = tuple(command for command in following.commands if command not in self.commands)
        return Step(following.job, self.versions + following.versions, self.commands + new)


def save(job: Job, type_: EventType | None, *commands: Command) -> Step:
    """Store the job as its next version, tell of it, then carry out the commands."""
    stored = replace(job, version=job.version + 1)
    return Step(stored, (StoredVersion(type_, stored),), commands)


def asked(job: Job, command: Command) -> tuple[Command, ...]:
    """What is to be sent again at the next look, now that `command` is sent; the last wish of its kind counts."""
    same_kind = (Command.SET_SPEED,) if command is Command.SET_SPEED else (Command.PAUSE, Command.RESUME)
    return (*(other for other in job.control.unconfirmed if other not in same_kind), command)


def end(job: Job, state: State, now: int) -> Step:
    """The job has ended, for good."""
    progress = replace(job.progress, rate=0, eta=None)
    ended = replace(job, state=state, finished_at=now, pause_reason=None, progress=progress)
    return save(ended, ENDINGS[state])


def begin_pivot(job: Job, *first: Command) -> Step:
    """Ask QEMU to pivot, after the commands that have to come first."""
    control = replace(
        job.control, intent=Intent.PIVOT, pivot_asked=True, pause_wanted=False, pivot_taken=False, pivot_attempts=0
    )
    pivoting = replace(job, state=State.PIVOTING, pause_reason=None, control=control)
    return save(pivoting, EventType.PIVOTING, *first, Command.PIVOT)


def begin_abort(job: Job, *, force: bool) -> Step:
    """Ask QEMU to end the job without a merge."""
    # A paused job takes no gentle cancel; before ready there is no consistent copy to wait for anyway.
    hard = force or job.state is State.PAUSED
    control = replace(job.control, intent=Intent.FORCE if force else Intent.ABORT, unconfirmed=())
    aborting = replace(job, state=State.ABORTING, pause_reason=None, control=control)
    return save(aborting, EventType.ABORTING, Command.ABORT_FORCE if hard else Command.ABORT)
