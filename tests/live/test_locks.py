"""Who holds image locks, by a process's own open file and by the kernel's list, which changes while it is read."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from app.core.evidence import Process
from app.hostfs import locks
from app.hostfs.locks import UNSHARED_WRITE, WRITE
from app.hostfs.process import borrowed, start_time

OFD_SETLK = 37


def is_locked(image: Path, process: Process | None) -> bool:
    """Whether another process has the image locked."""
    file = os.open(image, os.O_PATH)
    try:
        return locks.is_locked(file, process)
    finally:
        os.close(file)


CHURN = f"""
import fcntl, struct, sys
files = [open(name, "r+b") for name in sys.argv[1:]]
print("begun", flush=True)
while True:
    for kind in (fcntl.F_RDLCK, fcntl.F_UNLCK):
        for file in files:
            fcntl.fcntl(file, {OFD_SETLK}, struct.pack("hhqqi4x", kind, 0, {WRITE}, 1, 0))
"""


@contextmanager
def churning(folder: Path, processes: int) -> Generator[None]:
    """Processes that take and drop the locks of 200 files all the while."""
    names = [str(folder / str(number)) for number in range(200)]
    for name in names:
        Path(name).touch()
    command = [sys.executable, "-c", CHURN, *names]
    churns = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(processes)]
    try:
        for churn in churns:
            assert churn.stdout is not None
            churn.stdout.readline()
        yield
    finally:
        for churn in churns:
            churn.kill()
            churn.communicate()


def me() -> Process:
    """This process."""
    return Process(pid=os.getpid(), started=start_time(os.getpid()), uuid=None)


def test_own_locks_among_many_that_change(tmp_path: Path) -> None:
    """Locks that others take and drop all the while don't make a process's own ones look like another's."""
    image = tmp_path / "image"
    with image.open("w+b") as file:
        for byte in (WRITE, UNSHARED_WRITE):
            fcntl.fcntl(file, OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, byte, 1, 0))
        with churning(tmp_path, 1):
            # A single look is wrong once in five times here.
            until = time.monotonic() + 5
            while time.monotonic() < until:
                assert not is_locked(image, me())
        assert is_locked(image, None)


HOLD = f"""
import fcntl, struct, sys
files = [open(name, "rb") for name in sys.argv[1:]]
for file in files:
    for byte in ({WRITE - 1}, {UNSHARED_WRITE}):
        fcntl.fcntl(file, {OFD_SETLK}, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, byte, 1, 0))
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(*files: Path) -> Generator[Process]:
    """A process that holds what a QEMU holds of its backing images; a file that is named twice is opened twice."""
    command = [sys.executable, "-c", HOLD, *map(str, files)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            yield Process(pid=process.pid, started=start_time(process.pid), uuid=None)
        finally:
            process.kill()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.touch()
    return path


def test_the_only_holder(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That nobody else locks a file is learned from the holder's own open file, without the list of all locks."""
    monkeypatch.setattr(locks, "LOCKS", image / "no such list")
    with holder(image) as qemu:
        assert not is_locked(image, qemu)
        with pytest.raises(NotADirectoryError), holder(image):
            is_locked(image, qemu)


def test_a_holder_among_many_locks_that_change(image: Path, tmp_path: Path) -> None:
    """A lock that the kernel's list leaves out for a moment is there all the same."""
    with churning(tmp_path, 2), holder(image):
        for asking in (None, me()):
            assert all(is_locked(image, asking) for _ in range(30))


def test_another_holder(image: Path) -> None:
    """Another process with locks on the file is seen while it is there, whatever the first one has open besides."""
    with holder(image) as qemu:
        with holder(image):
            assert is_locked(image, qemu)
        assert not is_locked(image, qemu)


def test_a_file_that_is_opened_twice(image: Path) -> None:
    """A process that has the file open twice is not another one, and does not hide another one."""
    with holder(image, image) as qemu:
        assert not is_locked(image, qemu)
        with holder(image):
            assert is_locked(image, qemu)


def test_a_process_that_is_another_one_by_now(image: Path) -> None:
    """The locks of a process with the pid of one that has ended are another's."""
    with holder(image) as qemu:
        assert qemu.started is not None
        assert is_locked(image, replace(qemu, started=qemu.started - 1))


def test_nothing_of_a_borrowed_file_stays(image: Path) -> None:
    """No file stays open, so that the process's locks end with it."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    with holder(image) as qemu:
        found = image.stat()
        with borrowed(qemu, (found.st_dev, found.st_ino)) as handle:
            assert os.fstat(handle).st_ino == found.st_ino
        with pytest.raises(FileNotFoundError), borrowed(qemu, (found.st_dev, found.st_ino + 1)):
            pass
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    with pytest.raises(ProcessLookupError), borrowed(qemu, (found.st_dev, found.st_ino)):
        pass
