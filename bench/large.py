"""A large merge: how much of QEMU's own speed is left."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import uvloop

from bench import bare
from bench.client import client
from bench.figures import Goal, Picture, Section, Series, Table, mib
from bench.small import disk
from bench.stage import MIB, Stage, image, settle
from tests.support.qemu import Qemu
from tests.support.service import Service

SCRIPT, FLUSHING, OURS = "bare script", "bare script and a flush", "blockjobd"
LAYERS = ("base", "s1", "s2")
DATA = 4096 * MIB


def _chain(folder: Path, data: int) -> None:
    """An empty base and a fresh active layer around the one with the data, which no merge changes."""
    for name in ("base", "s2"):
        (folder / f"{name}.qcow2").unlink(missing_ok=True)
    base = image(folder / "base.qcow2", data)
    middle = folder / "s1.qcow2"
    if not middle.exists():
        image(middle, data, backing=base, data=data)
    image(folder / "s2.qcow2", data, backing=middle)
    settle()


def _bare(folder: Path, *, flush: bool) -> float:
    async def timed() -> float:
        async with bare.monitor(folder / "q.qmp") as monitor:
            begin = time.perf_counter()
            await bare.merge(monitor, device="s2", top="s1", base="base")
            if flush:
                await bare.flush(monitor, "base")
            return time.perf_counter() - begin

    with Qemu(folder / "q.qmp", disk(folder / "s2.qcow2", LAYERS)):
        return uvloop.run(timed())


def _ours(running: Service, folder: Path) -> float:
    async def timed() -> float:
        async with client(running) as asking:
            begin = time.perf_counter()
            await asking.merge("big", {"top": "vda[1]"})
            return time.perf_counter() - begin

    with Qemu(running.qmp_dir / "big.qmp", disk(folder / "s2.qcow2", LAYERS)):
        running.wait_for_domain("big")
        return uvloop.run(timed())


def run(stage: Stage) -> Section:
    """Three contenders, in turn, each time into an empty base: the script leaves its data in the page cache."""
    folder = stage.new("chain")
    # The layer, what is merged into the base, and some room.
    room = shutil.disk_usage(folder).free // 3
    data = 16 * MIB if stage.short else min(DATA, room // (256 * MIB) * 256 * MIB)
    taken: dict[str, list[float]] = {SCRIPT: [], FLUSHING: [], OURS: []}
    with Service(stage.new("ours")) as running:
        for number in range(stage.times(5, 1)):
            # Who is first takes turns, as a disk slows down while it works.
            for contender in [*taken][number % 3 :] + [*taken][: number % 3]:
                _chain(folder, data)
                ours = contender == OURS
                seconds = _ours(running, folder) if ours else _bare(folder, flush=contender == FLUSHING)
                taken[contender].append(seconds)
    series = {contender: Series(tuple(values)) for contender, values in taken.items()}
    script, flushing, ours = (series[contender] for contender in (SCRIPT, FLUSHING, OURS))
    ratio = ours.median / script.median
    rows = [
        [
            contender,
            f"{of.median:.2f} s",
            f"{of.p95:.2f} s",
            f"{data / MIB / of.median:.0f} MiB/s",
            f"{of.median / script.median:.3f}",
            str(len(of.values)),
        ]
        for contender, of in series.items()
    ]
    return Section(
        name="large",
        title="A large merge",
        tables=[
            Table(
                ["merge", "median", "p95", "speed", "to bare", "runs"],
                rows,
                f"{mib(data)} of data below the active layer, merged into an empty base.",
            )
        ],
        goals=[
            Goal(
                "at most 1.02 times the bare script",
                f"{ratio:.3f} times; {ours.median / flushing.median:.3f} times one that flushes what it has merged",
                ratio <= 1.02,
            )
        ],
        pictures=[
            Picture(
                "bench-large.svg",
                f"A merge of {mib(data)} (median)",
                "s",
                {"merge": {contender: of.median for contender, of in series.items()}},
            )
        ],
        figures={"bytes": data, "seconds": {contender: of.json() for contender, of in series.items()}},
    )
