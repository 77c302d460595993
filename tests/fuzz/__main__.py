"""`python -m tests.fuzz` asks a real service with real QEMUs for anything; exit status 1 where an answer is wrong."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.fuzz.run import Fuzz
from tests.fuzz.world import World


def main() -> int:
    """Fuzz, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000, help="how many at least")
    parser.add_argument("--seed", type=int, default=1, help="what the requests are made from")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="blockjobd-fuzz-") as folder, World(Path(folder), arguments.seed) as world:
        report = Fuzz(world, arguments.seed).run(arguments.requests)
    print(report.table(), f"seed: {arguments.seed}", sep="\n")  # noqa: T201
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
