"""Images as content: each cluster holds the number of the write that it came from, so that lost data shows."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, field
from typing import Final

CLUSTERS: Final = 12
"""How many clusters a disk has."""

CLUSTER: Final = 65536

Content = dict[int, int]
"""Cluster -> number of the write that it shows."""


@dataclass(slots=True, kw_only=True, eq=False)
class Image:
    """A file with an image: what of it is on the disk. `header` is the backing string in its header.

    `seen` is false where the file is on another host.
    """

    inode: int
    path: str
    clusters: Content = field(default_factory=Content)
    header: str | None = None
    seen: bool = True

    @property
    def size(self) -> int:
        """Bytes that the clusters take."""
        return len(self.clusters) * CLUSTER


class FileSystem:
    """The images of all hosts, by path. A file that is unlinked stays as long as a process has it open."""

    def __init__(self) -> None:
        self.paths: dict[str, Image] = {}
        self.full = False
        self.unlinked: list[str] = []
        self._inodes = 100

    def make(self, path: str, header: str | None, clusters: Content, *, seen: bool = True) -> Image:
        """A new image at that path."""
        self._inodes += 1
        image = Image(inode=self._inodes, path=path, header=header, clusters=dict(clusters), seen=seen)
        self.paths[path] = image
        return image

    def unlink(self, path: str) -> None:
        """Take the name away."""
        del self.paths[path]
        self.unlinked.append(path)

    def below(self, image: Image) -> Image | None:
        """The image that the header names; None where there is no backing image, `KeyError` where it is missing."""
        return None if image.header is None else self.paths[resolve(image.header, image.path)]

    def chain(self, path: str) -> list[Image]:
        """The images from that path down, as the headers on the disk say; raises `KeyError` for a missing one."""
        images: list[Image] = []
        at: Image | None = self.paths[path]
        while at is not None:
            images.append(at)
            at = self.below(at)
        return images


def resolve(header: str, overlay: str) -> str:
    """The path that a backing string means in the header of `overlay`."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(overlay), header))


def merged(layers: list[Content]) -> Content:
    """What layers show together, the topmost first."""
    view: Content = {}
    for layer in reversed(layers):
        view |= layer
    return view
