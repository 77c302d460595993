"""The JSON of the probes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.api.schemas.base import Out


class HealthOut(Out):
    """That the service is up, and what was checked."""

    status: Literal["ok"] = "ok"
    checks: dict[str, str] = Field(default={})
