"""What all benchmarks work on: a folder, a service, QEMUs, and what /proc says of them."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support.service import Service

MIB = 1 << 20
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Stage:
    """Where it all happens. `short` asks for a run that shows that the benchmark works, and no more."""

    folder: Path
    short: bool

    def times(self, full: int, short: int) -> int:
        """How often to do something."""
        return short if self.short else full

    def new(self, name: str) -> Path:
        """A new folder."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        return folder


def asynchronous(running: Service) -> httpx.AsyncClient:
    """A client for asyncio."""
    token = (running.state_dir / "token").read_text().strip()
    return httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(uds=str(running.socket)),
        base_url="http://blockjobd",
        headers={"Authorization": f"Bearer {token}"},
        timeout=60,
    )


def settle() -> None:
    """Have the disks take what was written before, so that nobody pays for it later."""
    os.sync()


def image(path: Path, size: int, *, backing: Path | None = None, at: int = 0, data: int = 0, pattern: int = 1) -> Path:
    """A qcow2 image of a virtual size, with `data` bytes of data from the offset `at` on."""
    below = ("-b", backing.name, "-F", "qcow2") if backing else ()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *below, path, str(size)], check=True)
    if data:
        ends = [*range(at, at + data, 256 * MIB), at + data]
        pieces = [f"write -q -P {pattern} {begin} {end - begin}" for begin, end in itertools.pairwise(ends)]
        write = [part for piece in pieces for part in ("-c", piece)]
        subprocess.run(["qemu-io", "-f", "qcow2", *write, path], check=True)
    return path


def processor_seconds(pids: Iterable[int]) -> float:
    """The processor time that the processes have used so far, in seconds (proc(5), stat fields 14 and 15)."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def memory(pid: int) -> int:
    """The memory that a process has to itself, and its share of what it has with others, in bytes (PSS)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not tell")


def open_files(pid: int) -> int:
    """How many file descriptors a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
