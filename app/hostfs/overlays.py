"""Overlays that nobody has told of, in the folders that the service may look into. Everything in here may block."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from app.core.chain import Identity
from app.core.headers import meaning
from app.core.images import Image, may_be_same
from app.engine.ports.images import Overlays
from app.hostfs.headers import header_at
from app.hostfs.identity import identity_of, image_at
from app.hostfs.roots import Roots

SEARCH_S: Final = 1.0
"""Seconds that one search may take."""

FILES_MAX: Final = 100_000
"""Files that are remembered, and that one search looks at."""

Signature = tuple[int, int, int, int]
"""(st_dev, st_ino, st_size, st_mtime_ns): another one is another content."""


class OverlayIndex:
    """Which image each file leads to, by its header; a header is read again once its file has changed."""

    def __init__(self, roots: Roots) -> None:
        self._roots = roots
        self._known: dict[str, tuple[Signature, str | None]] = {}

    def leading_to(self, wanted: frozenset[Identity], besides: Mapping[Identity, Sequence[Image]]) -> Overlays:
        """The files whose headers lead to one of the `wanted` images; those of `besides` are left out."""
        found: list[Image] = []
        until, seen = time.monotonic() + SEARCH_S, 0
        for path, status in self._files():
            seen += 1
            if seen > FILES_MAX or time.monotonic() > until:
                return Overlays(files=tuple(found), complete=False)
            below = self._below(path, status)
            if below is None or identity_of(below, None) not in wanted:
                continue
            image = image_at(path, None)
            # A file system gives the number of a file that was deleted to a new one, which is looked at.
            if not any(may_be_same(image, known) for known in besides.get((status.st_dev, status.st_ino), ())):
                found.append(_named(image))
        return Overlays(files=tuple(found))

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        for root in self._roots.folders:
            for folder, _, names in os.walk(root):
                for name in names:
                    path = f"{folder}/{name}"
                    try:
                        status = os.lstat(path)
                    except (OSError, ValueError):
                        continue
                    if stat.S_ISREG(status.st_mode) and status.st_size:
                        yield path, status

    def _below(self, path: str, status: os.stat_result) -> str | None:
        signature = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        known = self._known.get(path)
        if known is not None and known[0] == signature:
            return known[1]
        try:
            header = header_at(path, self._roots, (status.st_dev, status.st_ino))
            means = meaning(header.backing, overlay=path) if header.backing is not None else None
        except (OSError, ValueError):
            means = None
        below = means.path if means is not None else None
        if len(self._known) >= FILES_MAX:
            self._known.clear()
        self._known[path] = signature, below
        return below


def _named(image: Image) -> Image:
    """The image under a name that can be told: a file's name is bytes, and need not be UTF-8."""
    return replace(image, path=os.fsencode(image.path).decode(errors="replace"))


def overlays_on(index: OverlayIndex, images: Sequence[Image], besides: Sequence[Image]) -> Overlays:
    """The overlays on the images, as far as these can be seen."""
    wanted = frozenset(image.identity for image in images if image.identity is not None)
    known: dict[Identity, list[Image]] = {}
    for image in besides:
        if image.identity is not None:
            known.setdefault(image.identity, []).append(image)
    return index.leading_to(wanted, known) if wanted else Overlays()
