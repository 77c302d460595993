"""What the demo shows: a chain of images with known data, a QEMU that runs on it, and a service beside it.

Everything lies in one private directory, and both processes end with the block that started them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

MIB: Final = 1 << 20
SIZE: Final = 64 * MIB
"""The virtual size of the demo's disk, in bytes."""

CHAIN: Final = ("base", "s1", "s2", "s3")
DOMAIN: Final = "web1"
TOOLS: Final = ("qemu-system-x86_64", "qemu-img", "qemu-io", "setpriv")

START: Final = 20.0
"""Seconds that QEMU, or the service, may take to answer for the first time."""


class DemoFailed(Exception):
    """The demo can't go on, or what it saw is not what it has to be; the message says what and why."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes written into a layer. Offsets are off the 64 KiB clusters of qcow2, so that clusters are shared too."""

    layer: str
    offset: int
    length: int

    def content(self) -> bytes:
        """What is written: no two extents, and no two places in one, look alike."""
        return hashlib.shake_128(f"{self.layer} at {self.offset}".encode()).digest(self.length)


EXTENTS: Final = (
    Extent("base", 0, 48 * MIB),
    Extent("s1", 4 * MIB + 512, 20 * MIB),
    Extent("s2", 20 * MIB + 1536, 24 * MIB),
    Extent("s3", 8 * MIB - 512, 12 * MIB),
    Extent("s3", 40 * MIB + 4608, 16 * MIB),
)
"""Bottom layer first: each layer hides a part of those below, and the disk's end is written by none."""


def expected_disk() -> bytes:
    """What the guest has to see, worked out without any image."""
    disk = bytearray(SIZE)
    for extent in EXTENTS:
        disk[extent.offset : extent.offset + extent.length] = extent.content()
    return bytes(disk)


# Where it lies --------------------------------------------------------------------------------------------------------


@contextmanager
def fresh_directory() -> Generator[Path]:
    """A directory of its own, for its owner only."""
    with tempfile.TemporaryDirectory(prefix="blockjobd-demo-") as name:
        yield Path(name)


@contextmanager
def fixed_directory(path: Path) -> Generator[Path]:
    """The directory `path`, empty and for its owner only, held against other demos as long as the block lasts.

    Raises `DemoFailed` where it belongs to somebody else, or another demo has it.
    """
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        raise DemoFailed(f"{path} is there and is not this user's directory; have its owner remove it")
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoFailed(f"another demo runs in {path}; end it first") from None
        os.fchmod(handle, 0o700)
        for left in path.iterdir():
            # A demo that was killed could not tidy up.
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(handle)


# What runs there ------------------------------------------------------------------------------------------------------


def check_tools() -> None:
    """Raise `DemoFailed` where a program is missing that the demo needs."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise DemoFailed(
            f"{', '.join(missing)} not found; on Debian: apt-get install qemu-system-x86 qemu-utils util-linux"
        )


def _tool(*command: str, folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=120)  # noqa: S603 - ours
    except subprocess.CalledProcessError as error:
        raise DemoFailed(f"{' '.join(command)}: {error.stderr.strip() or error.stdout.strip()}") from error
    except subprocess.TimeoutExpired as error:
        raise DemoFailed(f"{' '.join(command)} took longer than {error.timeout} s") from error


def make_chain(folder: Path) -> Path:
    """The images of `CHAIN` with the data of `EXTENTS`; the path of the active layer."""
    below = None
    for layer in CHAIN:
        backing = ("-b", f"{below}.qcow2", "-F", "qcow2") if below else ()
        _tool("qemu-img", "create", "-q", "-f", "qcow2", *backing, f"{layer}.qcow2", str(SIZE), folder=folder)
        for extent in EXTENTS:
            if extent.layer == layer:
                (folder / "data").write_bytes(extent.content())
                write = f"write -q -s data {extent.offset} {extent.length}"
                _tool("qemu-io", "-f", "qcow2", "-c", write, f"{layer}.qcow2", folder=folder)
        below = layer
    (folder / "data").unlink()
    return folder / f"{below}.qcow2"


@contextmanager
def child(
    *command: str, log: Path, cwd: Path | None = None, env: dict[str, str] | None = None
) -> Generator[subprocess.Popen[bytes]]:
    """A process that runs as long as the block does; its output goes to `log`.

    The kernel ends it should this process die (prctl(2), PR_SET_PDEATHSIG), and it is in a session of its own, as
    Ctrl-C is for this process to handle.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - the command is ours
            ["setpriv", "--pdeathsig", "KILL", "--", *command],  # noqa: S607 - `check_tools` has found it
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=env,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def last_words(log: Path) -> str:
    """The last lines of a process's output."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return "\n".join(lines[-10:]) or "it said nothing"


class DemoMonitor:
    """The demo's own connection to QEMU, beside the service's, for looking at the disk as the guest sees it."""

    def __init__(self, connection: socket.socket) -> None:
        self._lines = connection.makefile("rw", encoding="utf-8")
        self._lines.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> object:
        """What QEMU returns; raises `DemoFailed` where it refuses or is gone."""
        self._lines.write(json.dumps({"execute": command, "arguments": arguments}))
        self._lines.flush()
        for line in self._lines:
            reply = cast("dict[str, object]", json.loads(line))
            if "return" in reply:
                return reply["return"]
            if "error" in reply:
                raise DemoFailed(f"QEMU refused {command}: {reply['error']}")
        raise DemoFailed(f"QEMU ended while it was asked for {command}")

    def read_disk(self, node: str, folder: Path) -> Path:
        """A raw copy, in `folder`, of what a reader of the block node `node` sees, by way of an NBD export."""
        server, copy = folder / "nbd.sock", folder / "guest.raw"
        self.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(server)}})
        try:
            self.execute("block-export-add", **{"type": "nbd", "id": "look", "name": "disk", "node-name": node})
            url = "nbd+unix:///disk?socket=nbd.sock"
            _tool("qemu-img", "convert", "-f", "raw", "-O", "raw", url, copy.name, folder=folder)
        finally:
            # It takes its exports with it.
            self.execute("nbd-server-stop")
        return copy


@contextmanager
def qemu(image: Path, folder: Path, sockets: Path) -> Generator[tuple[subprocess.Popen[bytes], DemoMonitor]]:
    """A QEMU with the disk `image`; its QMP socket for the service is `DOMAIN`.qmp in `sockets`."""
    log, own = folder / "qemu.log", folder / "look.sock"
    command = (
        *("qemu-system-x86_64", "-no-user-config", "-nodefaults", "-accel", "tcg", "-S", "-display", "none"),
        *("-name", DOMAIN, "-m", "64"),
        *("-drive", f"file={_escaped(image)},format=qcow2,if=none,id=disk0"),
        *("-device", "virtio-blk-pci,drive=disk0,id=virtio0"),
        *("-qmp", f"unix:{_escaped(sockets / f'{DOMAIN}.qmp')},server=on,wait=off"),
        *("-qmp", f"unix:{_escaped(own)},server=on,wait=off"),
    )
    with child(*command, log=log) as process, socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(START)
        deadline = time.monotonic() + START
        while connection.connect_ex(str(own)) != 0:
            if process.poll() is not None or time.monotonic() > deadline:
                raise DemoFailed(f"QEMU did not start: {last_words(log)}")
            time.sleep(0.02)
        yield process, DemoMonitor(connection)


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")


@contextmanager
def service(folder: Path, sockets: Path, listen: str) -> Generator[subprocess.Popen[bytes]]:
    """`blockjobd serve`, with the settings of the demo and no others; its state is in `state` in `folder`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("BLOCKJOBD_")} | {
        "BLOCKJOBD_LISTEN": listen,
        "BLOCKJOBD_STATE_DIR": str(folder / "state"),
        "BLOCKJOBD_QMP_DIR": str(sockets),
        "BLOCKJOBD_LOG_FORMAT": "text",
    }
    # Run where this package lies, so that it is this one that serves.
    here = Path(__file__).resolve().parents[2]
    command = (sys.executable, "-m", "app.cli.main", "serve")
    with child(*command, log=folder / "service.log", cwd=here, env=env) as process:
        yield process


# What has to be true --------------------------------------------------------------------------------------------------


def compare(copy: Path, expected: bytes) -> int:
    """How many bytes of the disk were compared: all of them; raises `DemoFailed` at the first that is wrong."""
    with copy.open("rb") as file:
        for start in range(0, len(expected), MIB):
            wanted = expected[start : start + MIB]
            found = file.read(len(wanted))
            if found != wanted:
                at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), len(found))
                raise DemoFailed(f"the guest's disk is wrong from byte {start + at} on")
        if file.read(1):
            raise DemoFailed(f"the guest's disk is longer than {len(expected)} bytes")
    return len(expected)
