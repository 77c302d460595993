"""Every step of every kind of job, done twice, failing, and being the last one of the service."""

from __future__ import annotations

import pytest

from app.core.kinds import KINDS
from app.core.kinds.commit import CommitSpec
from app.core.states import Intent, State
from tests.engine.simulation.every_step import SCENARIOS, Scenario, Wrong, play

ALL = [scenario for scenarios in SCENARIOS.values() for scenario in scenarios]


def test_each_kind_has_scenarios() -> None:
    """No kind of job is left out."""
    assert all(SCENARIOS.get(kind) for kind in KINDS)


# Whoever has made the nodes, the calls are the same; only what is to be released is not.
@pytest.mark.parametrize(("wrong", "blockdev"), [*((wrong, True) for wrong in Wrong), (Wrong.KILLED_AFTER, False)])
@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.name)
def test_the_outcome_is_right_whatever_step_goes_wrong(scenario: Scenario, wrong: Wrong, *, blockdev: bool) -> None:
    """At whichever call it happens: the job ends as asked for, the data is right, and nothing is left behind."""
    calls = play(scenario, blockdev=blockdev).calls
    assert calls > 10
    for at in range(1, 2 if wrong is Wrong.NOTHING else calls + 1):
        played = play(scenario, at, wrong, blockdev=blockdev)
        where = f"{scenario.name}, {wrong.value} at call {at} ({played.name})\n{played.trace}"
        assert played.violation is None, f"{played.violation}\n{where}"
        assert played.jobs, where
        job = played.jobs[-1]
        assert job.state is scenario.state, f"{job.state}: {job.error}\n{where}"
        merged = played.truth.get(job.id) == "merged"
        assert merged is scenario.merges, where
        assert merged or job.state is State.CANCELED or job.control.intent is Intent.KEEP, where
        assert job.result is not None, where
        assert set(played.deleted) == {file for each in played.jobs if each.result for file in each.result.deleted}, (
            where
        )
        deletes = set(job.spec.deletes) if isinstance(job.spec, CommitSpec) else set[str]()
        assert deletes <= {*job.result.deleted, *(kept.file for kept in job.result.not_deleted)}, where
