"""What routes take from their requests besides the body."""

from __future__ import annotations

from typing import Annotated, Final, cast

from fastapi import Depends, Path, Request
from pydantic import AfterValidator

from app.core.errors import Code
from app.engine.service import Service

INTEGER_MAX: Final = 2**63 - 1
"""The largest integer that the journal can hold."""

READS: Final = (
    Code.UNAUTHENTICATED,
    Code.INVALID_REQUEST,
    Code.INTERNAL_ERROR,
    Code.JOURNAL_BUSY,
    Code.JOURNAL_DAMAGED,
    Code.JOURNAL_UNREADABLE,
)
"""What any read may be refused with."""

CHANGES: Final = (
    *READS,
    Code.OPERATION_DENIED,
    Code.PAYLOAD_TOO_LARGE,
    Code.SHUTTING_DOWN,
    Code.JOURNAL_FULL,
    Code.JOURNAL_UNCERTAIN,
    Code.JOURNAL_REPLACED,
)
"""What any change may be refused with."""


# FastAPI would call a function that is not `async` in a thread.
async def _use_cases(request: Request) -> Service:
    return cast(Service, request.app.state.service)


def no_nul(value: str) -> str:
    """The value, for use in an annotation; raises ValueError for a NUL character, which file names can't hold."""
    if "\0" in value:
        raise ValueError("must not hold a NUL character")
    return value


UseCases = Annotated[Service, Depends(_use_cases)]
DomainId = Annotated[str, Path(description="the domain's id"), AfterValidator(no_nul)]
DiskName = Annotated[
    str,
    Path(description="target name, qdev id, drive id, node-name, or an image's percent-encoded path"),
    AfterValidator(no_nul),
]
JobId = Annotated[str, Path(description="the job's id"), AfterValidator(no_nul)]
