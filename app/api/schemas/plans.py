"""The JSON of plans: what a dry run answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from app.api.schemas.base import Out
from app.core.flags import flag_names
from app.core.job import JobType
from app.core.plan import Plan
from app.core.qmp import block_commit_arguments


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


def plan_out(plan: Plan) -> PlanOut:
    """The JSON of a dry run."""
    chosen = plan.selection
    disk, request, overlay = chosen.disk, chosen.request, chosen.overlay
    top = disk.layers[chosen.top]
    arguments = block_commit_arguments(
        device=disk.node or "",
        top_node=top.node,
        base_node=chosen.base_layer.node,
        backing_file=plan.backing_file,
        speed=request.bandwidth,
        on_error=request.on_error.value,
    )
    return PlanOut(
        type=plan.type,
        disk=disk.name,
        top=top.file,
        base=chosen.base_layer.file,
        overlay=overlay.file if overlay else None,
        flags=flag_names(request.flags),
        chain_before=disk.files,
        chain_after=plan.chain_after,
        invalidates=plan.invalidates,
        deletes=plan.deletes,
        bytes_to_copy=plan.bytes_to_copy,
        base_growth_max=plan.base_growth_max,
        free=plan.free,
        resizes_base_to=plan.resizes_base_to,
        backing_file=plan.backing_file,
        warnings=[WarningOut(code=warning.code, detail=warning.detail) for warning in plan.warnings],
        qmp=CommandOut(arguments=arguments),
    )
