"""A block job inside a simulated QEMU: its life by QAPI's `JobStatus`, and the data that it moves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from app.core.errors import CANCELED, OUT_OF_SPACE, Problem, qemu_problem
from app.core.job import Progress
from app.core.machine.inputs import Observed
from tests.engine.simulation.files import CLUSTER
from tests.engine.simulation.nodes import Node

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
PAUSABLE: Final = frozenset({"created", "running", "paused", "ready", "standby"})
DRAINED: Final = frozenset({"waiting", "pending"})
"""Statuses of a merge of the active layer in which the guest's I/O waits."""


class QemuRefuses(Exception):
    """The answer to a command that QEMU does not take."""

    def __init__(self, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class

    @property
    def problem(self) -> Problem:
        """The refusal as the monitor passes it on."""
        return qemu_problem(self.error_class, self.desc, doing="a command")


@dataclass(slots=True, kw_only=True, eq=False)
class BlockJob:
    """A commit of `layers` (topmost first) into `base`, on the disk `target`; or a `stream` of them into `base` above.

    `below` is what a stream leaves below `base`, None for nothing.
    `paused` is a pause by a client or an I/O error, not one of QEMU's own short ones. `left` are the clusters that are
    still to be copied, and `outcome` what became of the data: `merged`, `kept` (a consistent copy) or `undone`;
    `noted` says that the world has taken it in.
    """

    id: str
    target: str
    active: bool
    layers: tuple[Node, ...]
    base: Node
    stream: bool = False
    below: Node | None = None
    on_error: str
    backing_file: str | None
    auto_finalize: bool
    speed: int
    left: set[int] = field(default_factory=set[int])
    copied: int = 0
    status: str = "created"
    error: str | None = None
    paused: bool = False
    io_status: str = "ok"
    gentle_cancel: bool = False
    complete: bool = False
    outcome: str | None = None
    noted: bool = False

    def to(self, status: str) -> None:
        """Move, as far as QEMU's own table allows it."""
        assert status in NEXT[self.status], f"QEMU never goes from {self.status} to {status}"
        self.status = status

    @property
    def observed(self) -> Observed:
        """As `query-jobs` with `query-block-jobs` shows it."""
        end = (self.copied + len(self.left)) * CLUSTER
        return Observed(self.status, Progress(current=self.copied * CLUSTER, end=end), self.error, self.io_status)

    def cancel(self, *, force: bool) -> None:
        """As `block-job-cancel`; gentle only at ready, where it lets the job end without a pivot."""
        if self.status in {"aborting", "concluded"}:
            raise QemuRefuses(f"Job '{self.id}' in state '{self.status}' cannot accept command verb 'cancel'")
        if self.paused and not force:
            raise QemuRefuses(f"The block job for device '{self.id}' is currently paused")
        if not force and self.active and self.status in {"ready", "standby", "waiting", "pending"}:
            self.gentle_cancel = True
            return
        self.fail(CANCELED)

    def fail(self, error: str) -> None:
        """End without merging."""
        self.error = error
        self.to("aborting")

    def ask_complete(self) -> None:
        """As `job-complete`: taken, it takes effect when the job runs on."""
        if self.status not in {"ready", "standby"}:
            raise QemuRefuses(f"Job '{self.id}' in state '{self.status}' cannot accept command verb 'complete'")
        if self.gentle_cancel:
            raise QemuRefuses(f"The active block job '{self.id}' cannot be completed")
        self.complete = True

    def pause(self) -> None:
        """As `job-pause`."""
        if self.status not in PAUSABLE:
            raise QemuRefuses(f"Job '{self.id}' in state '{self.status}' cannot accept command verb 'pause'")
        if self.paused:
            raise QemuRefuses("Job is already paused")
        self.paused = True

    def resume(self) -> None:
        """As `job-resume`."""
        if self.status not in PAUSABLE:
            raise QemuRefuses(f"Job '{self.id}' in state '{self.status}' cannot accept command verb 'resume'")
        if not self.paused:
            raise QemuRefuses("Can't resume a job that was not paused")
        self.paused, self.io_status = False, "ok"

    def check_finalize(self) -> None:
        """Check that `job-finalize` is taken."""
        if self.status != "pending":
            raise QemuRefuses(f"Job '{self.id}' in state '{self.status}' cannot accept command verb 'finalize'")

    def blip(self) -> None:
        """One of QEMU's own short pauses, which a drain causes; the next move ends it."""
        if self.status in STANDS:
            self.to(STANDS[self.status])

    def run_out_of_space(self) -> None:
        """The base takes no more data."""
        if self.on_error == "report":
            self.fail(OUT_OF_SPACE)
        else:
            self.paused, self.io_status = True, "nospace"
            self.to(STANDS[self.status])
