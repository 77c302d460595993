from __future__ import annotations

from app.core.job import Progress
from app.core.progress import Meter


def test_one_sample_tells_no_rate() -> None:
    """The first look shows how far the job is, and nothing of its speed."""
    _, seen = Meter().measure(Progress(current=10, end=100), 5.0)
    assert seen == Progress(current=10, end=100, rate=0, eta=None)


def test_the_rate_and_the_time_left() -> None:
    """Two looks a second apart give bytes a second, and what is left at that speed in seconds."""
    meter, _ = Meter().measure(Progress(current=0, end=300), 1.0)
    meter, seen = meter.measure(Progress(current=100, end=300), 2.0)
    assert (seen.rate, seen.eta) == (100, 2.0)
    _, seen = meter.measure(Progress(current=300, end=300), 3.0)
    assert (seen.rate, seen.eta) == (150, 0.0)


def test_only_the_last_seconds_count() -> None:
    """A speed of long ago is forgotten, so that a new limit shows soon."""
    meter, _ = Meter().measure(Progress(current=0, end=10_000), 0.0)
    meter, _ = meter.measure(Progress(current=5_000, end=10_000), 10.0)
    _, seen = meter.measure(Progress(current=5_010, end=10_000), 11.0)
    assert seen.rate == 10


def test_a_stalled_job_has_no_end() -> None:
    """Without progress the time left is unknown, not endless."""
    meter, _ = Meter().measure(Progress(current=5, end=10), 1.0)
    _, seen = meter.measure(Progress(current=5, end=10), 2.0)
    assert (seen.rate, seen.eta) == (0, None)


def test_a_job_that_starts_over_is_measured_anew() -> None:
    """Progress that falls back is no negative speed, and two looks at the same instant no infinite one."""
    meter, _ = Meter().measure(Progress(current=50, end=100), 1.0)
    meter, seen = meter.measure(Progress(current=10, end=100), 2.0)
    assert seen.rate == 0
    _, seen = meter.measure(Progress(current=20, end=100), 2.0)
    assert seen.rate == 0


def test_an_end_that_is_passed_already() -> None:
    """QEMU's end may lag behind what is done; then nobody can say how long it takes."""
    meter, _ = Meter().measure(Progress(current=0, end=10), 1.0)
    _, seen = meter.measure(Progress(current=20, end=10), 2.0)
    assert (seen.rate, seen.eta) == (20, None)
