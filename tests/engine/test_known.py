"""What the directory of domains knows of disks, while it is read and forgotten at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from app.core.chain import Disk, Layer
from app.core.images import Image, ImageUse, format_of, uses_by
from app.engine.known import KnownDisks
from app.engine.ports.images import Images


class OneDisk:
    """The `Images` port as far as it is needed: each image is a disk of one layer."""

    async def offline_disk(self, domain: str, name: str, image: str, told: Sequence[ImageUse]) -> Disk:
        """The disk; where QEMU has told its format, it has that."""
        await asyncio.sleep(0)
        layer = Layer(
            file=image,
            format=format_of(Image(image, (1, 2), born=3), told, domain) or "qcow2",
            node="",
            virtual_size=1,
            actual_size=1,
            backing=None,
            backing_format=None,
            identity=(1, 2),
            born=3,
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


RAW = Disk(
    name="vda",
    layers=(Layer(file="/raw.img", format="raw", node="n", virtual_size=1, actual_size=1, identity=(1, 2), born=3),),
)


def test_the_format_that_qemu_told_stays_when_the_domain_is_off() -> None:
    """Over a restart of the service, too; what was only found in a file is not kept as told."""

    async def story() -> None:
        known = KnownDisks(cast("Images", OneDisk()))
        known.note("vm", (RAW,))
        stored = known.unrecorded("vm", 7)
        assert [use.format for use in stored["vm", "vda"]] == ["raw"]
        known = KnownDisks(cast("Images", OneDisk()))
        known.load(stored["vm", "vda"])
        assert [disk.layers[0].format for disk in await known.read_off("vm", {"vda": "/raw.img"})] == ["raw"]
        assert known.unrecorded("vm", 8) == {}
        await known.read_off("other", {"vda": "/b.qcow2"})
        assert [use.format for use in known.unrecorded("other", 8)["other", "vda"]] == [None]

    asyncio.run(story())


def test_a_reading_from_before_formats_were_kept_is_stored_anew() -> None:
    """The domain runs, and its QEMU tells the format of the image that the journal knows."""
    known = KnownDisks(cast("Images", OneDisk()))
    uses = uses_by("vm", RAW, seen_at=1)
    known.load(replace(use, format=None) for use in uses)
    known.note("vm", (RAW,))
    found = known.unrecorded("vm", 1)
    assert found == {("vm", "vda"): uses}
    known.recorded(found)
    assert known.unrecorded("vm", 2) == {}


def test_which_images_are_surely_raw() -> None:
    """Those of running domains, and of those that are off if it can be told that the file is still that one."""

    async def story() -> None:
        known = KnownDisks(cast("Images", OneDisk()))
        qcow2 = replace(RAW.layers[0], file="/q", format="qcow2", identity=(1, 4))
        unborn = replace(RAW.layers[0], file="/unborn", identity=(1, 5), born=None)
        device = replace(RAW.layers[0], file="/dev/x", identity=(1, 6), device=7)
        for number, layer in enumerate((RAW.layers[0], qcow2, unborn, device)):
            known.load(uses_by("off", Disk(name=f"vd{number}", layers=(layer,)), seen_at=1))
        assert known.headerless() == (Image.of(RAW.layers[0]),)
        disks = tuple(Disk(name=f"vd{number}", layers=(layer,)) for number, layer in enumerate((qcow2, unborn, device)))
        known.note("off", disks)
        assert known.headerless() == (Image.of(unborn), Image.of(device))
        known.note("off", (RAW,))
        # Another domain is registered with the same file, and nobody has seen its QEMU.
        assert [disk.layers[0].format for disk in await known.read_off("again", {"vda": "/raw.img"})] == ["raw"]

    asyncio.run(story())
