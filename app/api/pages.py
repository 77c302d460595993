"""Lists in pages: what a request asks for, and the answer that carries it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, TypeVar

from fastapi import Query, Response

from app.api.requests import INTEGER_MAX

Limit = Annotated[int, Query(ge=1, le=1000, description="how many items at most")]
Cursor = Annotated[str | None, Query(description="`next` of the page before")]
NumberCursor = Annotated[int | None, Query(ge=0, le=INTEGER_MAX, description="`next` of the page before")]

Item = TypeVar("Item")
Key = TypeVar("Key", str, int)


def cut_page(
    items: Sequence[Item], key: Callable[[Item], Key], *, after: Key | None, limit: int
) -> tuple[Sequence[Item], str | None]:
    """Up to `limit` of the items whose key is above `after`, in the order of their keys, and the next cursor."""
    rest = sorted((item for item in items if after is None or key(item) > after), key=key)
    return rest[:limit], str(key(rest[limit - 1])) if len(rest) > limit else None


def page_response(items: Iterable[str], cursor: int | str | None) -> Response:
    """The answer that carries a page; `cursor` leads to the next page, and is None for the last page.

    Each item is a JSON text and goes in word for word, so that stored and cached texts are used as they are.
    """
    following = "null" if cursor is None else json.dumps(str(cursor), ensure_ascii=False)
    return Response(f'{{"items":[{",".join(items)}],"next":{following}}}', media_type="application/json")
