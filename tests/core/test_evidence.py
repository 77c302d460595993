from __future__ import annotations

from dataclasses import replace

import pytest

from app.core.evidence import Process, same_process
from app.core.sameness import Sameness
from tests.core.samples import PROCESS


@pytest.mark.parametrize(
    ("other", "sameness"),
    [
        (PROCESS, Sameness.SAME),
        (None, Sameness.UNKNOWN),
        (Process(pid=None, started=None, uuid=None), Sameness.UNKNOWN),
        (Process(pid=None, started=None, uuid=PROCESS.uuid), Sameness.UNKNOWN),
        (replace(PROCESS, started=None), Sameness.UNKNOWN),
        (replace(PROCESS, pid=1), Sameness.OTHER),
        (replace(PROCESS, started=1), Sameness.OTHER),
        (replace(PROCESS, uuid="other"), Sameness.OTHER),
        (replace(PROCESS, uuid=None), Sameness.SAME),
        (replace(PROCESS, uuid=None, pid=1), Sameness.OTHER),
    ],
)
def test_which_process_is_the_same(other: Process | None, sameness: Sameness) -> None:
    """A pid, start time or uuid that both sides know and that differs tells processes apart, either way round.

    Only pid and start time together say that it is the same one: a uuid is that of the domain, not of the process.
    """
    assert same_process(PROCESS, other) is sameness
    assert same_process(other, PROCESS) is sameness


def test_numbers_hold_in_one_view_only() -> None:
    """A pid means something else in another pid namespace; after a boot of the same machine no process is left."""
    here = replace(PROCESS, view="machine/boot/1")
    assert same_process(here, here) is Sameness.SAME
    assert same_process(here, replace(PROCESS, view=None)) is Sameness.SAME
    elsewhere = replace(PROCESS, pid=7, view="machine/boot/2")
    assert same_process(here, elsewhere) is Sameness.UNKNOWN
    assert same_process(here, replace(elsewhere, uuid="another")) is Sameness.OTHER
    assert same_process(here, replace(PROCESS, view="machine/next boot/1")) is Sameness.OTHER
    for machine in ("another machine", ""):
        assert same_process(here, replace(PROCESS, view=f"{machine}/next boot/1")) is Sameness.UNKNOWN
    assert same_process(replace(here, view="/boot/1"), replace(here, view="/next boot/1")) is Sameness.UNKNOWN
