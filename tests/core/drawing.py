"""The picture of the job's states, drawn from the table: `python -m tests.core.drawing` writes docs/job-states.md."""

from __future__ import annotations

from pathlib import Path

from app.core.machine.inputs import (
    Abort,
    Absent,
    Accepted,
    CleanedUp,
    Gathered,
    Gone,
    Input,
    Launch,
    Observed,
    Pause,
    Pivot,
    PivotDeclined,
    PivotTaken,
    Rejected,
    Resolve,
    Resume,
    SetSpeed,
)
from app.core.machine.table import TRANSITIONS
from app.core.states import ENDED, State

PAGE = Path(__file__).parents[2] / "docs" / "job-states.md"

HEAD = """# The states of a job

This page is made from the table in `app/core/machine/table.py` by `python -m tests.core.drawing`; a test compares them.
Rows that lead nowhere else are left out of the picture. Inputs in *italics* come from people, the others are reports of
QEMU and of our own commands.

"""

WORDS: dict[type[Input], str] = {
    Launch: "has its place",
    Accepted: "QEMU took the start",
    Rejected: "can't be started",
    Observed: "QEMU's status",
    Absent: "not listed",
    Gone: "QEMU has ended",
    Gathered: "evidence read",
    CleanedUp: "tidied up",
    PivotTaken: "QEMU took the pivot",
    PivotDeclined: "QEMU declined the pivot",
    Pivot: "*pivot*",
    Abort: "*abort*",
    Pause: "*pause*",
    Resume: "*resume*",
    SetSpeed: "*speed*",
    Resolve: "*resolve*",
}


def page() -> str:
    """The whole page: a picture, and the table in words."""
    moves: dict[tuple[State, State], list[str]] = {}
    for (state, event), row in TRANSITIONS.items():
        for end in row.leads_to - {state}:
            moves.setdefault((state, end), []).append(WORDS[event])
    order = list(State)
    lines = [
        f"    {one.value} --> {other.value}: {', '.join(sorted(why))}"
        for (one, other), why in sorted(
            moves.items(), key=lambda move: (order.index(move[0][0]), order.index(move[0][1]))
        )
    ]
    ends = [f"    {state.value} --> [*]" for state in order if state in ENDED]
    picture = ["```mermaid", "stateDiagram-v2", "    [*] --> queued", *lines, *ends, "```", ""]
    rows = ["| state | input | leads to |", "| --- | --- | --- |"]
    for state in order:
        for event, word in WORDS.items():
            row = TRANSITIONS.get((state, event))
            if row is not None:
                leads = ", ".join(end.value for end in order if end in row.leads_to) or "refused"
                rows.append(f"| {state.value} | {word} | {leads} |")
    return HEAD + "\n".join([*picture, *rows]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
