"""What the directory of domains knows of disks, while it is read and forgotten at the same time."""

from __future__ import annotations

import asyncio
from typing import cast

from app.core.chain import Disk, Layer
from app.engine.known import KnownDisks
from app.engine.ports.images import Images


class OneDisk:
    """The `Images` port as far as it is needed: each image is a disk of one layer."""

    async def offline_disk(self, name: str, image: str) -> Disk:
        """The disk."""
        await asyncio.sleep(0)
        layer = Layer(
            file=image,
            format="qcow2",
            node="",
            virtual_size=1,
            actual_size=1,
            backing=None,
            backing_format=None,
            identity=(1, 2),
        )
        return Disk(name=name, layers=(layer,))


def test_a_domain_that_is_forgotten_while_it_is_read_anew() -> None:
    """Another domain's plan reads all that are off; the one that was forgotten meanwhile does not come back by that."""

    async def story() -> None:
        for turns in range(4):
            known = KnownDisks(cast("Images", OneDisk()))
            await known.read_off("gone", {"vda": "/b.qcow2"})
            reading = asyncio.create_task(known.refresh())
            for _ in range(turns):
                await asyncio.sleep(0)
            known.drop("gone")
            await reading
            assert known.of("gone") == ()
            await known.refresh()
            assert known.of("gone") == ()

    asyncio.run(story())
