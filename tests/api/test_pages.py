"""Pages of lists: which part of a list a page has, and how it is written."""

from __future__ import annotations

import json

import pytest

from app.api.pages import cut_page, page_response


def test_pages_follow_each_other() -> None:
    """A client that follows the cursors gets every item once, in the order of the keys; the last page has none."""
    names = ["d", "b", "a", "e", "c"]
    first = cut_page(names, str, after=None, limit=2)
    second = cut_page(names, str, after="b", limit=2)
    third = cut_page(names, str, after="d", limit=2)
    assert [first, second, third] == [(["a", "b"], "b"), (["c", "d"], "d"), (["e"], None)]


def test_a_page_that_takes_the_rest_is_the_last() -> None:
    """No cursor leads to an empty page."""
    assert cut_page([2, 1], int, after=None, limit=2) == ([1, 2], None)
    assert cut_page([2, 1], int, after=2, limit=2) == ([], None)


def test_items_go_in_word_for_word() -> None:
    """A stored text is not parsed and written anew."""
    response = page_response(['{"a":  1}', '{"b": 1e3}'], None)
    assert response.body == b'{"items":[{"a":  1},{"b": 1e3}],"next":null}'
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("cursor", [0, 7, "web1", 'a "quoted" name', "back\\slash", "é\n\x7f"])
def test_cursors_are_texts(cursor: int | str) -> None:
    """Whatever the key of an item is, its cursor is a text that comes back as it was."""
    assert json.loads(bytes(page_response([], cursor).body)) == {"items": [], "next": str(cursor)}
