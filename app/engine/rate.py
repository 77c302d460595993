"""How often something may happen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from app.engine.ports.clock import Clock

HINTS_BURST: Final = 500
HINTS_A_SECOND: Final = 300.0
"""Looks that QEMU's events may ask for; a merge takes a handful."""

LATER_S: Final = 0.1
"""Seconds until the next one where more are asked for."""


class Rate:
    """A bucket of `burst` that fills again by `a_second`, by a clock's seconds."""

    def __init__(self, burst: int, a_second: float) -> None:
        self._burst = burst
        self._a_second = a_second
        self._left = float(burst)
        self._at: float | None = None

    def take(self, now: float) -> bool:
        """Whether it may happen now."""
        if self._at is not None:
            self._left = min(self._burst, self._left + (now - self._at) * self._a_second)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Throttled:
    """Does `act` whenever it is asked for, or a little later where that is too often."""

    def __init__(self, act: Callable[[], None], clock: Clock) -> None:
        self._act = act
        self._clock = clock
        self._rate = Rate(HINTS_BURST, HINTS_A_SECOND)
        self._later: asyncio.TimerHandle | None = None

    def ask(self) -> None:
        """Have it done."""
        if self._rate.take(self._clock.monotonic()):
            self._act()
        elif self._later is None:
            self._later = asyncio.get_running_loop().call_later(LATER_S, self._do_later)

    def cancel(self) -> None:
        """Do no more what was put off."""
        if self._later is not None:
            self._later.cancel()

    def _do_later(self) -> None:
        self._later = None
        self._act()
