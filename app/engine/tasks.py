"""The service's own tasks: each is started here, so that one that dies is noticed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

import structlog

log = structlog.get_logger(__name__)


class Tasks:
    """Every task that is to live, by name. A task that ends by an exception is `died` until its successor starts."""

    def __init__(self) -> None:
        self._died: dict[str, str] = {}
        self._running: dict[str, asyncio.Task[None]] = {}

    @property
    def died(self) -> Mapping[str, str]:
        """The tasks that have died and run no more, each with its last words."""
        return self._died

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` as the task of that name."""
        task = asyncio.create_task(work, name=name)
        self._running[name] = task
        self._died.pop(name, None)
        task.add_done_callback(self._ended)
        return task

    def note_death(self, name: str, error: BaseException) -> None:
        """A task has met an error that nobody foresaw; whoever catches it says so, and brings it back."""
        log.error("task died", task=name, exc_info=error)
        self._died[name] = repr(error)

    def _ended(self, task: asyncio.Task[None]) -> None:
        name = task.get_name()
        if self._running.get(name) is task:
            del self._running[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            self.note_death(name, error)
