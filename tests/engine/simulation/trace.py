"""What happened in a run, as text and as counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable


class Violation(AssertionError):
    """An invariant does not hold. `invariant` is its name."""

    def __init__(self, invariant: str, detail: str) -> None:
        super().__init__(f"{invariant}: {detail}")
        self.invariant = invariant
        self.detail = detail


class Trace:
    """The lines of a run, each with its virtual time, and how often each kind of thing happened."""

    def __init__(self, time: Callable[[], float]) -> None:
        self.lines: list[str] = []
        self.counts: Counter[str] = Counter()
        self.busiest: Counter[str] = Counter()
        self._second: int = 0
        self._calls: Counter[str] = Counter()
        self._time = time

    def note(self, what: str, detail: str = "", *, count: bool = True) -> None:
        """Something happened; `what` is its kind, which is counted."""
        self.lines.append(f"{self._time():10.3f} {what}{' ' if detail else ''}{detail}")
        if count:
            self.counts[what] += 1

    def note_call(self, what: str, kind: str = "calls") -> None:
        """A port was called; `busiest` is how many calls of a kind there were in one second at most."""
        self.counts[f"call: {what}"] += 1
        second: int = int(self._time())
        if second != self._second:
            self._second = second
            self._calls.clear()
        self._calls[kind] += 1
        self.busiest[kind] = max(self.busiest[kind], self._calls[kind])

    def tail(self, lines: int = 60) -> str:
        """The last lines."""
        return "\n".join(self.lines[-lines:])
