"""The journal that an older release has left."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from app.journal.database import FILE

FIXTURE = Path(__file__).parent / "fixtures" / "journal-0005.sql"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A state directory as the release with schema 5 has left it, with jobs in every state."""
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.executescript(FIXTURE.read_text(encoding="utf-8"))
    return tmp_path
