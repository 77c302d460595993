"""The machines and images that a seed starts with."""

from __future__ import annotations

from tests.engine.simulation.monitor import Monitor
from tests.engine.simulation.nodes import GuestDisk
from tests.engine.simulation.world import Machine, World


def build(world: World) -> None:
    """Make some machines, and start them."""
    rng, hazards = world.rng, world.hazards
    count = rng.randint(2, 3) if hazards.gone_sharers else rng.randint(1, 3)
    shared: str | None = None
    lender = ""
    for number in range(count):
        remote = hazards.remote and not hazards.gone_sharers and rng.random() < 0.15
        machine = _machine(world, f"vm{number}", remote=remote, shared=shared)
        world.machines[machine.name] = machine
        if shared is not None and machine.pinned:
            # So does the one that they have it from.
            world.machines[lender].pinned = True
        if shared is None and not remote and (hazards.gone_sharers or rng.random() < 0.4):
            # The next ones may stand on this one's base, which is theirs too.
            lender = machine.name
            shared = world.files.chain(machine.disks[0].active)[-1].path
    for machine in world.machines.values():
        if not world.start(machine):
            raise AssertionError(f"{machine.name} can't be started")


def _machine(world: World, name: str, *, remote: bool, shared: str | None) -> Machine:
    rng, hazards = world.rng, world.hazards
    folder = "/remote" if remote else "/images"
    blockdev = rng.random() < 0.6
    shares = shared is not None and not remote and (hazards.gone_sharers or rng.random() < 0.6)
    disks: list[GuestDisk] = []
    for position in range(rng.choice([1, 1, 2])):
        target = f"vd{'ab'[position]}"
        base = [shared] if shares and position == 0 and shared is not None else None
        active = world.make_chain(folder, f"{name}-{target}", rng.randint(1 if base else 2, 4), base)
        disks.append(world.make_disk(target, active, backend=None if blockdev else f"drive-{target}"))
    return Machine(
        name=name,
        monitor=Monitor(world, name),
        disks=tuple(disks),
        uuid=f"00000000-0000-4000-8000-{name:0>12}" if rng.random() < 0.7 else None,
        blockdev=blockdev,
        stable=rng.random() < 0.5,
        remote=remote,
        discovered=not remote and rng.random() < 0.4,
        offline=rng.random() < 0.5,
        pinned=shares and not hazards.gone_sharers,
    )
