"""Many merges at once, and how the service answers meanwhile."""

from __future__ import annotations

import asyncio
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import uvloop

from bench import bare
from bench.client import client
from bench.figures import Goal, Picture, Section, Series, Table, ms
from bench.small import LAYERS, disk
from bench.stage import MIB, Stage, image, settle
from tests.support.qemu import Qemu
from tests.support.service import Service

DATA = 8 * MIB


def _template(folder: Path) -> None:
    below = None
    for number, name in enumerate(LAYERS):
        below = image(
            folder / f"{name}.qcow2", 4 * DATA, backing=below, at=number * DATA, data=DATA, pattern=number + 1
        )


def _machines(template: Path, folder: Path, sockets: Path, count: int) -> ExitStack:
    """So many QEMUs, each on a copy of the chain of its own."""
    with ExitStack() as stack:
        for number in range(count):
            copy = Path(shutil.copytree(template, folder / f"m{number}"))
            active = copy / f"{LAYERS[-1]}.qcow2"
            stack.enter_context(Qemu(sockets / f"m{number}.qmp", disk(active, LAYERS)))
        return stack.pop_all()


async def _bare(sockets: Path, count: int) -> float:
    async def one(number: int) -> None:
        async with bare.monitor(sockets / f"m{number}.qmp") as monitor:
            connected.release()
            await go.wait()
            await bare.merge(monitor, device="s2", top="s1", base="base")

    connected, go = asyncio.Semaphore(0), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(one(number))
        for _ in range(count):
            await connected.acquire()
        begin = time.perf_counter()
        go.set()
    return time.perf_counter() - begin


async def _ours(running: Service, count: int, answers: list[float]) -> float:
    async def watch() -> None:
        while True:
            begin = time.perf_counter()
            answer = await asking.http.get("/jobs", params={"active": "true"})
            assert answer.status_code == 200, answer.text
            answers.append(time.perf_counter() - begin)
            await asyncio.sleep(0.01)

    async with client(running) as asking:
        watching = asyncio.create_task(watch())
        begin = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(asking.merge(f"m{number}", {"top": "vda[1]"}))
        taken = time.perf_counter() - begin
        watching.cancel()
        await asyncio.wait([watching])
    return taken


def run(stage: Stage) -> Section:
    """Two contenders, in turn, each time on fresh QEMUs."""
    template = stage.new("template")
    _template(template)
    count = stage.times(50, 3)
    taken: dict[str, list[float]] = {"bare script": [], "blockjobd": []}
    answers: list[float] = []
    with Service(stage.new("ours"), {"BLOCKJOBD_MAX_RUNNING_JOBS": str(count)}) as running:
        for number in range(stage.times(3, 1)):
            for contender in sorted(taken, reverse=bool(number % 2)):
                folder = stage.new(f"{contender[0]}{number}")
                sockets = running.qmp_dir if contender == "blockjobd" else folder
                with _machines(template, folder, sockets, count):
                    if contender == "blockjobd":
                        for machine in range(count):
                            running.wait_for_domain(f"m{machine}")
                    settle()
                    made = _ours(running, count, answers) if contender == "blockjobd" else _bare(folder, count)
                    taken[contender].append(uvloop.run(made))
                if contender == "blockjobd":
                    _wait_until_none(running)
                shutil.rmtree(folder)
    return _section(
        {contender: Series(tuple(values)) for contender, values in taken.items()}, Series(tuple(answers)), count
    )


def _wait_until_none(running: Service) -> None:
    deadline = time.monotonic() + 30
    while items := running.client.get("/domains").json()["items"]:
        for item in items:
            # A machine that was found stays, as off, until somebody has it forgotten.
            if item["state"] == "shutoff":
                running.client.delete(f"/domains/{item['id']}")
        assert time.monotonic() < deadline, "domains without a socket are still listed"
        time.sleep(0.1)


def _section(series: dict[str, Series], answers: Series, count: int) -> Section:
    script, ours = series["bare script"], series["blockjobd"]
    ratio = ours.median / script.median
    rows = [
        [contender, f"{of.median:.2f} s", f"{of.worst:.2f} s", f"{of.median / script.median:.2f}", str(len(of.values))]
        for contender, of in series.items()
    ]
    meanwhile = [["GET /jobs?active=true", ms(answers.median), ms(answers.p95), ms(answers.p99), ms(answers.worst)]]
    note = f"Until all of {count} merges of 8 MiB, begun at once on {count} QEMUs, are known to be done."
    return Section(
        name="many",
        title="Many merges at once",
        tables=[
            Table(["merges", "median", "worst", "to bare", "runs"], rows, note),
            Table(["meanwhile", "median", "p95", "p99", "worst"], meanwhile),
        ],
        goals=[Goal("no aim was set; next to the bare script", f"{ratio:.2f} times", met=True)],
        pictures=[
            Picture(
                "bench-many.svg",
                f"{count} merges at once, until all are done (median)",
                "s",
                {"merges": {contender: of.median for contender, of in series.items()}},
            )
        ],
        figures={"seconds": {name: of.json() for name, of in series.items()}, "answers": answers.json()},
    )
