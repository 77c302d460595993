"""What was found after the service's start: the jobs that the last one left unfinished, and those nobody knew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

import structlog

from app.core.job import Job
from app.core.machine.inputs import Accepted, Input, Observed
from app.core.reconcile import how_proven
from app.core.states import State
from app.engine.ports.clock import Clock

log = structlog.get_logger(__name__)


class Found(StrEnum):
    """What became of a job while no service was there."""

    WAITING = "waiting"
    """Not known yet: its QEMU has not been asked."""
    QUEUED = "queued"
    """It was waiting for its place, and does so again."""
    STARTED = "started"
    """QEMU had never heard of it: it has been started now."""
    RE_ADOPTED = "re-adopted"
    """QEMU has it, and it goes on."""
    FINISHED = "finished"
    """It has ended meanwhile; `proof` says how that is known."""
    LOST = "lost"
    """Nothing proves how it ended."""
    ADOPTED = "adopted"
    """QEMU has it, and the journal did not know it."""
    UNKNOWN = "unknown"
    """QEMU has it, the journal does not know it, and nothing tells what it works on: it is left alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A job as it was found. `state` is its state then; `at` is in ms since 1970."""

    job_id: str
    domain: str
    disk: str | None
    found: Found
    state: State | None
    proof: str | None
    at: int


FINDINGS_MAX: Final = 10_000
"""How many findings are kept; only jobs that QEMUs make up without end would be more."""


class Recovery:
    """The findings since the start, in the order in which the jobs were created."""

    def __init__(self, clock: Clock) -> None:
        self.started_at = clock.now()
        self._clock = clock
        self._findings: dict[str, Finding] = {}

    @property
    def findings(self) -> Sequence[Finding]:
        """All there are."""
        return list(self._findings.values())

    def begin(self, jobs: Iterable[Job]) -> None:
        """Take in the unfinished jobs of the journal."""
        for job in jobs:
            found = Found.QUEUED if job.state is State.QUEUED else Found.WAITING
            self._add(job.id, job.domain, job.disk, found, state=job.state)
        if self._findings:
            log.info("recovering", unfinished=len(self._findings))

    def note(self, job: Job, event: Input) -> None:
        """A job has moved to where it is now, by `event`."""
        finding = self._findings.get(job.id)
        if finding is None or finding.found is not Found.WAITING:
            return
        if job.ended:
            found = Found.LOST if job.state is State.LOST else Found.FINISHED
            self._keep(replace(finding, found=found, state=job.state, proof=how_proven(job), at=self._clock.now()))
        elif isinstance(event, Accepted) or (isinstance(event, Observed) and job.state is not State.CONCLUDING):
            found = Found.STARTED if isinstance(event, Accepted) else Found.RE_ADOPTED
            self._keep(replace(finding, found=found, state=job.state, at=self._clock.now()))

    def adopted(self, job: Job) -> None:
        """A job of ours was in QEMU and not in the journal; now it is in both."""
        self._add(job.id, job.domain, job.disk, Found.ADOPTED, state=job.state)

    def unknown(self, job_id: str, domain: str) -> None:
        """A job of ours is in QEMU, and that is all that is known."""
        self._add(job_id, domain, None, Found.UNKNOWN)

    def _add(self, job_id: str, domain: str, disk: str | None, found: Found, *, state: State | None = None) -> None:
        if len(self._findings) < FINDINGS_MAX:
            now = self._clock.now()
            self._keep(
                Finding(job_id=job_id, domain=domain, disk=disk, found=found, state=state, proof=None, at=now),
            )

    def _keep(self, finding: Finding) -> None:
        self._findings[finding.job_id] = finding
        if finding.found is not Found.WAITING:
            state = finding.state.value if finding.state else None
            log.info(
                "recovered",
                job=finding.job_id,
                domain=finding.domain,
                found=finding.found.value,
                state=state,
                proof=finding.proof,
            )
