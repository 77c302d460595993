"""How many jobs run at a time, and who is next."""

from __future__ import annotations

from app.engine.budget import Budget


def nothing() -> None:
    """Nobody waits for this grant."""


def test_places_are_given_until_there_are_none() -> None:
    """As many jobs as there are places run at once; the next one waits."""
    budget = Budget(2)
    assert budget.claim("a", nothing)
    assert budget.claim("b", nothing)
    assert not budget.claim("c", nothing)


def test_the_one_who_waited_longest_is_next() -> None:
    """A place that becomes free goes to the first in the queue, who is told."""
    budget = Budget(1)
    told: list[str] = []
    assert budget.claim("a", nothing)
    assert not budget.claim("b", lambda: told.append("b"))
    assert not budget.claim("c", lambda: told.append("c"))
    budget.leave("a")
    assert told == ["b"]
    assert budget.claim("b", nothing)
    assert not budget.claim("c", nothing)


def test_nobody_overtakes() -> None:
    """A newcomer does not get a place before one who waits, and who is told of no grant has not been granted one."""
    budget = Budget(1)
    told: list[str] = []
    budget.occupy("running")
    assert not budget.claim("first", lambda: told.append("first"))
    budget.leave("running")
    assert not budget.claim("late", lambda: told.append("late"))
    assert told == ["first"]


def test_one_who_leaves_the_queue_is_passed_over() -> None:
    """A job that was canceled while it waited, or whose domain went away, does not get a place."""
    budget = Budget(1)
    told: list[str] = []
    assert budget.claim("a", nothing)
    assert not budget.claim("b", lambda: told.append("b"))
    assert not budget.claim("c", lambda: told.append("c"))
    budget.leave("b")
    budget.leave("a")
    assert told == ["c"]


def test_jobs_found_at_start_count_beyond_the_limit() -> None:
    """After a restart with a smaller limit, running jobs keep their places and new ones wait for all of them."""
    budget = Budget(1)
    budget.occupy("a")
    budget.occupy("b")
    assert not budget.claim("c", nothing)
    budget.leave("a")
    assert not budget.claim("c", nothing)
    budget.leave("b")
    assert budget.claim("c", nothing)
