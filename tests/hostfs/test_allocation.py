"""How much of a merge is new to the base, by arithmetic on the images' maps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from app.hostfs.allocation import new_bytes, whole

Ranges = list[tuple[int, int]]


@st.composite
def ranges(draw: st.DrawFn) -> Ranges:
    """Byte ranges in rising order that don't overlap, as an image's map gives them."""
    ends = draw(st.lists(st.integers(0, 200), max_size=20, unique=True).map(sorted))
    return list(zip(ends[::2], ends[1::2], strict=False))


def touched(wanted: Ranges, cluster: int) -> set[int]:
    """The numbers of the clusters that the ranges touch."""
    return {byte // cluster for start, end in wanted for byte in range(start, end)}


@given(copied=ranges(), taken=ranges(), cluster=st.sampled_from([1, 2, 7, 16]))
def test_new_bytes(copied: Ranges, taken: Ranges, cluster: int) -> None:
    """New are the clusters that the merge touches and the base does not hold: no more and no less."""
    new = touched(copied, cluster) - touched(taken, cluster)
    assert new_bytes(copied, taken, cluster) == len(new) * cluster


@given(taken=ranges(), cluster=st.sampled_from([1, 2, 7, 16]), end=st.integers(200, 220))
def test_whole(taken: Ranges, cluster: int, end: int) -> None:
    """Held are the clusters of which no byte is a hole; beyond the image's end there is nothing to hold."""
    taken = [*taken, (200, end)] if end > 200 else taken
    there = {byte for start, stop in taken for byte in range(start, stop)}
    merged = whole(taken, cluster, end)
    held = touched(merged, cluster)
    apart = {each for start, stop in taken for each in touched([(start, stop)], cluster)}
    assert held <= apart
    for number in held:
        assert {byte for byte in range(number * cluster, (number + 1) * cluster) if byte < end} <= there
