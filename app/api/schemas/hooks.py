"""The JSON of deliveries that CI pipelines send."""

from __future__ import annotations

from pydantic import Field

from app.api.schemas.base import Out


class IgnoredOut(Out):
    """A delivery that starts nothing."""

    ignored: str = Field(description="why the delivery starts nothing")
