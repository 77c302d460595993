"""Which rows of the job's table the tests have taken, and where each has led.

`conftest` wraps the table while the tests run. A row leads to each of the states that it names at least once, and a row
that may refuse has refused, before it counts as covered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from app.core.errors import Refused
from app.core.job import Job
from app.core.machine import table
from app.core.machine.inputs import Input
from app.core.machine.step import Step
from app.core.machine.table import Row
from app.core.states import State

Pair = tuple[State, type[Input]]

TAKEN: set[tuple[Pair, State | None]] = set()
"""What was seen: the pair, and the state that its row led to; None where it refused."""


def recording(rows: Mapping[Pair, Row]) -> dict[Pair, Row]:
    """The same rows, each of which notes where it leads."""
    return {pair: replace(row, handler=_noting(pair, row)) for pair, row in rows.items()}


def _noting(pair: Pair, row: Row) -> table.Handler:
    def handler(job: Job, event: Input, now: int) -> Step:
        try:
            following = row.handler(job, event, now)
        except Refused:
            TAKEN.add((pair, None))
            raise
        TAKEN.add((pair, following.job.state))
        return following

    return handler


def wanted(rows: Mapping[Pair, Row]) -> set[tuple[Pair, State | None]]:
    """All that there is to take."""
    leads: set[tuple[Pair, State | None]] = {(pair, state) for pair, row in rows.items() for state in row.leads_to}
    return leads | {(pair, None) for pair, row in rows.items() if not row.leads_to}


def report(rows: Mapping[Pair, Row]) -> tuple[str, list[str]]:
    """The coverage of the table in one line, and what is missing."""
    todo = wanted(rows)
    missing = sorted(f"{state} + {event.__name__} -> {end or 'refused'}" for (state, event), end in todo - TAKEN)
    taken = len(todo) - len(missing)
    return f"rows of the job's table: {len(rows)}; ends taken: {taken} of {len(todo)}", missing
