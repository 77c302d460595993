"""How fast a job goes and how long it will take, from what was seen of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from app.core.job import Progress

WINDOW: Final = 10.0
"""Seconds over which the rate is taken: long enough to smooth QEMU's bursts, short enough to follow a new speed."""


@dataclass(frozen=True, slots=True)
class Meter:
    """Samples of a job's progress: (seconds on some steady clock, bytes done), oldest first."""

    samples: tuple[tuple[float, int], ...] = ()

    def measure(self, seen: Progress, at: float) -> tuple[Meter, Progress]:
        """The meter with what was `seen` at the time `at`, and the progress with its rate and time left."""
        recent = tuple((time, done) for time, done in self.samples if at - WINDOW <= time < at and done <= seen.current)
        first_time, first_done = recent[0] if recent else (at, seen.current)
        passed = at - first_time
        rate = int((seen.current - first_done) / passed) if passed > 0 else 0
        eta = round((seen.end - seen.current) / rate, 1) if rate > 0 and seen.end >= seen.current else None
        return Meter((*recent, (at, seen.current))), replace(seen, rate=rate, eta=eta)
