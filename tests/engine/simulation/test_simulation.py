"""A short simulation, and that it finds what it is there for."""

from __future__ import annotations

import pytest

from tests.engine.simulation.hazards import DEFAULT, NONE, Bounds
from tests.engine.simulation.known import KNOWN, MUTANTS, Defect
from tests.engine.simulation.run import simulate

SEEDS = 25


def test_nothing_goes_wrong_in_some_runs() -> None:
    """Under all troubles that the service has to cope with, every invariant holds after every step."""
    counts: dict[str, int] = {}
    for seed in range(SEEDS):
        outcome = simulate(seed, DEFAULT)
        assert outcome.violation is None, outcome.report()
        for what, number in outcome.counts.items():
            counts[what] = counts.get(what, 0) + number
    for what in ("job ended: completed", "job ended: failed", "job ended: canceled", "fault: lost", "QEMU killed"):
        assert counts.get(what), f"nothing was simulated: {what} never happened"


@pytest.mark.parametrize("seed", range(8))
def test_machines_that_share_a_base_and_are_off(seed: int) -> None:
    """What a machine needs that is off is not written to, over restarts and whatever else goes wrong."""
    outcome = simulate(seed, DEFAULT.also("gone_sharers"))
    assert outcome.violation is None, outcome.report()


@pytest.mark.parametrize("seed", [1, 7])
def test_the_same_seed_gives_the_same_run(seed: int) -> None:
    """A run can be repeated: its trace is the same in every line."""
    assert simulate(seed).trace.lines == simulate(seed).trace.lines


@pytest.mark.parametrize("defect", KNOWN, ids=lambda defect: defect.name)
def test_a_known_defect_is_found(defect: Defect) -> None:
    """A defect that the engine still has shows at its seed."""
    assert defect.shown_by(defect.seed) is not None, (
        f"{defect.name} does not show at seed {defect.seed} any more. Run `python -m tests.engine.simulation --find "
        f"{defect.name}`: where it finds a seed, the code has only changed its course, so put that seed into KNOWN. "
        "Where it finds none, the defect is mended: move the entry to MUTANTS, with a mutant that brings it back, and "
        "add its hazard to those that are on by default."
    )


@pytest.mark.parametrize("defect", MUTANTS, ids=lambda defect: defect.name)
def test_a_mutant_is_found(defect: Defect) -> None:
    """A defect that was mended shows where a mutant brings it back, and does not show without that."""
    assert defect.shown_by(defect.seed) is not None, f"the mutant {defect.name} is not found at seed {defect.seed}"
    assert simulate(defect.seed, defect.hazards, steps=defect.steps, bounds=defect.bounds).violation is None


@pytest.mark.parametrize("seed", [0, 9, 11, 12, 24, 27])
def test_nothing_is_asked_in_a_circle(seed: int) -> None:
    """A command without an effect yet, and a journal that is full, are tried again at the next poll, not at once."""
    calls = simulate(seed, NONE, bounds=Bounds(calls_a_second=150))
    assert calls.violation is None, calls.report()
    writes = simulate(seed, NONE.also("journal_full", "kills"), bounds=Bounds(failed_writes_a_second=50))
    assert writes.violation is None, writes.report()
