"""A long life: many small jobs, and whether anything grows with them."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.client import Client, client
from bench.figures import Goal, Picture, Section, Series, Table, mib, ms
from bench.small import disk
from bench.stage import Stage, image, memory, open_files
from tests.support.qemu import Qemu
from tests.support.service import Service

MACHINES = 8
RING = 8192
"""The events that the service keeps in memory; before they are that many, its memory grows as it should."""

FLAT = 1.05
"""The factor by which memory may grow and still be called flat."""

BODY = {"flags": ["active", "delete"], "on_ready": "pivot"}


@dataclass(frozen=True, slots=True)
class _Look:
    """What the service takes after so many jobs."""

    jobs: int
    memory: int
    files: int


class _Machine:
    """A QEMU of which a snapshot is taken again and again, each merged down at once."""

    def __init__(self, qemu: Qemu, folder: Path, name: str) -> None:
        self.name = name
        self._qemu, self._folder = qemu, folder
        self._number = 0

    def snapshot(self) -> None:
        """One layer more on top."""
        self._number += 1
        node = f"s{self._number}"
        self._qemu.qmp(
            "blockdev-snapshot-sync",
            **{
                "node-name": "base",
                "snapshot-file": str(self._folder / f"{node}.qcow2"),
                "snapshot-node-name": node,
                "format": "qcow2",
            },
        )


async def _live(machine: _Machine, asked: Client, jobs: int, done: list[float]) -> None:
    for _ in range(jobs):
        await asyncio.to_thread(machine.snapshot)
        begin = time.perf_counter()
        await asked.merge(machine.name, BODY)
        done.append(time.perf_counter() - begin)


async def _all(running: Service, machines: list[_Machine], jobs: int, every: int) -> tuple[list[float], list[_Look]]:
    assert running.process is not None
    pid = running.process.pid
    done: list[float] = []
    looks: list[_Look] = []
    async with client(running) as asked:
        lives = [asyncio.create_task(_live(each, asked, jobs // len(machines), done)) for each in machines]
        while not all(life.done() for life in lives):
            if len(done) >= len(looks) * every:
                looks.append(_Look(len(done), memory(pid), open_files(pid)))
            await asyncio.wait(lives, timeout=0.1, return_when=asyncio.FIRST_EXCEPTION)
            for life in lives:
                if life.done():
                    life.result()
        # What lasts, without what the last jobs have just used.
        await asyncio.sleep(1)
        looks.append(_Look(len(done), memory(pid), open_files(pid)))
    return done, looks


def run(stage: Stage) -> Section:
    """Snapshot and merge, over and over, on several QEMUs at once."""
    jobs, every = stage.times(10_000, 16), stage.times(500, 8)
    running = Service(stage.new("ours"))
    machines: list[_Machine] = []
    with ExitStack() as stack:
        for number in range(MACHINES):
            folder = running.folder / f"m{number}"
            folder.mkdir()
            base = image(folder / "base.qcow2", 1 << 20, data=64 << 10)
            qemu = stack.enter_context(Qemu(running.qmp_dir / f"m{number}.qmp", disk(base, ("base",))))
            machines.append(_Machine(qemu, folder, f"m{number}"))
        stack.enter_context(running)
        for machine in machines:
            running.wait_for_domain(machine.name)
        begin = time.perf_counter()
        done, looks = asyncio.run(_all(running, machines, jobs, every))
        lasted = time.perf_counter() - begin
    return _section(jobs, done, looks, lasted)


def _section(jobs: int, done: list[float], looks: list[_Look], lasted: float) -> Section:
    # A job tells of itself some six times, so the ring is full after a fifth of them.
    full = next((look for look in looks if look.jobs >= jobs / 4), looks[0])
    last = looks[-1]
    series = Series(tuple(done))
    shown = [look for number, look in enumerate(looks[:-1]) if number % 4 == 0] + [last]
    growth = last.memory / full.memory
    return Section(
        name="soak",
        title="A long life: many small jobs",
        tables=[
            Table(
                ["jobs", "memory", "open files"],
                [[f"{look.jobs:,}", mib(look.memory), str(look.files)] for look in shown],
                f"{jobs:,} times on {MACHINES} QEMUs: take a snapshot, merge it down with pivot and have its file "
                f"deleted. {jobs / lasted:.0f} jobs a second, {lasted:.0f} s; a merge took {ms(series.median)} "
                f"(median), {ms(series.p99)} (p99). Until it has {RING:,} events in memory, the service grows; after "
                "that it may not.",
            )
        ],
        goals=[
            Goal(
                f"flat memory from {full.jobs:,} jobs on",
                f"{mib(full.memory)} → {mib(last.memory)} ({growth:.3f})",
                growth <= FLAT,
            ),
            Goal("flat file descriptors", f"{full.files} → {last.files}", last.files <= full.files + 2),
        ],
        pictures=[
            Picture(
                "bench-soak.svg",
                "Memory of the service after so many small jobs",
                "MiB",
                {f"{look.jobs:,}": {"": look.memory / (1 << 20)} for look in shown},
            )
        ],
        figures={
            "seconds": {"median": series.median, "p95": series.p95, "p99": series.p99, "worst": series.worst},
            "looks": [{"jobs": look.jobs, "bytes": look.memory, "files": look.files} for look in looks],
            "lasted": lasted,
        },
    )
