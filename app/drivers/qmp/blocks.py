"""Disks and nodes as a monitor tells of them, as values; see `app.drivers.qmp.replies`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from app.drivers.qmp.checks import (
    DEPTH_MAX,
    Members,
    Wrong,
    boolean,
    cluster,
    count,
    list_of,
    member,
    members,
    name,
    optional,
    path,
    text,
)


@dataclass(frozen=True, slots=True)
class Medium:
    """What is in a device (QAPI `BlockDeviceInfo`): its root node, and the images of its chain, active one first."""

    node: str
    read_only: bool
    images: tuple[Node, ...] = ()


@dataclass(frozen=True, slots=True)
class Device:
    """A device of query-block (QAPI `BlockInfo`). `backend` is empty for a node that `-blockdev` made."""

    backend: str
    qdev: str | None
    medium: Medium | None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Stats:
    """A node of query-blockstats (QAPI `BlockStats`), for its place among the others.

    `carrier` is the node of its file (QAPI `parent`), `backing` is the node below. Python compares and prints values
    by recursion, for which a chain may be too long, so these are neither compared nor printed.
    """

    backend: str
    qdev: str | None
    node: str | None
    carrier: Stats | None
    backing: Stats | None


@dataclass(frozen=True, slots=True)
class Node:
    """A node of query-named-block-nodes (QAPI `BlockDeviceInfo`, and `ImageInfo` in it). Sizes are in bytes."""

    name: str
    driver: str
    file: str
    virtual_size: int
    actual_size: int | None
    cluster_size: int | None
    backing: str | None
    backing_format: str | None
    data_file: str | None = None
    corrupt: bool = False
    dirty: bool = False
    snapshots: int = 0
    bitmaps: tuple[str, ...] = ()
    version_2: bool = False
    read_only: bool = False
    encrypted: bool = False
    packed: bool = False
    broken_bitmaps: tuple[str, ...] = ()
    tracking: tuple[str, ...] = ()
    """The names of the dirty bitmaps that QEMU keeps on the node now; empty for one that is another node's own."""


def _medium(value: object) -> Medium:
    of = members(value)
    root, read_only = member(of, "node-name", name), member(of, "ro", boolean)
    images: list[Node] = []
    image = optional(of, "image", members)
    while image is not None and len(images) < DEPTH_MAX:
        images.append(_image(image, "", member(image, "format", name), member(image, "filename", path), read_only=True))
        image = optional(image, "backing-image", members)
    return Medium(root, read_only, tuple(images))


def device(value: object) -> Device:
    """A device of query-block."""
    of = members(value)
    return Device(optional(of, "device", name) or "", optional(of, "qdev", path), optional(of, "inserted", _medium))


def _node(value: object) -> Node:
    of = members(value)
    image = member(of, "image", members)
    try:
        node = _image(
            image,
            member(of, "node-name", name),
            member(of, "drv", name),
            member(of, "file", path),
            read_only=optional(of, "ro", boolean) or False,
        )
        bitmaps = optional(of, "dirty-bitmaps", list_of(_tracked)) or ()
        broken = tuple(called for called, inconsistent in bitmaps if inconsistent)
        return replace(node, tracking=tuple(called for called, _ in bitmaps), broken_bitmaps=broken)
    except Wrong as wrong:
        if wrong.places and wrong.places[-1].lstrip(".") in IMAGE:
            wrong.places.append(".image")
        raise


def _image(image: Members, node: str, driver: str, file: str, *, read_only: bool) -> Node:
    """A node by what QEMU says of its image (QAPI `ImageInfo`)."""
    specific = optional(image, "format-specific", _specific) or _Specific()
    return Node(
        name=node,
        driver=driver,
        file=file,
        virtual_size=member(image, "virtual-size", count),
        actual_size=optional(image, "actual-size", count),
        cluster_size=optional(image, "cluster-size", cluster),
        backing=optional(image, "backing-filename", path),
        backing_format=optional(image, "backing-filename-format", name),
        data_file=specific.data_file,
        corrupt=specific.corrupt,
        dirty=optional(image, "dirty-flag", boolean) or False,
        snapshots=len(optional(image, "snapshots", list_of(members)) or ()),
        bitmaps=specific.bitmaps,
        version_2=specific.version_2,
        read_only=read_only,
        encrypted=optional(image, "encrypted", boolean) or False,
        packed=specific.packed,
    )


IMAGE: Final = frozenset(
    {
        *("virtual-size", "actual-size", "cluster-size", "backing-filename", "backing-filename-format"),
        *("snapshots", "format-specific", "dirty-flag", "encrypted"),
    }
)
"""The members of an image that are used."""


@dataclass(frozen=True, slots=True)
class _Specific:
    """What the format of a node's image says (QAPI `ImageInfoSpecificQCow2`, `ImageInfoSpecificVmdk`)."""

    data_file: str | None = None
    corrupt: bool = False
    bitmaps: tuple[str, ...] = ()
    version_2: bool = False
    packed: bool = False


def _specific(value: object) -> _Specific:
    of = members(value)
    type_ = optional(of, "type", name)
    if type_ not in ("qcow2", "vmdk"):
        return _Specific()
    data = member(of, "data", members)
    if type_ == "vmdk":
        return _Specific(packed=optional(data, "create-type", text) == "streamOptimized")
    bitmaps = optional(data, "bitmaps", list_of(_bitmap)) or ()
    return _Specific(
        data_file=optional(data, "data-file", path),
        corrupt=optional(data, "corrupt", boolean) or False,
        bitmaps=tuple(bitmaps),
        version_2=optional(data, "compat", name) == "0.10",
    )


def _tracked(value: object) -> tuple[str, bool]:
    of = members(value)
    return optional(of, "name", text) or "", optional(of, "inconsistent", boolean) or False


def _bitmap(value: object) -> str:
    return member(members(value), "name", text)


_nodes = list_of(_node)


def nodes_by_name(value: object) -> Mapping[str, Node]:
    """The nodes of query-named-block-nodes, by name."""
    return {node.name: node for node in _nodes(value)}


def stat(of: Members, below: Mapping[str, Stats]) -> Stats:
    """A node of query-blockstats, over those that it has below itself."""
    backend, qdev, node = optional(of, "device", name), optional(of, "qdev", path), optional(of, "node-name", name)
    return Stats(backend or "", qdev, node, below.get("parent"), below.get("backing"))
