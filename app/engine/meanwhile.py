"""How those who ask files wait for an answer: a file system may take its time, or hang."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Meanwhile(Protocol):
    """How a request waits for what files answer."""

    async def __call__(self, asked: Awaitable[T], /) -> T:
        """What `asked` returns or raises."""
        ...


async def plainly(asked: Awaitable[T], /) -> T:
    """Wait, and do nothing else: for those who are in the middle of a look already."""
    return await asked
