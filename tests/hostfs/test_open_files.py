"""Which files a process has open."""

from __future__ import annotations

import os
from pathlib import Path

from app.core.evidence import Process
from app.hostfs.process import open_files, start_time


def test_a_mere_path_is_no_open_file(tmp_path: Path) -> None:
    """O_PATH takes no right to a file, so a process that has it so can't be taken for one that uses the file."""
    for name in ("read", "named"):
        (tmp_path / name).touch()
    read, named = os.open(tmp_path / "read", os.O_RDONLY), os.open(tmp_path / "named", os.O_PATH)
    try:
        held = open_files(Process(pid=os.getpid(), started=start_time(os.getpid()), uuid=None))
        assert held is not None
        found = {name: (tmp_path / name).stat() for name in ("read", "named")}
        assert {name: (file.st_dev, file.st_ino) in held for name, file in found.items()} == {
            "read": True,
            "named": False,
        }
    finally:
        os.close(read)
        os.close(named)
