"""The list of the kernel's locks, read while it changes."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

from app.core.job import Process
from app.qemu.locks import UNSHARED_WRITE, WRITE, is_locked
from app.qemu.process import start_time

OFD_SETLK = 37
CHURN = f"""
import fcntl, struct, sys
files = [open(name, "r+b") for name in sys.argv[1:]]
print("begun", flush=True)
while True:
    for kind in (fcntl.F_RDLCK, fcntl.F_UNLCK):
        for file in files:
            fcntl.fcntl(file, {OFD_SETLK}, struct.pack("hhqqi4x", kind, 0, {WRITE}, 1, 0))
"""


def test_own_locks_among_many_that_change(tmp_path: Path) -> None:
    """Locks that others take and drop all the while don't make a process's own ones look like another's."""
    names = [str(tmp_path / str(number)) for number in range(200)]
    for name in names:
        Path(name).touch()
    me = Process(pid=os.getpid(), started=start_time(os.getpid()), uuid=None)
    image = tmp_path / "image"
    with image.open("w+b") as file:
        for byte in (WRITE, UNSHARED_WRITE):
            fcntl.fcntl(file, OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, byte, 1, 0))
        churn = subprocess.Popen([sys.executable, "-c", CHURN, *names], stdout=subprocess.PIPE)
        try:
            assert churn.stdout is not None
            churn.stdout.readline()
            # A single look is wrong once in five times here.
            until = time.monotonic() + 5
            while time.monotonic() < until:
                assert not is_locked(image.stat(), me)
        finally:
            churn.kill()
            churn.communicate()
        assert is_locked(image.stat(), None)
