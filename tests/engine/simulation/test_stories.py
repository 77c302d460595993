"""Single stories on the simulated world: what happens when, at one moment that matters."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import pytest

from app.core.errors import Code, Problem, Refused
from app.core.kinds.commit import CommitRequest
from app.engine.ports.driver import Declined
from app.engine.ports.journal import JournalError, Registration
from app.engine.service import Service
from tests.engine.simulation.engine import Engine, Mutant, logs_into
from tests.engine.simulation.hazards import NONE
from tests.engine.simulation.loop import OWNER, SimLoop
from tests.engine.simulation.monitor import Monitor
from tests.engine.simulation.mutants import with_runner
from tests.engine.simulation.world import Machine, World

BELOW = CommitRequest(top="vda[1]")


class Scene:
    """A registered domain `vm0` with a chain of four layers, on a world in which nothing else happens."""

    def __init__(self, mutant: Mutant | None = None) -> None:
        self.loop = SimLoop(lambda: 0.001)
        self.world = World(Random(1), self.loop, NONE)
        self.engine = Engine(self.world, places=4, mutant=mutant)
        active = self.world.make_chain("/images", "vda", 4)
        self.machine = Machine(
            name="vm0",
            monitor=Monitor(self.world, "vm0"),
            disks=(self.world.make_disk("vda", active, backend=None),),
            uuid=None,
            blockdev=True,
            stable=True,
            remote=False,
            discovered=False,
            offline=False,
        )
        self.world.machines["vm0"] = self.machine

    @property
    def service(self) -> Service:
        """The service of the present life."""
        assert self.engine.service is not None
        return self.engine.service

    def play(self, story: Callable[[Scene], Awaitable[None]]) -> None:
        """Tell the story."""

        async def told() -> None:
            OWNER.set("world")
            self.world.start(self.machine)
            await self.loop.create_task(self.engine.start())
            await self.service.register(Registration(id="vm0", address=self.machine.address))
            await asyncio.sleep(3)
            await story(self)

        asyncio.set_event_loop(self.loop)
        try:
            with logs_into(lambda _entry: None):
                self.loop.run_until_complete(told())
        finally:
            self.engine.finished = True
            self.engine.kill()
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.run_until_complete(asyncio.sleep(1))
            self.loop.close()
            asyncio.set_event_loop(None)


def test_a_commit_behind_a_removal_is_refused() -> None:
    """What waits behind the removal of its domain makes no job that nobody would watch."""

    async def story(scene: Scene) -> None:
        service = scene.service
        # All three wait for the actor at once, in this order.
        read = asyncio.ensure_future(service.disks("vm0"))
        await asyncio.sleep(0)
        removal = asyncio.ensure_future(service.forget("vm0"))
        await asyncio.sleep(0)
        commit = asyncio.ensure_future(service.start("commit", "vm0", "vda", BELOW, who="ci"))
        _disks, removed, refused = await asyncio.gather(read, removal, commit, return_exceptions=True)
        assert removed is None
        assert isinstance(refused, Refused)
        assert refused.problem.code is Code.DOMAIN_NOT_FOUND
        assert scene.machine.qemu is not None
        assert scene.machine.qemu.jobs == {}

    Scene().play(story)


def test_a_removal_that_cannot_be_stored_changes_nothing() -> None:
    """With a full journal the domain stays, also over a restart, and takes jobs."""

    async def story(scene: Scene) -> None:
        scene.engine.faults.next.append("full")
        with pytest.raises(JournalError):
            await scene.service.forget("vm0")
        await scene.service.start("commit", "vm0", "vda", BELOW, who="ci")
        await scene.engine.stop()
        await asyncio.sleep(20)
        assert [domain.id for domain in await scene.service.domains()] == ["vm0"]
        assert (await scene.service.domain("vm0")).state == "running"

    Scene().play(story)


@pytest.mark.parametrize("hang", [False, True])
def test_a_domain_that_can_not_be_read_at_first_shows_later(*, hang: bool) -> None:
    """QEMU may decline to show its graph for a while: after a connection, or after a hang."""
    declining = {"times": 0 if hang else 1}

    async def disks(runner: Any) -> Any:
        if declining["times"] > 0:
            declining["times"] -= 1
            raise Declined(Problem(code=Code.QEMU_ERROR, detail="the block graph changes while it is read"))
        return await runner.disks()

    async def story(scene: Scene) -> None:
        if hang:
            declining["times"] = 1
            scene.world.hang(scene.machine, 40)
            await asyncio.sleep(30)
            assert (await scene.service.domain("vm0")).state == "unreachable"
            await asyncio.sleep(60)
        await asyncio.sleep(3)
        view = await scene.service.domain("vm0")
        assert (declining["times"], view.state, view.error) == (0, "running", None)

    Scene(with_runner(disks=disks)).play(story)
