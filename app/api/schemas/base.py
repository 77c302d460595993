"""What all answers are made of."""

from __future__ import annotations

from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict


class Out(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(frozen=True)


def timestamp(ms: int) -> str:
    """ISO 8601 in UTC with milliseconds, from milliseconds since 1970."""
    return datetime.fromtimestamp(ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{ms % 1000:03d}Z"


def time_or_none(ms: int | None) -> str | None:
    """As `timestamp`; None where there is no time."""
    return None if ms is None else timestamp(ms)
