"""What is taken from QEMU's events: that it is time to look, and how jobs ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import structlog

from app.core.machine.inputs import Observed
from app.drivers.qmp import replies
from app.drivers.qmp.checks import MalformedReply
from app.engine.ports.driver import Address

log = structlog.get_logger(__name__)

HINTS: Final = frozenset(
    {
        "BLOCK_IO_ERROR",
        "BLOCK_JOB_CANCELLED",
        "BLOCK_JOB_COMPLETED",
        "BLOCK_JOB_READY",
        "DEVICE_DELETED",
        "DEVICE_TRAY_MOVED",
        "RESUME",
        "SHUTDOWN",
        "STOP",
    }
)
"""Events after which something is worth a look. BLOCK_JOB_ERROR is none: thousands may come, and a pause follows."""

STOPS: Final = frozenset({"paused", "ready", "standby", "pending", "concluded", "null"})
"""Statuses of a job (QAPI `JobStatus`) at which there may be something to do. It leaves the others by itself."""

LEAVING: Final = frozenset({"waiting", "pending"})
"""Statuses of a job that is about to take effect: of a merge of the active layer, by a pivot."""

LEAVING_MAX: Final = 4096
"""How many of them are remembered; beyond that, any job may be one."""

FINAL_REPORTS_MAX: Final = 256
"""How many jobs' ends are kept; the oldest are let go first."""


class QmpEvents:
    """The events of one connection; `hint` is called when it is time to look.

    `final_reports` are how jobs ended, by id.
    """

    def __init__(self, address: Address, hint: Callable[[], None]) -> None:
        self.final_reports: dict[str, Observed] = {}
        self._leaving: set[str] = set()
        self._address = address
        self._hint = hint
        self._dropped = False

    def take(self, name: object, data: object) -> None:
        """Take in an event as it came; a malformed one is dropped."""
        try:
            event = replies.event(name, data)
        except MalformedReply as error:
            # QEMU sends no such event, and the next poll finds what has happened. Thousands may come, so only the first
            # is logged.
            if not self._dropped:
                self._dropped = True
                log.warning("malformed event", monitor=self._address.unix or self._address.tcp, reason=str(error))
            return
        match event:
            case replies.JobEnded():
                self._keep(event)
            case replies.JobStatusChanged():
                if event.status in LEAVING and len(self._leaving) < LEAVING_MAX:
                    self._leaving.add(event.id)
                # A job tells of each of its steps, and most of them are on the way to one that matters.
                if event.status not in STOPS:
                    return
            case replies.OtherEvent():
                if event.name not in HINTS:
                    return
        self._hint()

    def was_leaving(self, job_id: str) -> bool:
        """Whether a job may have told that it is about to take effect."""
        return job_id in self._leaving or len(self._leaving) >= LEAVING_MAX

    def forget(self, job_id: str) -> None:
        """A job's end is known, and QEMU has forgotten the job."""
        self.final_reports.pop(job_id, None)
        self._leaving.discard(job_id)

    def _keep(self, ended: replies.JobEnded) -> None:
        if len(self.final_reports) >= FINAL_REPORTS_MAX:
            self.final_reports.pop(next(iter(self.final_reports)))
        self.final_reports[ended.id] = Observed(status="concluded", progress=ended.progress, error=ended.error)
