"""Lists in pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

from fastapi import Query

from app.api.requests import INTEGER_MAX

Limit = Annotated[int, Query(ge=1, le=1000, description="how many items at most")]
Cursor = Annotated[str | None, Query(description="`next` of the page before")]
NumberCursor = Annotated[int | None, Query(ge=0, le=INTEGER_MAX, description="`next` of the page before")]

Item = TypeVar("Item")
Key = TypeVar("Key", str, int)


def page(
    items: Sequence[Item], key: Callable[[Item], Key], *, after: Key | None, limit: int
) -> tuple[Sequence[Item], str | None]:
    """Up to `limit` of the items whose key is above `after`, in the order of their keys, and the next cursor."""
    rest = sorted((item for item in items if after is None or key(item) > after), key=key)
    return rest[:limit], str(key(rest[limit - 1])) if len(rest) > limit else None
