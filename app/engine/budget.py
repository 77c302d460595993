"""How many jobs run at a time on this host, and who is next."""

from __future__ import annotations

from collections.abc import Callable


class Budget:
    """Places for running jobs, given in the order in which they were asked for."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._running: set[str] = set()
        self._waiting: dict[str, Callable[[], None]] = {}

    def claim(self, job_id: str, granted: Callable[[], None]) -> bool:
        """Whether the job has a place; if not, it waits, and `granted` is called when it gets one."""
        if job_id in self._running:
            return True
        self._waiting.setdefault(job_id, granted)
        self._fill(quiet=job_id)
        return job_id in self._running

    def occupy(self, job_id: str) -> None:
        """Count a job that runs already, also beyond the number of places."""
        self._running.add(job_id)

    def leave(self, job_id: str) -> None:
        """Give the place, or the place in the queue, to others; one who has neither does no harm."""
        self._running.discard(job_id)
        self._waiting.pop(job_id, None)
        self._fill()

    def _fill(self, quiet: str | None = None) -> None:
        while self._waiting and len(self._running) < self._places:
            job_id = next(iter(self._waiting))
            granted = self._waiting.pop(job_id)
            self._running.add(job_id)
            if job_id != quiet:
                granted()
