from __future__ import annotations

from collections.abc import Iterator

import pytest

from app.core.machine import table
from tests.core import rows

ORIGINAL = table.TRANSITIONS


@pytest.fixture(autouse=True, scope="session")
def _rows_are_noted() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """Each row notes where it leads, for the line at the end of the run."""
    table.TRANSITIONS = rows.recording(ORIGINAL)  # pyright: ignore[reportAttributeAccessIssue, reportConstantRedefinition]
    yield
    table.TRANSITIONS = ORIGINAL  # pyright: ignore[reportAttributeAccessIssue, reportConstantRedefinition]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how much of the job's table was taken."""
    if not rows.TAKEN:
        # The controller of several workers has taken none itself.
        return
    line, missing = rows.report(ORIGINAL)
    terminalreporter.write_line(line)
    for what in missing:
        terminalreporter.write_line(f"  not taken: {what}")
