"""Every benchmark works; what it finds is not judged here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import ALL


@pytest.mark.live
@pytest.mark.parametrize("name", ALL)
def test_it_runs_to_its_end(tmp_path: Path, name: str) -> None:
    """It prints its tables, and leaves nothing behind. What it compares with is left out where it is not installed."""
    ran = subprocess.run(
        [sys.executable, "-m", "bench", name, "--short", "--folder", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert ran.returncode == 0, ran.stderr
    assert "\n## " in ran.stdout
    if name != "api" or shutil.which("wrk"):
        assert "\n| --- |" in ran.stdout
        assert ran.stdout.count("\n| ") > 2, ran.stdout
    assert list(tmp_path.iterdir()) == []
