"""`blockjobd demo`, run as a person runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from app.cli.demo import FOLDER, PORT, curl_lines
from app.cli.stage import SIZE, DemoFailed, compare, expected_disk, fixed_directory

pytestmark = [pytest.mark.live, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "app.cli.main", "demo")


def processes_with(text: str) -> list[str]:
    """The command lines of running processes that name `text`."""
    found: list[str] = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


def test_once_verifies_every_byte_and_leaves_nothing(tmp_path: Path) -> None:
    """`--once` merges in the middle and at the top, compares the disk after each, and tidies up."""
    environ = os.environ | {"TMPDIR": str(tmp_path), "BLOCKJOBD_LISTEN": "not for the demo"}
    done = subprocess.run([*COMMAND, "--once"], env=environ, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    said = re.fullmatch(r"verified (\d+) bytes in (\d+\.\d) s", last)
    assert said is not None, last
    assert int(said[1]) == 2 * SIZE
    assert float(said[2]) > 0
    percents = [float(percent) for percent in re.findall(r"running +(\d+\.\d) %", done.stdout)]
    assert len([percent for percent in percents if 0 < percent < 100]) >= 3
    assert list(tmp_path.iterdir()) == []
    assert processes_with(str(tmp_path)) == []


def test_once_tidies_up_when_it_is_interrupted(tmp_path: Path) -> None:
    """SIGTERM in the middle of the merge leaves no process and no file."""
    environ = os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([*COMMAND, "--once"], env=environ, cwd=ROOT, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "running" in line and "%" in line:
                demo.terminate()
                break
        demo.stdout.read()
        assert demo.wait(30) == 130

    assert list(tmp_path.iterdir()) == []
    assert processes_with(str(tmp_path)) == []


def test_a_wrong_byte_is_found(tmp_path: Path) -> None:
    """One flipped bit, and one byte too few or too many, are each an error that names the place."""
    disk = bytearray(expected_disk())
    copy = tmp_path / "disk"
    copy.write_bytes(disk)
    assert compare(copy, bytes(disk)) == SIZE

    disk[12345678] ^= 1
    with pytest.raises(DemoFailed, match="from byte 12345678 on"):
        compare(copy, bytes(disk))
    disk[12345678] ^= 1
    with pytest.raises(DemoFailed, match=f"longer than {SIZE - 1} bytes"):
        compare(copy, bytes(disk[:-1]))
    with pytest.raises(DemoFailed, match=f"from byte {SIZE} on"):
        compare(copy, bytes(disk) + b"\0")


def test_missing_tools_are_named(tmp_path: Path) -> None:
    """Without QEMU the demo says what is missing and how to get it."""
    environ = os.environ | {"PATH": str(tmp_path)}
    done = subprocess.run([*COMMAND, "--once"], env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "qemu-system-x86_64" in done.stderr
    assert "apt-get install" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_directory_is_for_one_demo_at_a_time(tmp_path: Path) -> None:
    """A second demo is refused; what a killed one has left is removed; a link or a file is nobody's directory."""
    folder = tmp_path / "demo"
    folder.mkdir(mode=0o755)
    (folder / "left").write_text("by a demo that was killed")
    with fixed_directory(folder) as mine:
        assert list(mine.iterdir()) == []
        assert mine.stat().st_mode & 0o777 == 0o700
        with pytest.raises(DemoFailed, match="another demo"), fixed_directory(folder):
            pass
    assert not folder.exists()

    folder.symlink_to(tmp_path)
    with pytest.raises(DemoFailed, match="not this user's"), fixed_directory(folder):
        pass


@contextmanager
def interactive_demo() -> Generator[str]:
    """The demo at its usual place, up and waiting; what it has printed."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        assert probe.connect_ex(("127.0.0.1", PORT)) != 0, f"port {PORT} is taken; the README's lines need it"
    environ = os.environ | {"PYTHONUNBUFFERED": "1"}
    last = curl_lines(f"http://127.0.0.1:{PORT}", FOLDER / "state" / "token")[-1]
    with subprocess.Popen(
        COMMAND, env=environ, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as demo:
        assert demo.stdout is not None
        printed = ""
        try:
            for line in demo.stdout:
                printed += line
                if line.strip() == last:
                    break
            else:
                pytest.fail(f"the demo ended: {printed}")
            yield printed
        finally:
            demo.send_signal(signal.SIGINT)
            demo.stdout.read()
            code = demo.wait(30)
    assert code == 0
    assert not FOLDER.exists()
    assert processes_with(str(FOLDER)) == []


def readme_lines() -> list[str]:
    """The lines of the README that are to be tried on the demo."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if block.startswith("TOKEN=")]
    return block.splitlines()


def answer(*lines: str) -> Any:
    """The JSON that lines of shell print."""
    done = subprocess.run(["bash", "-euc", "\n".join(lines)], capture_output=True, text=True, check=True, timeout=30)
    return json.loads(done.stdout)


def test_the_lines_of_the_readme_work_as_printed() -> None:
    """The README and the demo print the same lines, and each of the five does what is said of it."""
    lines = readme_lines()
    assert len(lines) == 6
    with interactive_demo() as printed:
        assert "\n".join(lines) in printed
        domains, disk, plan, job, jobs = (answer(lines[0], line) for line in lines[1:])
        assert [domain["id"] for domain in domains["items"]] == ["web1"]
        files = [layer["file"] for layer in disk["chain"]]
        assert [Path(file).name for file in files] == ["s3.qcow2", "base.qcow2"]
        assert plan["type"] == "active-commit"
        assert plan["chain_before"] == files
        assert plan["chain_after"] == files[1:]
        assert job["type"] == "active-commit"
        assert job["id"] == jobs["items"][0]["id"]
        deadline = time.monotonic() + 60
        while jobs["items"][0]["state"] != "completed":
            assert time.monotonic() < deadline, jobs
            time.sleep(0.5)
            jobs = answer(lines[0], lines[-1])
        assert jobs["items"][0]["result"]["chain"] == files[1:]
