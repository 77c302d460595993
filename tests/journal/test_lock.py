"""One service to a state directory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from app.journal.lock import StateDirInUse, locked

HOLD = """
import sys
from pathlib import Path
from app.journal.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_service_is_refused(tmp_path: Path) -> None:
    """While another process holds the directory the lock is refused, naming it; a killed process holds nothing."""
    state_dir = tmp_path / "state"
    command = [sys.executable, "-c", HOLD, str(state_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(StateDirInUse, match=f"another blockjobd serves from {re.escape(str(state_dir))}"):
            locked(state_dir).__enter__()
        holder.kill()
        holder.wait(timeout=30)
        with locked(state_dir):
            pass


def test_the_lock_is_let_go(tmp_path: Path) -> None:
    """A service that ended in order leaves the directory free, and the lock's file is readable by its owner only."""
    for _ in range(2):
        with locked(tmp_path / "state"), pytest.raises(StateDirInUse):
            locked(tmp_path / "state").__enter__()
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "state" / "lock").stat().st_mode & 0o777 == 0o600
