"""The words of a job's life: its states, its events, and what can be asked of it."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


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

    # As clients see it. Nothing is decided by it: the capabilities of the kind are asked.

    COMMIT = "commit"
    ACTIVE_COMMIT = "active-commit"
    PULL = "pull"


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


class Command(StrEnum):
    """What the engine is to do next. Each may be done twice without harm."""

    START = "start"
    PIVOT = "pivot"
    ABORT = "abort"
    """At ready it waits for a consistent copy (QAPI `block-job-cancel`)."""
    ABORT_FORCE = "abort-force"
    FINALIZE = "finalize"
    """Have the merged data written to the disk, and then have QEMU take the merged layers out of the chain."""
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    GATHER = "gather"
    """Read what QEMU's graph and the images' headers show of the outcome."""
    CLEAN_UP = "clean-up"
    """Release nodes, delete images, let QEMU forget the job."""
