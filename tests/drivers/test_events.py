"""What is taken from events: hints, and how jobs ended; whatever a peer sends instead is dropped."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs

from app.core.errors import CANCELED
from app.core.job import Progress
from app.core.machine.inputs import Observed
from app.drivers.qmp.events import FINAL_REPORTS_MAX, HINTS, STOPS, QmpEvents
from app.engine.ports.driver import Address

ENDED: dict[str, Any] = {"device": "bj-1", "len": 8, "offset": 5, "speed": 0, "type": "commit"}


class Taken:
    """A connection's events, and how many hints there were."""

    def __init__(self) -> None:
        self.hints = 0
        self.events = QmpEvents(Address(unix="/run/vm.qmp"), self._hint)

    def _hint(self) -> None:
        self.hints += 1


@pytest.fixture
def taken() -> Taken:
    """No event so far."""
    return Taken()


def test_ends_of_jobs(taken: Taken) -> None:
    """How a job ended is kept, with QEMU's words if it failed, and each end is a hint."""
    taken.events.take("BLOCK_JOB_COMPLETED", ENDED)
    taken.events.take("BLOCK_JOB_COMPLETED", ENDED | {"device": "bj-2", "error": "No space left on device"})
    taken.events.take("BLOCK_JOB_CANCELLED", ENDED | {"device": "bj-3"})
    progress = Progress(current=5, end=8)
    assert taken.events.final_reports == {
        "bj-1": Observed(status="concluded", progress=progress),
        "bj-2": Observed(status="concluded", progress=progress, error="No space left on device"),
        "bj-3": Observed(status="concluded", progress=progress, error=CANCELED),
    }
    assert taken.hints == 3


def test_the_last_ends_are_kept(taken: Taken) -> None:
    """However many jobs end, no more than the last of them are kept."""
    for number in range(FINAL_REPORTS_MAX + 10):
        taken.events.take("BLOCK_JOB_COMPLETED", ENDED | {"device": f"bj-{number}"})
    assert list(taken.events.final_reports) == [f"bj-{number}" for number in range(10, FINAL_REPORTS_MAX + 10)]


def test_hints(taken: Taken) -> None:
    """Only what may need something done is a hint."""
    for status in ("created", "running", "waiting", "aborting", "of QEMU 99"):
        taken.events.take("JOB_STATUS_CHANGE", {"id": "bj-1", "status": status})
    for name in ("BLOCK_JOB_ERROR", "NEVER_HEARD_OF", ""):
        taken.events.take(name, {"device": "bj-1"})
    assert taken.hints == 0
    for status in STOPS:
        taken.events.take("JOB_STATUS_CHANGE", {"id": "bj-1", "status": status})
    for name in HINTS - {"BLOCK_JOB_CANCELLED", "BLOCK_JOB_COMPLETED"}:
        taken.events.take(name, None)
    assert taken.hints == len(STOPS) + len(HINTS) - 2


def test_malformed_events_are_dropped(taken: Taken) -> None:
    """An event of another shape changes nothing, and the first of a connection is told to the log, with its monitor."""
    malformed: list[tuple[object, object]] = [
        ("BLOCK_JOB_COMPLETED", ENDED | {"len": -1}),
        ("BLOCK_JOB_COMPLETED", ENDED | {"device": "x" * 2000}),
        ("BLOCK_JOB_CANCELLED", None),
        ("JOB_STATUS_CHANGE", {"id": "bj-1"}),
        ([], {}),
        (7, ENDED),
    ]
    with capture_logs() as logged:
        for name, data in malformed * 2:
            taken.events.take(name, data)
        taken.events.take("BLOCK_JOB_COMPLETED", ENDED)
        other = Taken()
        other.events.take(*malformed[-1])
    assert (taken.hints, list(taken.events.final_reports)) == (1, ["bj-1"])
    assert [entry["reason"] for entry in logged] == [
        "BLOCK_JOB_COMPLETED: len: not between 0 and 9223372036854775807",
        "event: expected a string",
    ]
    assert {(entry["event"], entry["log_level"], entry["monitor"]) for entry in logged} == {
        ("malformed event", "warning", "/run/vm.qmp")
    }
