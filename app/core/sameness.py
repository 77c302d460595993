"""Whether two things are the same, where one of them may be unknown.

*Unknown is not no*, and it is not yes either. What could not be seen is never equal to anything, itself included.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TypeVar

T = TypeVar("T")


class Sameness(Enum):
    """The answer. It has no truth value, so that nobody takes `UNKNOWN` for a yes or a no by accident."""

    SAME = auto()
    OTHER = auto()
    UNKNOWN = auto()

    def __bool__(self) -> bool:
        """Raises TypeError: the caller says what `UNKNOWN` means to it."""
        raise TypeError("compare with Sameness.SAME, OTHER or UNKNOWN")


def same(one: T | None, other: T | None) -> Sameness:
    """Whether two values are equal; None is a value that nobody knows."""
    if one is None or other is None:
        return Sameness.UNKNOWN
    return Sameness.SAME if one == other else Sameness.OTHER
