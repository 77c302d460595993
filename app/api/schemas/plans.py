"""The JSON of plans: what a dry run answers."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from app.api.schemas.base import Out
from app.core.kinds import Spec
from app.core.plan import Plan
from app.core.states import JobType


class WarningOut(Out):
    """Something to know before the job runs."""

    code: str
    detail: str


class CommandOut(Out):
    """What QEMU will be told, but for the job's id."""

    execute: str
    arguments: dict[str, object]


class PlanOut(Out):
    """What a job would do. Sizes in bytes."""

    type: JobType
    disk: str
    top: str
    base: str | None
    overlay: str | None
    flags: Sequence[str]
    chain_before: Sequence[str]
    chain_after: Sequence[str]
    invalidates: Sequence[str] = Field(description="files that must not be used any more")
    deletes: Sequence[str]
    unused: Sequence[str] | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="files that the disk does not use any more then, and whose content stays right; not of a commit",
    )
    bytes_to_copy: int
    base_growth_max: int = Field(description="of the layer that is written to: `base`, or of a pull `top`")
    free: int | None = Field(description="on the file system of that layer; null where the service can't see it")
    resizes_base_to: int | None
    backing_file: str | None = Field(description="what the header of `overlay`, or of a pull that of `top`, will say")
    warnings: Sequence[WarningOut]
    qmp: Sequence[CommandOut] = Field(description="the commands that start the job")


def plan_out(plan: Plan[Spec]) -> PlanOut:
    """The JSON of a dry run."""
    spec = plan.spec
    return PlanOut(
        type=spec.type,
        disk=plan.disk.name,
        top=spec.top_file,
        base=spec.base_file,
        overlay=spec.overlay_file,
        flags=spec.flag_names,
        chain_before=plan.disk.files,
        chain_after=plan.chain_after,
        invalidates=plan.invalidates,
        deletes=plan.deletes,
        unused=plan.unused,
        bytes_to_copy=plan.demand.copies,
        base_growth_max=plan.demand.growth,
        free=plan.free,
        resizes_base_to=plan.resizes_base_to,
        backing_file=plan.backing_file,
        warnings=[WarningOut(code=warning.code, detail=warning.detail) for warning in plan.warnings],
        qmp=[CommandOut(execute=each.execute, arguments=dict(each.arguments)) for each in plan.commands],
    )
