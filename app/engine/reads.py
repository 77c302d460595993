"""Reads that many ask for at the same time, done once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class SharedReads:
    """One read for all who ask for the same thing before it begins; who asks later gets a later one.

    So nobody gets what was read before the question, and clients that read without a pause cost no more than one.
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, _Read[Any]] = {}

    async def do(self, key: Hashable, begin: Callable[[Callable[[], None]], Awaitable[T]]) -> T:
        """What the read gives, or raises. `begin` gets a function that it calls when the read really begins."""
        found = self._waiting.get(key)
        if found is None:
            found = self._waiting[key] = _Read[T](lambda read: self._begun(key, read), begin)
        # A client that leaves takes nothing from the others.
        return await asyncio.shield(found.answer)

    def _begun(self, key: Hashable, read: _Read[Any]) -> None:
        if self._waiting.get(key) is read:
            del self._waiting[key]


class _Read(Generic[T]):
    """A read, whose answer is told by a future: an error is for those who ask, and no fault of the task."""

    def __init__(self, begun: Callable[[_Read[T]], None], begin: Callable[[Callable[[], None]], Awaitable[T]]) -> None:
        self._begun = begun
        self.answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.answer.add_done_callback(_retrieve)
        self._task = asyncio.create_task(self._do(begin))

    async def _do(self, begin: Callable[[Callable[[], None]], Awaitable[T]]) -> None:
        try:
            found = await begin(lambda: self._begun(self))
        except Exception as error:  # noqa: BLE001 - it is raised where the answer is waited for
            self.answer.set_exception(error)
        except BaseException:
            self.answer.cancel()
            raise
        else:
            self.answer.set_result(found)
        finally:
            self._begun(self)


def _retrieve(answer: asyncio.Future[Any]) -> None:
    """Look at an error for which nobody waits any more, so that nobody is warned of it."""
    if not answer.cancelled():
        answer.exception()
