"""`python -m tests.torture --rounds N --seed S`."""

from __future__ import annotations

import argparse
import secrets
import signal
import sys

from tests.torture.campaign import campaign


def main() -> int:
    """Play the rounds, print the table; 1 if anything was not as it has to be."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--first", type=int, default=1, help="the number of the first round, to play one again")
    parser.add_argument("--seed", type=int, default=None)
    given = parser.parse_args()
    # However it is ended, nothing of what it has started stays behind, and the table tells of the rounds until then.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    seed = secrets.randbelow(1 << 32) if given.seed is None else given.seed
    return 1 if campaign(seed, given.rounds, first=given.first).violations else 0


if __name__ == "__main__":
    sys.exit(main())
