"""The simulated QEMU against a real one: the same stories, told through the same port, end in the same way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

import pytest

from app.core.errors import CANCELED
from app.core.evidence import Process
from app.core.headers import HeaderFacts
from app.core.job import Job, accept
from app.core.kinds import commit
from app.core.kinds.commit import CommitFlag, CommitRequest, CommitSelection
from app.core.plan import Facts, Plan
from app.drivers.qmp.driver import QmpDriver
from app.engine.ports.driver import Address, Declined, Runner
from tests.engine.simulation.hazards import NONE
from tests.engine.simulation.life import Life
from tests.engine.simulation.loop import SimLoop
from tests.engine.simulation.monitor import Monitor
from tests.engine.simulation.ports import SimDriver
from tests.engine.simulation.world import Machine, World
from tests.support.chains import MIB, blockdev, build_chain
from tests.support.qemu import Qemu

LAYERS: Final = 4
LOOKS: Final = 400


@dataclass(slots=True)
class Stage:
    """A QEMU with one disk of four layers, whose nodes its starter has made."""

    runner: Runner

    async def job(self, id_: str, *, top: int = 0, bandwidth: int = 0) -> Job:
        """The job that merges from `top` down to the last layer."""
        (disk,) = await self.runner.disks()
        flags = CommitFlag.ACTIVE if top == 0 else CommitFlag(0)
        chosen = commit.select(disk, CommitRequest(top=f"{disk.name}[{top}]", flags=flags, bandwidth=bandwidth))
        assert isinstance(chosen, CommitSelection), chosen
        # Whoever asks here has looked: every name leads to the base.
        named = dict.fromkeys(commit.inquiry(chosen).names, chosen.base.identity)
        plan = commit.plan(chosen, Facts(header=HeaderFacts(named=named, room=1023)))
        assert isinstance(plan, Plan), plan
        return accept(plan, id_=id_, domain="vm", requested_by="test", now=0)

    async def until(self, job: Job, *statuses: str) -> str | None:
        """Wait for a status; QEMU's error then."""
        for _ in range(LOOKS):
            seen = (await self.runner.observe()).get(job.id)
            assert seen is not None, f"{job.id} is gone"
            if seen.status in statuses:
                return seen.error
            await asyncio.sleep(0.05)
        raise AssertionError(f"{job.id} never was {statuses}")

    async def nodes(self) -> tuple[str, ...]:
        """The disk's format nodes."""
        (disk,) = await self.runner.disks()
        return disk.nodes


async def pivot(stage: Stage) -> None:
    """A merge of the active layer is ready, pivots, stays until it is dismissed, and leaves the disk free."""
    job = await stage.job("bj-1")
    await stage.runner.start(job)
    assert await stage.until(job, "ready") is None
    assert await stage.nodes() == job.spec.disk.nodes
    await stage.runner.pivot(job.id)
    assert await stage.until(job, "concluded") is None
    assert await stage.nodes() == job.spec.disk.nodes[-1:]
    report = stage.runner.final_reports[job.id]
    assert (report.status, report.error) == ("concluded", None)
    await stage.runner.conclude(job.id, job.spec.release)
    await stage.runner.conclude(job.id, job.spec.release)
    assert await stage.runner.observe() == {}
    assert job.id not in stage.runner.final_reports


async def below(stage: Stage) -> None:
    """A merge below the active layer waits at pending, and changes the header once it is finalized."""
    job = await stage.job("bj-1", top=1)
    (before,) = await stage.runner.disks()
    await stage.runner.start(job)
    await stage.until(job, "pending")
    assert await stage.nodes() == job.spec.disk.nodes
    await stage.runner.flush(job.spec.base.node)
    await stage.runner.finalize(job.id)
    assert await stage.until(job, "concluded") is None
    (after,) = await stage.runner.disks()
    assert after.nodes == (job.spec.disk.nodes[0], job.spec.disk.nodes[-1])
    assert after.layers[0].backing == job.spec.backing_file
    assert after.layers[0].identity == before.layers[0].identity
    await stage.runner.conclude(job.id, job.spec.release)
    again = await stage.job("bj-2")
    await stage.runner.start(again)
    await stage.until(again, "ready")


async def leftovers_block_the_disk(stage: Stage) -> None:
    """Until the nodes of merged layers are deleted, they are in the way of the next job."""
    job = await stage.job("bj-1", top=1)
    shorter = await stage.job("bj-2")
    await stage.runner.start(job)
    with pytest.raises(Declined, match=r"Need a root block node|in use by block job"):
        await stage.runner.start(shorter)
    await stage.until(job, "pending")
    await stage.runner.finalize(job.id)
    await stage.until(job, "concluded")
    with pytest.raises(Declined):
        await stage.runner.start(shorter)


async def abort(stage: Stage) -> None:
    """At ready a gentle cancel ends without error and without a pivot."""
    job = await stage.job("bj-1")
    await stage.runner.start(job)
    await stage.until(job, "ready")
    await stage.runner.abort(job.id, force=False)
    assert await stage.until(job, "concluded") is None
    assert await stage.nodes() == job.spec.disk.nodes
    await stage.runner.conclude(job.id)


async def abort_by_force(stage: Stage) -> None:
    """A cancel by force ends with an error, also while the job is paused."""
    for number, paused in enumerate((False, True)):
        job = await stage.job(f"bj-{number}", top=1, bandwidth=65536)
        await stage.runner.start(job)
        if paused:
            await stage.runner.pause(job.id)
            await stage.until(job, "paused")
        await stage.runner.abort(job.id, force=True)
        assert await stage.until(job, "concluded") == CANCELED
        assert await stage.nodes() == job.spec.disk.nodes
        assert stage.runner.final_reports[job.id].error == CANCELED
        await stage.runner.abort(job.id, force=True)
        await stage.runner.conclude(job.id)


async def pause(stage: Stage) -> None:
    """A pause lasts until the job is resumed; each may be asked for twice."""
    job = await stage.job("bj-1", top=1, bandwidth=65536)
    await stage.runner.start(job)
    for _ in range(2):
        await stage.runner.pause(job.id)
    await stage.until(job, "paused")
    await stage.runner.set_speed(job.id, 0)
    await asyncio.sleep(0.3)
    await stage.until(job, "paused")
    for _ in range(2):
        await stage.runner.resume(job.id)
    await stage.until(job, "pending")


async def unknown_job(stage: Stage) -> None:
    """What is to end a job that is not there does no harm; what is to steer it is declined."""
    await stage.runner.abort("bj-no", force=False)
    await stage.runner.abort("bj-no", force=True)
    await stage.runner.finalize("bj-no")
    await stage.runner.conclude("bj-no")
    steering: list[Callable[[], Awaitable[None]]] = [
        lambda: stage.runner.pivot("bj-no"),
        lambda: stage.runner.pause("bj-no"),
        lambda: stage.runner.resume("bj-no"),
        lambda: stage.runner.set_speed("bj-no", 1),
    ]
    for steer in steering:
        with pytest.raises(Declined, match="not found"):
            await steer()


async def not_ready(stage: Stage) -> None:
    """A pivot of a job that is not ready is declined, and its id can't be used twice."""
    job = await stage.job("bj-1", top=1, bandwidth=65536)
    await stage.runner.start(job)
    with pytest.raises(Declined, match=r"cannot accept command verb 'complete'|cannot be completed"):
        await stage.runner.pivot(job.id)
    with pytest.raises(Declined):
        await stage.runner.start(job)


STORIES: Final[Mapping[str, Callable[[Stage], Awaitable[None]]]] = {
    story.__name__: story
    for story in (pivot, below, leftovers_block_the_disk, abort, abort_by_force, pause, unknown_job, not_ready)
}


def on_simulated(story: Callable[[Stage], Awaitable[None]]) -> None:
    """Tell a story to the simulated QEMU."""
    loop = SimLoop(lambda: 0.001)
    world = World(Random(3), loop, NONE)
    world.instant = False
    active = world.make_chain("/images", "vda", LAYERS)
    machine = Machine(
        name="vm",
        monitor=Monitor(world, "vm"),
        disks=(world.make_disk("vda", active, backend=None),),
        uuid=None,
        blockdev=True,
        stable=True,
        remote=False,
        discovered=False,
        offline=False,
    )
    world.machines["vm"] = machine
    world.start(machine)

    async def tell() -> None:
        runner = await SimDriver(world, Life("test")).connect(machine.address, _no_hint)
        await story(Stage(runner))
        await runner.close()

    try:
        loop.run_until_complete(tell())
    finally:
        loop.close()


def on_real(story: Callable[[Stage], Awaitable[None]], folder: Path) -> None:
    """Tell a story to a real QEMU."""
    chain = build_chain(folder, LAYERS, size=4 * MIB)
    monitor = folder / "m.qmp"

    async def tell() -> None:
        driver = QmpDriver(10)
        runner = await driver.connect(Address(unix=str(monitor)), _no_hint)
        assert driver.alive(runner.facts.process)
        assert not driver.alive(Process(pid=runner.facts.process.pid, started=1, uuid=None))
        await story(Stage(runner))
        await runner.close()

    with Qemu(monitor, blockdev(chain)):
        asyncio.run(tell())


def _no_hint() -> None:
    """The stories look for themselves."""


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
def test_the_simulated_qemu_keeps_the_contract(story: Callable[[Stage], Awaitable[None]]) -> None:
    """What is told below of a real QEMU holds for the simulated one."""
    on_simulated(story)


@pytest.mark.live
@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
def test_a_real_qemu_keeps_the_contract(story: Callable[[Stage], Awaitable[None]], tmp_path: Path) -> None:
    """The stories are true."""
    on_real(story, tmp_path)
