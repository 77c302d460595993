"""A small QEMU: one disk, its chain, and block jobs that live by QAPI's `JobStatus`.

It refuses what QEMU refuses, in QEMU's words, and knows what really happened to the data, which is what the tests
compare the service's word with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from app.core.errors import CANCELED, OUT_OF_SPACE, Problem, qemu_problem
from app.core.job import OnError, Process, Progress
from app.core.machine.inputs import Observed

SIZE: Final = 100

NEXT: Final = {
    "created": {"running", "aborting"},
    "running": {"paused", "ready", "waiting", "aborting"},
    "paused": {"running", "aborting"},
    "ready": {"standby", "waiting", "aborting"},
    "standby": {"ready", "aborting"},
    "waiting": {"pending", "aborting"},
    "pending": {"aborting", "concluded"},
    "aborting": {"concluded"},
    "concluded": set[str](),
}
"""The moves of a job (job.c, JobSTT). On its way to `aborting` QEMU wakes a paused job first, which no look shows."""

PASSING: Final = {"created": "running", "waiting": "pending", "aborting": "concluded"}
STANDS: Final = {"running": "paused", "ready": "standby"}
GOES_ON: Final = {standing: going for going, standing in STANDS.items()}

PAUSABLE: Final = {"created", "running", "paused", "ready", "standby"}


class QemuRefuses(Exception):
    """The answer to a command that QEMU does not take."""

    def __init__(self, desc: str) -> None:
        super().__init__(desc)
        self.desc = desc

    @property
    def problem(self) -> Problem:
        """The refusal as the monitor passes it on."""
        return qemu_problem("GenericError", self.desc, doing="a command")


@dataclass(slots=True, kw_only=True)
class QemuJob:
    """A block job inside QEMU. `paused` is a pause by a client or an I/O error, not one of QEMU's own short ones."""

    active: bool
    top: int
    base: int
    on_error: OnError
    status: str = "created"
    current: int = 0
    error: str | None = None
    paused: bool = False
    io_status: str = "ok"
    gentle_cancel: bool = False
    complete: bool = False
    finalized: bool = False

    def to(self, status: str) -> None:
        """Move, as far as QEMU's own table allows it."""
        assert status in NEXT[self.status], f"QEMU never goes from {self.status} to {status}"
        self.status = status


@dataclass(slots=True, kw_only=True)
class Qemu:
    """The process, its chain (node-names, active layer first) and its jobs.

    `kept` is set once a gentle cancel has left a consistent copy in the base, `foreign_pivot` once another client has
    asked for a pivot.
    """

    chain: tuple[str, ...]
    process: Process
    up: bool = True
    jobs: dict[str, QemuJob] = field(default_factory=dict[str, QemuJob])
    kept: bool = False
    foreign_pivot: bool = False

    # What is asked of it

    def query(self) -> dict[str, Observed]:
        """As `query-jobs` with `query-block-jobs`."""
        return {
            id_: Observed(job.status, Progress(current=job.current, end=SIZE), job.error, job.io_status)
            for id_, job in self.jobs.items()
        }

    def start(self, id_: str, *, active: bool, top: int, base: int, on_error: OnError) -> None:
        """As `block-commit` with `auto-dismiss: false`."""
        # A disk that was opened with -blockdev: its root is looked for before the job's id is.
        if any(job.status != "concluded" for job in self.jobs.values()):
            raise QemuRefuses("Need a root block node")
        if id_ in self.jobs:
            raise QemuRefuses(f"Job ID '{id_}' already in use")
        self.jobs[id_] = QemuJob(active=active, top=top, base=base, on_error=on_error)

    def _job(self, id_: str) -> QemuJob:
        if id_ not in self.jobs:
            raise QemuRefuses("Job not found")
        return self.jobs[id_]

    def cancel(self, id_: str, *, force: bool) -> None:
        """As `block-job-cancel`; gentle only at ready, where it lets the job end without a pivot."""
        job = self._job(id_)
        if job.status in {"aborting", "concluded"}:
            raise QemuRefuses(f"Job '{id_}' in state '{job.status}' cannot accept command verb 'cancel'")
        if job.paused and not force:
            raise QemuRefuses(f"The block job for device '{id_}' is currently paused")
        if not force and job.status in {"ready", "standby", "waiting", "pending"} and job.active:
            job.gentle_cancel = True
            return
        job.error = CANCELED
        job.to("aborting")

    def complete(self, id_: str) -> None:
        """As `job-complete`: taken, it takes effect when the job runs on."""
        job = self._job(id_)
        if job.status not in {"ready", "standby"}:
            raise QemuRefuses(f"Job '{id_}' in state '{job.status}' cannot accept command verb 'complete'")
        if job.gentle_cancel:
            raise QemuRefuses(f"The active block job '{id_}' cannot be completed")
        job.complete = True

    def pause(self, id_: str) -> None:
        """As `job-pause`."""
        job = self._job(id_)
        if job.status not in PAUSABLE or job.paused:
            raise QemuRefuses("Job is already paused")
        job.paused = True

    def resume(self, id_: str) -> None:
        """As `job-resume`."""
        job = self._job(id_)
        if job.status not in PAUSABLE or not job.paused:
            raise QemuRefuses("Can't resume a job that was not paused")
        job.paused, job.io_status = False, "ok"

    def finalize(self, id_: str) -> None:
        """As `job-finalize`; a commit of the active layer does not wait for it (`auto-finalize`)."""
        job = self._job(id_)
        if job.status != "pending":
            raise QemuRefuses(f"Job '{id_}' in state '{job.status}' cannot accept command verb 'finalize'")
        job.finalized = True

    def dismiss(self, id_: str) -> None:
        """As `job-dismiss`."""
        job = self._job(id_)
        if job.status != "concluded":
            raise QemuRefuses(f"Job '{id_}' in state '{job.status}' cannot accept command verb 'dismiss'")
        del self.jobs[id_]

    # What it does by itself

    def move(self, *, done: bool = False) -> None:
        """Let every job take its next move; `done`: it has nothing left to copy."""
        for job in self.jobs.values():
            self._move(job, done=done)

    def _move(self, job: QemuJob, *, done: bool) -> None:
        if job.status in PASSING:
            job.to(PASSING[job.status])
        elif job.status == "pending":
            if job.active or job.finalized:
                self._conclude(job)
        elif job.paused and job.status in STANDS:
            job.to(STANDS[job.status])
        elif not job.paused and job.status in GOES_ON:
            job.to(GOES_ON[job.status])
        elif job.status == "running":
            job.current = SIZE if done else min(SIZE, job.current + 30)
            if done:
                job.to("ready" if job.active else "waiting")
        elif job.status == "ready" and (job.complete or job.gentle_cancel):
            job.to("waiting")

    def _conclude(self, job: QemuJob) -> None:
        if job.active and not job.complete:
            self.kept = True
        else:
            self.chain = self.chain[: job.top] + self.chain[job.base :]
        job.to("concluded")

    def blip(self) -> None:
        """One of QEMU's own short pauses, which a drain causes; the next move ends it."""
        for job in self.jobs.values():
            if job.status in STANDS:
                job.to(STANDS[job.status])

    def run_out_of_space(self) -> None:
        """The base takes no more data."""
        for job in self.jobs.values():
            if job.status not in STANDS:
                continue
            if job.on_error is OnError.REPORT:
                job.error = OUT_OF_SPACE
                job.to("aborting")
            else:
                job.paused, job.io_status = True, "nospace"
                job.to(STANDS[job.status])

    def crash(self) -> None:
        """The process ends; jobs are gone, chains on disk stay."""
        self.up = False
        self.jobs.clear()

    def restart(self, process: Process) -> None:
        """Another process runs the same chain."""
        self.up, self.process = True, process
