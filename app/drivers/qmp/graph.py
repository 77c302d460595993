"""From QEMU's replies to disks and chains, by node. Nothing here asks QEMU; `app.drivers.qmp.runner` does.

QEMU before 10.1 does not say outright which node is whose child. `query-blockstats` without arguments does so by its
nesting: every entry has `parent`, the node of its file, and `backing`, the node below. A filter has the node that it
filters as both.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Final

from app.core.chain import Disk, Layer
from app.core.headers import meaning
from app.core.orphan import OrphanJob
from app.core.plan import Parent
from app.drivers.qmp.blocks import Device, Node, Stats
from app.drivers.qmp.replies import BlockGraph, BlockJob, Export

FILTERS: Final = frozenset(
    {
        "blkdebug",
        "blklogwrites",
        "blkreplay",
        "blkverify",
        "commit_top",
        "compress",
        "copy-before-write",
        "copy-on-read",
        "mirror_top",
        "preallocate",
        "snapshot-access",
        "throttle",
    }
)
"""Drivers that pass data through (QAPI `BlockdevDriver`; two are those that jobs insert): no layers."""

SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
LETTERS: Final = 26


class Torn(Exception):
    """The replies are of different moments: one names a node that another does not have."""


def bus_prefix(device_type: str | None, controller_type: str | None) -> str:
    """How target names on the device's bus begin; both are QOM type names, the controller is the bus's owner."""
    if device_type is None:
        return "xd"
    if device_type.startswith("virtio-blk"):
        return "vd"
    if device_type.startswith(("scsi-", "usb-")):
        return "sd"
    if device_type.startswith("ide-"):
        return "sd" if controller_type is not None and "ahci" in controller_type else "hd"
    return "fd" if device_type == "floppy" else "xd"


def target_name(prefix: str, number: int) -> str:
    """The target name of the disk with that number (from 0) on its kind of bus: vda … vdz, vdaa …."""
    letters = ""
    number += 1
    while number:
        number, letter = divmod(number - 1, LETTERS)
        letters = chr(ord("a") + letter) + letters
    return prefix + letters


def key_of(device: Device) -> str:
    """What a device is told from others by, for the life of the process."""
    return device.qdev or f"drive {device.backend}"


def name_devices(devices: Sequence[Device], prefixes: Mapping[str, str], names: dict[str, str]) -> None:
    """Give each device that has none in `names` a target name that no device has ever had.

    `prefixes` maps a device (as query-block names it) to the beginning of its name. A device keeps its name when others
    go, and nobody gets the name of one that has gone: a script that knows the name would work on another disk.
    """
    taken = set(names.values())
    for device in devices:
        if key_of(device) not in names:
            prefix = prefixes.get(device.qdev or "", "xd")
            number = next(number for number in count() if target_name(prefix, number) not in taken)
            names[key_of(device)] = target_name(prefix, number)
            taken.add(names[key_of(device)])


def nodes_of_images(devices: Sequence[Device], stats: Sequence[Stats], known: Mapping[str, Node]) -> dict[str, Node]:
    """The nodes of all chains from what query-block says of their images, which is safe to ask at any time.

    It lists the same nodes as query-blockstats, in the same order, and without their names. `known` are nodes as they
    were before, of which those stay that are in no chain. Raises `Torn`.
    """
    nodes = dict(known)
    by_device = {(entry.backend, entry.qdev): entry for entry in stats}
    for device in devices:
        at = by_device.get((device.backend, device.qdev)) if device.medium else None
        # It says whether the disk is written to; all below its active layer is as a rule only read.
        read_only = device.medium.read_only if device.medium else True
        for image in device.medium.images if device.medium else ():
            if at is None:
                raise Torn
            name = at.node or ""
            nodes[name] = replace(image, name=name, read_only=known[name].read_only if name in known else read_only)
            read_only = read_only if image.driver in FILTERS else True
            at = at.backing or at.carrier if image.driver in FILTERS else at.backing
        if at is not None:
            raise Torn
    return nodes


def read_disks(
    *,
    devices: Sequence[Device],
    stats: Sequence[Stats],
    nodes: Mapping[str, Node],
    graph: BlockGraph | None,
    names: Mapping[str, str],
    folder: str | None,
) -> tuple[Disk, ...]:
    """The disks, in QEMU's order.

    `devices`, `stats`, `nodes` are what query-block, query-blockstats and query-named-block-nodes (flat) return,
    `graph` what x-debug-query-block-graph does (None: no job runs). `names` are the target names of the devices, by
    `key_of`; `folder` is QEMU's working directory. Raises `Torn`.
    """
    by_device = {(entry.backend, entry.qdev): entry for entry in stats}
    disks: list[Disk] = []
    for device in devices:
        backend, qdev, medium = device.backend, device.qdev, device.medium
        name = names[key_of(device)]
        root = by_device.get((backend, qdev)) if medium else None
        node = medium.node if medium else None
        aliases = [alias for alias in (device_id(qdev), backend, node) if alias and alias != name]
        disks.append(
            Disk(
                name=name,
                aliases=tuple(dict.fromkeys(aliases)),
                node=node,
                backend=backend or None,
                qdev=qdev,
                read_only=medium is not None and medium.read_only,
                layers=_layers(root, nodes, folder) if root else (),
                running_jobs=_jobs_on(graph, backend or qdev or "") if graph else (),
            )
        )
    return tuple(disks)


def device_id(qdev: str | None) -> str | None:
    """The id that the device was given, from how query-block names it: the id itself, or a QOM path."""
    if qdev is None or not qdev.startswith("/"):
        return qdev
    parts = qdev.split("/")
    return parts[3] if len(parts) > 3 and parts[1:3] == ["machine", "peripheral"] else None


def _layers(root: Stats, nodes: Mapping[str, Node], folder: str | None) -> tuple[Layer, ...]:
    layers: list[Layer] = []
    filters: list[str] = []
    at: Stats | None = root
    while at is not None:
        node = nodes.get(at.node or "")
        if node is None:
            raise Torn
        if node.driver in FILTERS:
            filters.append(node.name)
            at = at.backing or at.carrier
            continue
        layers.append(_layer(node, list(_below(at)), filters, nodes, folder))
        filters = []
        at = at.backing
    return tuple(layers)


def _layer(
    node: Node, below: Sequence[str], filters: Sequence[str], nodes: Mapping[str, Node], folder: str | None
) -> Layer:
    carrier = nodes.get(below[-1], node) if below else node
    file = _path(carrier.file, folder)
    if node.data_file is not None or carrier is node:
        # The node below is where the data is, and the header is elsewhere; or no node below is known. QEMU's name of
        # the image tells of the header's file.
        means = meaning(node.file, overlay="", folder=folder)
        file = means.path if means is not None and means.path is not None else node.file
    return Layer(
        file=file,
        format=node.driver,
        node=node.name,
        virtual_size=node.virtual_size,
        actual_size=node.actual_size or 0,
        backing=node.backing,
        backing_format=node.backing_format,
        cluster_size=node.cluster_size or 65536,
        name=node.file,
        data_file=node.data_file,
        corrupt=node.corrupt,
        dirty=node.dirty,
        snapshots=node.snapshots,
        bitmaps=node.bitmaps,
        tracking=node.tracking,
        version_2=node.version_2,
        read_only=node.read_only,
        encrypted=node.encrypted,
        packed=node.packed,
        broken_bitmaps=node.broken_bitmaps,
        filters=tuple(filters),
        below=tuple(below),
    )


def parents(
    graph: BlockGraph, exports: Sequence[Export], nodes: Mapping[str, Node]
) -> Mapping[str, tuple[Parent, ...]]:
    """Who has which node below itself, by node; an export is called by its id.

    A node that others can write below, as nobody reads it, is one that a merge has left over if it can't be written
    itself. `nodes` are all that are known.
    """
    names: dict[str, list[str]] = {}
    for export in exports:
        names.setdefault(export.node, []).append(f"export {export.id}")
    found: dict[str, list[Parent]] = {}
    for edge in graph.edges:
        above, below = graph.nodes[edge.parent], graph.nodes[edge.child]
        name = above.name
        if above.type == "block-backend" and not name:
            of_node = names.get(below.name)
            name = of_node.pop() if of_node else "an unnamed user"
        found.setdefault(below.name, []).append(
            Parent(above.type, name, edge.name, edge.shares_write and name in nodes and nodes[name].read_only)
        )
    return {node: tuple(above) for node, above in found.items()}


def read_orphan(
    job: BlockJob, *, disks: Sequence[Disk], nodes: Mapping[str, Node], graph: BlockGraph, folder: str | None
) -> OrphanJob:
    """The nodes that a job holds, by the role that QEMU gives them, and those of them that are in no chain any more.

    The arguments are as in `read_disks`. Filters are left out, as they are no layers.
    """
    held: dict[str, list[str]] = {}
    files: dict[str, str] = {}
    for edge in graph.edges:
        parent, child = graph.nodes[edge.parent].name, graph.nodes[edge.child].name
        if parent == job.id:
            if (node := nodes.get(child)) is None or node.driver not in FILTERS:
                held.setdefault(edge.name, []).append(child)
        elif edge.name == "file":
            files[parent] = child
    in_chains = {node for disk in disks for node in disk.nodes}
    loose = {
        name: _layer(nodes[name], list(_carriers(name, files)), (), nodes, folder)
        for names in held.values()
        for name in names
        if name in nodes and name not in in_chains
    }
    return OrphanJob(
        job_type=job.type,
        speed=job.speed,
        disks=tuple(disks),
        held={role: tuple(names) for role, names in held.items()},
        loose=loose,
    )


def _carriers(node: str, files: Mapping[str, str]) -> Iterable[str]:
    # There are no more steps than files, unless the files go round in a circle.
    for _ in files:
        if node not in files:
            return
        node = files[node]
        yield node


def _below(at: Stats) -> Iterable[str]:
    carrier = at.carrier
    while carrier is not None:
        if carrier.node is not None:
            yield carrier.node
        carrier = carrier.carrier


def _path(file: str, folder: str | None) -> str:
    if file.startswith("/") or SCHEME.match(file) or folder is None:
        return file
    return posixpath.normpath(posixpath.join(folder, file))


def _jobs_on(graph: BlockGraph, backend: str) -> tuple[str, ...]:
    """The jobs that use a node which the disk's chain consists of, filters of jobs among them."""
    children: dict[int, list[int]] = {}
    for edge in graph.edges:
        children.setdefault(edge.parent, []).append(edge.child)
    reached: set[int] = set()
    todo = [node.id for node in graph.nodes.values() if node.type == "block-backend" and node.name == backend]
    while todo:
        for child in children.get(todo.pop(), ()):
            if child not in reached:
                reached.add(child)
                todo.append(child)
    return tuple(
        node.name
        for node in graph.nodes.values()
        if node.type == "block-job" and reached.intersection(children.get(node.id, ()))
    )
