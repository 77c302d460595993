"""A short form of `make fuzz`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.run import Fuzz
from tests.fuzz.world import World

pytestmark = pytest.mark.live


def test_whatever_is_asked(tmp_path: Path) -> None:
    """Of requests of every operation, valid and not, each has an answer that the contract names; no data is harmed."""
    with World(tmp_path, seed=1) as world:
        paths = world.service.client.get("/openapi.json").json()["paths"].values()
        operations = {operation["operationId"] for path in paths for operation in path.values()}
        report = Fuzz(world, seed=1).run(300)
    assert not report.violations, report.table()
    assert {name for name, _status in report.answers} == operations, report.table()
    assert any(status == 202 for _name, status in report.answers), report.table()
