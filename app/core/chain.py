"""A disk's layers, from the active one down, and how a layer is named.

Layers are told apart by QEMU's node-names while QEMU runs, and by file when it does not. Nothing here opens a file.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Identity = tuple[int, int]
"""(st_dev, st_ino) of a file: what symlinks, hard links, `..` and bind mounts can't disguise."""

INDEXED = re.compile(r"(?P<disk>.+)\[(?P<index>[0-9]{1,9})\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One image of a backing chain.

    Sizes are in bytes. `backing` is the string in this image's own header, as it stands there, or None. `identity`
    is None where the service can't see the file, `device` the number of a block device (st_rdev). `born` is when
    the file was made (ns since 1970), None where nobody can tell. `unheld`: the process behind the monitor can be
    seen, and does not have the file open; `replaced`: it has another one, that was called so before. `folder` is
    the file's folder with symlinks resolved. `name` is QEMU's own name of the image (`json:{…}` where a path alone
    does not say all), empty where QEMU was not asked. `data_file` is the file that holds the data of an image whose
    own file holds none of it. `corrupt`, `dirty` (its last writer did not close it, or has it open), `snapshots`
    (how many internal ones), `bitmaps` (the names of persistent ones) and `version_2` are what a qcow2 image says
    of itself. `tracking` are the names of the dirty bitmaps that QEMU keeps of it now; one without a name belongs
    to another node. `read_only` says whether QEMU has it open for reading only, `encrypted` whether it takes a key,
    `packed` whether it is of a kind that is written once (a stream-optimized vmdk). `broken_bitmaps` are persistent
    bitmaps that were not stored when QEMU ended. `filters` are the filter nodes
    right above this layer, topmost first, and `below` the nodes that carry its file (protocol node last), both as
    QEMU names them.
    """

    file: str
    format: str
    node: str
    virtual_size: int
    actual_size: int
    backing: str | None = None
    backing_format: str | None = None
    identity: Identity | None = None
    device: int | None = None
    born: int | None = None
    unheld: bool = False
    replaced: bool = False
    folder: str | None = None
    cluster_size: int = 65536
    name: str = ""
    data_file: str | None = None
    corrupt: bool = False
    dirty: bool = False
    snapshots: int = 0
    bitmaps: tuple[str, ...] = ()
    tracking: tuple[str, ...] = ()
    version_2: bool = False
    read_only: bool = False
    encrypted: bool = False
    packed: bool = False
    broken_bitmaps: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    below: tuple[str, ...] = ()

    @property
    def relative(self) -> bool:
        """Whether the header names the layer below relative to this image's own folder."""
        return self.backing is not None and not self.backing.startswith("/") and ":" not in self.backing.split("/")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class NotDeleted:
    """An image that a deletion left in place, and why."""

    file: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk of a domain and its chain.

    `name` is the target name (`vda`), `node` the node-name of the disk's root (a filter's, if one is on top), which
    QMP takes as `device`; None without a medium. `backend` is the `-drive` id, `qdev` QEMU's name of the device.
    `layers[0]` is the active layer. `temporary` is true when the active layer is thrown away at exit (`-snapshot`).
    `running_jobs` are the ids of the block jobs, anybody's, that QEMU runs on this disk's nodes.
    """

    name: str
    aliases: tuple[str, ...] = ()
    node: str | None = None
    backend: str | None = None
    qdev: str | None = None
    read_only: bool = False
    layers: tuple[Layer, ...] = ()
    temporary: bool = False
    running_jobs: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the chain, active layer first."""
        return tuple(layer.file for layer in self.layers)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The format nodes of the chain, active layer first."""
        return tuple(layer.node for layer in self.layers)

    @property
    def virtual_size(self) -> int:
        """What the guest sees, in bytes; 0 without a medium."""
        return self.layers[0].virtual_size if self.layers else 0

    @property
    def digest(self) -> str:
        """A fingerprint of the chain: other if, and only if, a layer, a format or a header is another."""
        parts = [[layer.file, layer.format, layer.backing] for layer in self.layers]
        return "sha256:" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def answers_to(self, name: str, identity: Identity | None) -> bool:
        """Whether `name` (or the file with `identity`) is one of this disk's names."""
        if name == self.name or name in self.aliases:
            return True
        return any(_is_file(layer, name, identity) for layer in self.layers)

    def find(self, name: str, identity: Identity | None = None) -> int | None:
        """The position in the chain of the layer called `name`, or None.

        A name is `DISK[N]`, a node-name, a path, or the string by which the layer above names it in its header.
        `identity` is that of the file at the path, where it is one that the service can see.
        """
        if indexed := INDEXED.fullmatch(name):
            index = int(indexed["index"])
            if indexed["disk"] in (self.name, *self.aliases):
                return index if index < len(self.layers) else None
        for position, layer in enumerate(self.layers):
            if layer.node == name or _is_file(layer, name, identity):
                return position
        for position, above in enumerate(self.layers[:-1]):
            if above.backing == name:
                return position + 1
        return None


def _is_file(layer: Layer, name: str, identity: Identity | None) -> bool:
    if layer.file == name or (name.startswith("/") and layer.file == posixpath.normpath(name)):
        return True
    return identity is not None and layer.identity == identity


def matching_disks(disks: Iterable[Disk], name: str, identity: Identity | None) -> Sequence[Disk]:
    """The disks that answer to `name`; no kind of name wins over another, as nobody can tell which one was meant."""
    return [disk for disk in disks if disk.answers_to(name, identity)]
