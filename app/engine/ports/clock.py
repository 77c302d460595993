"""The time."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """The time."""

    def now(self) -> int:
        """Milliseconds since 1970, UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds, for durations."""
        ...
