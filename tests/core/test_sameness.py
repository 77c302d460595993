from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.sameness import Sameness, same

ANYTHING = st.one_of(st.none(), st.integers(0, 3))


@given(ANYTHING, ANYTHING)
def test_what_is_not_known_is_the_same_as_nothing(one: int | None, other: int | None) -> None:
    """Unknown is never equal to anything, to another unknown least of all; nor is it different from anything."""
    known = one is not None and other is not None
    assert (same(one, other) is Sameness.UNKNOWN) is not known
    if known:
        assert (same(one, other) is Sameness.SAME) is (one == other)


@pytest.mark.parametrize("answer", Sameness)
def test_an_answer_is_not_taken_for_a_yes(answer: Sameness) -> None:
    """Who asks has to say what `UNKNOWN` means."""
    with pytest.raises(TypeError, match="compare with"):
        bool(answer)
