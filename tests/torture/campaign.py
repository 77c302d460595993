"""Many rounds under one seed, and the table of what came of them."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.torture.plan import Hand, How, plan_round
from tests.torture.rounds import Rounds
from tests.torture.stage import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a campaign; `faults` are those done, by `How`."""

    violations: int
    faults: Mapping[str, int]
    outcomes: Mapping[str, int]


def campaign(seed: int, rounds: int, *, first: int = 1) -> Outcome:
    """Play the rounds and print the table; each violation is printed with all that it takes to understand it."""
    _say(f"torture: {rounds} rounds from {first} on, seed {seed}")
    began = time.monotonic()
    violations = done = 0
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        stage = Stage(Path(folder))
        played = Rounds(stage)
        try:
            for number in range(first, first + rounds):
                found, report = played.play(plan_round(seed, number))
                done += 1
                if found:
                    violations += len(found)
                    _say(f"\n===== round {number}, seed {seed}: {len(found)} violations", *found, indent="\n  - ")
                    _say(report())
                elif number % 20 == 0:
                    _say(f"round {number}: {time.monotonic() - began:.0f} s")
        except KeyboardInterrupt:
            _say(f"ended in round {first + done}")
        finally:
            stage.begin_round()
            stage.close()
        for trouble in stage.troubles:
            violations += 1
            _say(f"  - at the end: {trouble}")
    _table("faults", {how.value: stage.counts[how.value] for how in How})
    _table("other clients", {hand.value: stage.counts[hand.value] for hand in Hand})
    _table("moments hit", stage.moments)
    _table("answers to requests", played.answers)
    _table("outcomes", played.outcomes)
    _table(
        "all",
        {
            "rounds": done,
            "seed": seed,
            "faults": sum(stage.counts[how.value] for how in How),
            "restarts of the service": stage.counts["restarts of the service"],
            "starts that were killed": stage.counts["starts that were killed"],
            "domains over TCP": stage.counts["over TCP"],
            "domains with a neighbour on their base": stage.counts["with a neighbour"],
            "rounds without a view of processes": stage.counts["without a view"],
            "returns of the subscriber": stage.subscriber.returns,
            "requests": sum(played.answers.values()),
            "jobs": sum(played.outcomes.values()),
            "violations": violations,
            "seconds": int(time.monotonic() - began),
        },
    )
    return Outcome(
        violations=violations,
        faults={how.value: stage.counts[how.value] for how in How},
        outcomes=played.outcomes,
    )


def _say(*lines: str, indent: str = "\n") -> None:
    sys.stdout.write(indent.join(lines) + "\n")
    sys.stdout.flush()


def _table(title: str, rows: Mapping[str, int]) -> None:
    _say(f"\n{title}")
    for name, number in sorted(rows.items()) if title != "all" else rows.items():
        _say(f"  {name:<44} {number:>10}")
