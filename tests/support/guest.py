"""A tiny real Linux guest that only writes, flushes, and says what it has flushed, for ever.

Write number n puts its number as text, padded with NULs, into block n % BLOCKS, STEP bytes after the block before. Once
the disk has flushed it, "ACK n" is on the serial console: from then on the number must be on the disk whatever happens.
As each write waits for the one before, a disk shows exactly one moment: all writes up to some n, and none after it.
"""

from __future__ import annotations

import gzip
import lzma
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.chains import assert_same

CACHE = Path(__file__).parents[2] / "build" / "guest"
"""The kernel and the initial file system are made once; `make clean` takes them away."""

BLOCK = 4096
BLOCKS = 32
STEP = 128 * 1024
"""From one block to the next: each has clusters of its own, and neighbours may come from other layers."""

MODULES = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")
INIT = f"""#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
for module in {" ".join(MODULES)}; do
  [ -e /$module.ko ] && /bin/busybox insmod /$module.ko
done
until [ -b /dev/vda ]; do /bin/busybox sleep 0.05; done
n=0
while printf %s $n | /bin/busybox dd of=/dev/vda bs={BLOCK} count=1 seek=$((n % {BLOCKS} * {STEP // BLOCK})) \
    conv=sync,notrunc,fsync 2>/dev/null; do
  echo "ACK $n"
  n=$((n + 1))
done
echo "FAILED $n"
while :; do /bin/busybox sleep 3600; done
"""


class Guest:
    """What one guest says on its console."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "console"

    def arguments(self) -> list[str]:
        """How QEMU is to start it; skips the test where no guest can be had."""
        kernel, initrd = _made()
        append = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable"
        system = ["-kernel", str(kernel), "-initrd", str(initrd), "-append", append]
        return ["-m", "96", "-serial", f"file:{self._log}", *system]

    def acknowledged(self) -> int:
        """The number of the last write that was acknowledged; -1 before the first."""
        said = self._log.read_text() if self._log.exists() else ""
        assert "FAILED" not in said, said
        # The last line may be half written.
        return max((int(number) for number in re.findall(r"ACK (\d+)\r?\n", said)), default=-1)


def assert_moment(seen: bytes, before: bytes, *, least: int) -> int:
    """Compare a disk that held `before` with what a guest made of it: its writes up to some number, `least` or later.

    That number is returned. It may be above the last one that was acknowledged: the console lags behind the disk.
    """
    numbers = [seen[block * STEP : block * STEP + BLOCK].rstrip(b"\0") for block in range(BLOCKS)]
    moment = max((int(number) for number in numbers if number.isdigit()), default=-1)
    assert moment >= least, f"the disk shows {moment} as the last write, and {least} was acknowledged"
    expected = bytearray(before)
    for number in range(max(0, moment - BLOCKS + 1), moment + 1):
        at = number % BLOCKS * STEP
        expected[at : at + BLOCK] = str(number).encode().ljust(BLOCK, b"\0")
    assert_same(seen, bytes(expected))
    return moment


# How it is made ------------------------------------------------------------------------------------------------------


def _made() -> tuple[Path, Path]:
    kernel, initrd = CACHE / "vmlinuz", CACHE / "initrd.gz"
    # What was made last is moved there last.
    init = CACHE / "init"
    if not init.exists() or init.read_text() != INIT:
        CACHE.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                _make(Path(folder))
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or error
            pytest.skip(f"no guest can be made from Debian's packages here: {said}")
    return kernel, initrd


def _make(folder: Path) -> None:
    """Take Debian's kernel for clouds and its busybox; nothing is installed, so it takes no root."""
    if not _run(folder, "apt-cache", "show", "linux-image-cloud-amd64", check=False):
        _run(folder, "apt-get", "update", "-qq")
    depends = _run(folder, "apt-cache", "depends", "linux-image-cloud-amd64")
    image = next(iter(re.findall(r"Depends: (linux-image-\S+)", depends)), "linux-image-cloud-amd64")
    _run(folder, "apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", image, "busybox-static")
    for package in folder.glob("*.deb"):
        _run(folder, "dpkg-deb", "-x", package.name, "root")
    root = folder / "root"
    files = [("init", INIT.encode()), ("bin/busybox", next(root.glob("**/bin/busybox")).read_bytes())]
    for module in MODULES:
        files += [(f"{module}.ko", _unpacked(found)) for found in root.glob(f"**/{module}.ko*")]
    (folder / "initrd.gz").write_bytes(gzip.compress(b"".join(_archive(files)), 1))
    shutil.copy(next(root.glob("boot/vmlinuz-*")), folder / "vmlinuz")
    (folder / "init").write_text(INIT)
    for name in ("vmlinuz", "initrd.gz", "init"):
        (folder / name).replace(CACHE / name)


def _run(folder: Path, *command: str, check: bool = True) -> str:
    environ = os.environ | {"LC_ALL": "C"}
    return subprocess.run(command, cwd=folder, check=check, capture_output=True, text=True, env=environ).stdout


def _unpacked(module: Path) -> bytes:
    return lzma.decompress(module.read_bytes()) if module.suffix == ".xz" else module.read_bytes()


def _archive(files: list[tuple[str, bytes]]) -> Iterator[bytes]:
    """A cpio archive as the kernel reads it (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    yield from (_entry(folder, stat.S_IFDIR | 0o755) for folder in ("bin", "dev"))
    yield _entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    yield from (_entry(name, stat.S_IFREG | 0o755, content) for name, content in files)
    yield _entry("TRAILER!!!", 0)


def _entry(name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    # Inode, mode, uid, gid, links, mtime, size, device of the file, device that it is, length of the name, checksum.
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
