"""The JSON of plans: what a dry run answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

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

    execute: Literal["block-commit"] = "block-commit"
    arguments: dict[str, object]


class PlanOut(Out):
    """What a commit would do. Sizes in bytes."""

    type: JobType
    disk: str
    top: str
    base: str
    overlay: str | None
    flags: Sequence[str]
    chain_before: Sequence[str]
    chain_after: Sequence[str]
    invalidates: Sequence[str] = Field(description="files that must not be used any more")
    deletes: Sequence[str]
    bytes_to_copy: int
    base_growth_max: int
    free: int | None = Field(description="on the file system of `base`; null where the service can't see it")
    resizes_base_to: int | None
    backing_file: str | None = Field(description="what the header of `overlay` will say")
    warnings: Sequence[WarningOut]
    qmp: CommandOut


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
        bytes_to_copy=plan.demand.copies,
        base_growth_max=plan.demand.growth,
        free=plan.free,
        resizes_base_to=plan.resizes_base_to,
        backing_file=plan.backing_file,
        warnings=[WarningOut(code=warning.code, detail=warning.detail) for warning in plan.warnings],
        qmp=CommandOut.model_validate({"execute": plan.command.execute, "arguments": dict(plan.command.arguments)}),
    )
