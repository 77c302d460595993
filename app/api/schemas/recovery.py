"""The JSON of what was found after the service's start."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from app.api.schemas.base import Out, timestamp
from app.core.states import State
from app.engine.recovery import Found, Recovery


class FindingOut(Out):
    """A job as it was found after the service's start."""

    job: str
    domain: str
    disk: str | None
    found: Found = Field(
        description="`waiting`: its QEMU has not been asked yet; `queued`: it waits for its turn; `started`: QEMU did "
        "not know it, so it was started; `re-adopted`: it goes on; `finished`: it ended while no service was there; "
        "`lost`: its outcome is unknown; `adopted`: in QEMU, not in the journal, so a record was made; `unknown`: in "
        "QEMU, not in the journal, and its layers cannot be determined, so it is left alone"
    )
    state: State | None = Field(description="its state when it was found")
    proof: str | None = Field(description="how the outcome of a finished job is known")
    at: str


class RecoveryOut(Out):
    """What was found after the service's start."""

    started_at: str
    waiting: int = Field(description="how many jobs' QEMUs have not been asked yet; 0: the report is complete")
    items: Sequence[FindingOut]
    next: str | None


def recovery_out(recovery: Recovery) -> RecoveryOut:
    """The JSON of a recovery report."""
    findings = recovery.findings
    return RecoveryOut(
        started_at=timestamp(recovery.started_at),
        waiting=sum(finding.found is Found.WAITING for finding in findings),
        items=[
            FindingOut(
                job=finding.job_id,
                domain=finding.domain,
                disk=finding.disk,
                found=finding.found,
                state=finding.state,
                proof=finding.proof,
                at=timestamp(finding.at),
            )
            for finding in findings
        ],
        next=None,
    )
