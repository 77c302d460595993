"""Work that may block for ever, done in threads that nobody has to wait for.

A file system that hangs (a server that is gone, a FUSE daemon that is stopped) holds a thread for as long as it likes.
So whoever waits has a deadline, the threads are not joined at the end of the process, and a domain that has hung
threads gets no more than a few.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, TypeVar

T = TypeVar("T")

HUNG_MAX: Final = 4
"""How many pieces of work of one owner may be overdue; beyond that its work is not even begun."""


class Overdue(TimeoutError):
    """The work has not ended in time, or was not begun as earlier work has not: nothing is known of what was asked."""


class Workers:
    """Daemon threads, as many as there is work at a time."""

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._overdue: Counter[object] = Counter()

    async def do(
        self, work: Callable[..., T], *arguments: Any, within: float, owner: object = None, most: int = HUNG_MAX
    ) -> T:
        """What `work` returns or raises; raises `Overdue` after that many seconds.

        `owner` is whom it is for, `most` how much of its work may be overdue.
        """
        if self._overdue[owner] >= most:
            raise Overdue("earlier looks at these files have not ended")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        answer.add_done_callback(_retrieve)

        def run() -> None:
            tell = _attempt(work, arguments)
            try:
                loop.call_soon_threadsafe(tell, answer)
            except RuntimeError:
                # The loop has been closed: nobody waits any more.
                return

        self._begin(run)
        done, _ = await asyncio.wait([answer], timeout=within)
        if done:
            return answer.result()
        self._overdue[owner] += 1
        answer.add_done_callback(lambda _done: self._over(owner))
        raise Overdue(f"the files have not answered for {within:.0f} s")

    def _over(self, owner: object) -> None:
        self._overdue[owner] -= 1
        if not self._overdue[owner]:
            del self._overdue[owner]

    def _begin(self, run: Callable[[], None]) -> None:
        with self._lock:
            spare = self._idle > 0
            if spare:
                self._idle -= 1
        self._work.put(run)
        if not spare:
            threading.Thread(target=self._serve, name="files", daemon=True).start()

    def _serve(self) -> None:
        while True:
            self._work.get()()
            with self._lock:
                self._idle += 1


def _attempt(work: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[[asyncio.Future[Any]], None]:
    """What tells a future how the work has ended."""
    try:
        result = work(*arguments)
    except BaseException as raised:  # noqa: BLE001 - it is raised where the work is waited for
        error = raised
        return lambda answer: None if answer.done() else answer.set_exception(error)
    return lambda answer: None if answer.done() else answer.set_result(result)


def _retrieve(answer: asyncio.Future[Any]) -> None:
    """Look at an error for which nobody waits any more, so that nobody is warned of it."""
    if not answer.cancelled():
        answer.exception()
