"""Defects that the simulator has found: those that the engine still has, and those that mutants bring back.

`KNOWN` lists what today's engine does wrong, each with a seed that shows it. Once a defect is mended its test fails:
then take the entry out of `KNOWN`, and put it into `MUTANTS` with a `mutant` that brings the defect back, found anew by
`python -m tests.engine.simulation --find NAME`. So the simulator's ability to find it stays tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tests.engine.simulation.engine import Mutant
from tests.engine.simulation.hazards import BOUNDS, NONE, Bounds, Hazards
from tests.engine.simulation.mutants import (
    GREEDY,
    HASTY,
    NODES_KEPT,
    PLAIN,
    UNFLUSHED,
    UNLOCKED,
    USES_FORGOTTEN,
)
from tests.engine.simulation.run import STEPS, Outcome, simulate


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """A defect: what has to be allowed for it to show, the seed that shows it, and the invariants that fail."""

    name: str
    hazards: Hazards
    seed: int
    invariants: frozenset[str]
    steps: int = STEPS
    bounds: Bounds = BOUNDS
    mutant: Mutant | None = None

    def shown_by(self, seed: int) -> Outcome | None:
        """The run of that seed, if it shows the defect."""
        outcome = simulate(seed, self.hazards, steps=self.steps, mutant=self.mutant, bounds=self.bounds)
        found = outcome.violation
        return outcome if found is not None and found.invariant in self.invariants else None


KNOWN: Final[tuple[Defect, ...]] = ()

MUTANTS: Final = (
    Defect(
        name="two-actors",
        hazards=NONE.also("double_put"),
        seed=0,
        invariants=frozenset({"one_actor_for_a_domain"}),
        mutant=UNLOCKED,
    ),
    Defect(
        name="put-and-delete",
        hazards=NONE.also("put_and_delete"),
        seed=0,
        invariants=frozenset({"no_task_has_died"}),
        mutant=UNLOCKED,
    ),
    Defect(
        name="job-lost-by-delete",
        hazards=NONE.also("delete_while_planning"),
        seed=0,
        invariants=frozenset({"jobs_end"}),
        mutant=HASTY,
    ),
    Defect(
        name="ready-unseen-under-reads",
        hazards=NONE.also("read_streams"),
        seed=1,
        invariants=frozenset({"ready_jobs_are_looked_at"}),
        bounds=Bounds(after_trouble_s=2),
        mutant=GREEDY,
    ),
    Defect(
        name="ready-unseen-while-files-hang",
        hazards=NONE.also("long_hangs"),
        seed=1890,
        invariants=frozenset({"ready_jobs_are_looked_at"}),
        mutant=PLAIN,
    ),
    Defect(
        name="base-not-flushed",
        hazards=NONE,
        seed=0,
        invariants=frozenset({"guests_read_their_data"}),
        mutant=UNFLUSHED,
    ),
    Defect(
        name="nodes-kept",
        hazards=NONE,
        seed=0,
        invariants=frozenset({"nodes_are_released"}),
        mutant=NODES_KEPT,
    ),
    Defect(
        name="base-of-a-machine-that-is-off",
        hazards=NONE.also("gone_sharers"),
        seed=4,
        invariants=frozenset({"guests_read_their_data"}),
        mutant=USES_FORGOTTEN,
    ),
)
"""Defects that the engine does not have, or has no more, each with the mutant that brings it back."""


def find(defect: Defect, *, start: int = 0, tries: int = 3000) -> Outcome | None:
    """The first seed from `start` on that shows the defect."""
    for seed in range(start, start + tries):
        outcome = defect.shown_by(seed)
        if outcome is not None:
            return outcome
    return None
