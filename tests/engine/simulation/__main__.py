"""`python -m tests.engine.simulation --seeds 1000`: many runs; `--find NAME`: a seed that shows a known defect."""

# ruff: noqa: T201 - it prints what it finds

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from tests.engine.simulation.hazards import DEFAULT, NONE, Hazards
from tests.engine.simulation.known import KNOWN, MUTANTS, find
from tests.engine.simulation.run import STEPS, Outcome, simulate

CHUNK = 25
"""Seeds that a process runs at a time."""

LINES = 80
"""Lines of the trace that are shown of one run."""


def run_some(seeds: range, *, hazards: Hazards, steps: int) -> tuple[int, float, Counter[str], list[tuple[int, str]]]:
    """Run seeds: the steps, the seconds of processor time, what happened how often, and what went wrong."""
    began, done = time.process_time(), 0
    counts: Counter[str] = Counter()
    wrong: list[tuple[int, str]] = []
    gc.disable()
    for seed in seeds:
        outcome = simulate(seed, hazards, steps=steps)
        done += outcome.steps
        counts += outcome.counts
        if outcome.violation is not None:
            wrong.append((seed, str(outcome.violation)))
    gc.enable()
    gc.collect()
    return done, time.process_time() - began, counts, wrong


def hazards_of(text: str) -> Hazards:
    """`default`, `none`, or names with `+` or `-` before them, as in `default,+double_put,-kills` or `none,+kills`."""
    hazards = DEFAULT
    for name in text.split(","):
        if name in ("default", "none"):
            hazards = DEFAULT if name == "default" else NONE
        elif name.startswith("-"):
            hazards = hazards.without(name[1:])
        else:
            hazards = hazards.also(name.removeprefix("+"))
    return hazards


def show(outcome: Outcome, lines: int) -> None:
    """Print a run."""
    print(outcome.trace.tail(lines))
    print(f"seed {outcome.seed}: {outcome.violation or 'no violation'}")


def run_many(seeds: int, hazards: Hazards, steps: int, jobs: int) -> int:
    """Run many seeds and print what came of it; the number of violations."""
    began, done, spent = time.monotonic(), 0, 0.0
    counts: Counter[str] = Counter()
    wrong: list[tuple[int, str]] = []
    chunks = [range(start, min(start + CHUNK, seeds)) for start in range(0, seeds, CHUNK)]
    with ProcessPoolExecutor(jobs) as pool:
        for more, seconds, counted, violations in pool.map(partial(run_some, hazards=hazards, steps=steps), chunks):
            done, spent = done + more, spent + seconds
            counts += counted
            wrong += violations
    took = time.monotonic() - began
    for what, number in sorted(counts.items()):
        print(f"{number:9,} {what}")
    for seed, text in wrong:
        print(f"seed {seed}: {text}")
    print(
        f"{seeds:,} seeds, {done:,} steps in {took:.0f} s: {seeds / took:.1f} seeds/s, {done / took:,.0f} steps/s "
        f"({seeds / spent:.1f} seeds for each second of a processor); {len(wrong)} violations"
    )
    return len(wrong)


def main() -> int:
    """Run what the arguments say; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.engine.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds to run, from 0 on")
    parser.add_argument("--seed", type=int, help="run this one, and show its trace")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--hazards", type=hazards_of, default=DEFAULT, help="default, none, +name, -name")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--lines", type=int, default=LINES, help="of a trace")
    parser.add_argument("--find", metavar="NAME", help="search a seed that shows this known defect")
    arguments = parser.parse_args()
    if arguments.find is not None:
        defects = [each for each in (*KNOWN, *MUTANTS) if arguments.find in (each.name, "all")]
        for defect in defects:
            began = time.monotonic()
            found = find(defect)
            if found is not None and len(defects) == 1:
                show(found, arguments.lines)
            seed = "no seed" if found is None else f"seed {found.seed}"
            print(f"{defect.name}: {seed}, after {time.monotonic() - began:.0f} s", flush=True)
        return 0 if defects else 2
    if arguments.seed is not None:
        outcome = simulate(arguments.seed, arguments.hazards, steps=arguments.steps)
        show(outcome, arguments.lines)
        return 1 if outcome.violation else 0
    return 1 if run_many(arguments.seeds, arguments.hazards, arguments.steps, arguments.jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
