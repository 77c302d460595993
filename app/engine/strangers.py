"""Overlays in the folders of images that nobody has told of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from app.core.images import Image, same_image
from app.core.sameness import Sameness
from app.engine.ports.images import Overlays
from app.engine.shared import Shared


async def strangers_on(shared: Shared, images: Sequence[Image], besides: Iterable[Image]) -> Overlays:
    """Files whose headers lead to one of the images, but for those `besides` and those that a merge has left behind."""
    # What stands in a raw image is the word of a guest.
    found = await shared.images.overlays_on(images, besides=[*besides, *shared.known.headerless()])
    if not found.files:
        return found
    marks = await shared.journal.invalid_marks(found.files)
    left = tuple(
        file for file in found.files if all(same_image(mark.image, file) is not Sameness.SAME for mark in marks)
    )
    return replace(found, files=left)
