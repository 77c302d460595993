"""Disks and what jobs work on, from replies of which some are no QEMU's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from app.core.chain import Disk
from app.core.kinds import Spec, adopt
from app.core.plan import Plan
from app.drivers.qmp import graph, replies
from app.drivers.qmp.blocks import Device, Node
from app.drivers.qmp.replies import BlockGraph, GraphEdge, GraphNode

REPLIES: Final[dict[str, Any]] = json.loads(Path(__file__).with_name("qemu-7.2.json").read_text())["replies"]
NODES: Final = replies.NODES.read(REPLIES["query-named-block-nodes"])
JOB: Final = replies.BlockJob(id="bj-9", type="commit", status="running", io_status="ok", speed=0)


@pytest.fixture
def disks() -> tuple[Disk, ...]:
    """The recorded disk n2 over n1 over n0, and a drive without a medium."""
    devices, names = replies.DEVICES.read(REPLIES["query-block"]), dict[str, str]()
    graph.name_devices(devices, {}, names)
    stats = replies.STATS.read(REPLIES["query-blockstats"])
    return graph.read_disks(devices=devices, stats=stats, nodes=NODES, graph=None, names=names, folder=None)


def orphan(disks: tuple[Disk, ...], *edges: tuple[str, str, str]) -> Plan[Spec] | None:
    """What the job works on by a graph of these edges, each a parent, its child and what the child is to it."""
    ids = {name: number for number, name in enumerate({name for edge in edges for name in edge[:2]})}
    found = graph.read_orphan(
        JOB,
        disks=disks,
        nodes=NODES,
        graph=BlockGraph(
            nodes={id_: GraphNode(id=id_, type="block-driver", name=name) for name, id_ in ids.items()},
            edges=tuple(GraphEdge(parent=ids[parent], child=ids[child], name=name) for parent, child, name in edges),
        ),
        folder=None,
    )
    return adopt(found)


@pytest.mark.parametrize(
    ("qdev", "id_"),
    [
        (None, None),
        ("virtio0", "virtio0"),
        ("/machine/peripheral/virtio0/virtio-backend", "virtio0"),
        ("/machine/peripheral/virtio0", "virtio0"),
        ("/machine/peripheral-anon/device[0]", None),
        ("/machine/peripheral", None),
        ("/machine", None),
        ("/", None),
    ],
)
def test_device_id(qdev: str | None, id_: str | None) -> None:
    """A device's id stands in its QOM path, if it has one; any path is understood."""
    assert graph.device_id(qdev) == id_


def test_job_with_its_layers(disks: tuple[Disk, ...]) -> None:
    """A job works on the layers that it holds, above the base that it holds."""
    below = orphan(disks, ("bj-9", "n0", "base"), ("bj-9", "n1", "intermediate node"))
    assert below is not None
    assert (below.disk, below.spec.top_index, below.spec.base_index, below.bandwidth) == (disks[0], 1, 2, 0)
    whole = orphan(disks, ("bj-9", "n0", "target"), ("bj-9", "n2", "source"))
    assert whole is not None
    assert (whole.disk, whole.spec.top_index, whole.spec.base_index) == (disks[0], 0, 2)


def test_job_whose_layers_are_merged(disks: tuple[Disk, ...]) -> None:
    """Layers that are in no chain any more are put back above the base, with the files that carry them."""
    short = tuple(disk_without(disk, "n1") for disk in disks)
    found = orphan(
        short, ("bj-9", "n0", "base"), ("bj-9", "n1", "intermediate node"), ("n1", "fn1", "file"), ("n2", "fn2", "file")
    )
    assert found is not None
    assert (found.disk.nodes, found.spec.top_index, found.spec.base_index) == (("n2", "n1", "n0"), 1, 2)
    assert (found.disk.layers[1].file, found.disk.layers[1].below) == ("/images/l1.qcow2", ("fn1",))


def disk_without(disk: Disk, node: str) -> Disk:
    """The disk, of which a layer has gone."""
    layers = tuple(layer for layer in disk.layers if layer.node != node)
    return Disk(name=disk.name, node=disk.node, qdev=disk.qdev, layers=layers)


def test_jobs_that_cannot_be_told(disks: tuple[Disk, ...]) -> None:
    """A job without layers, with unknown layers, or with the base above them, is not told; a filter is no layer."""
    base = ("bj-9", "n0", "base")
    assert orphan(disks, ("other", "n0", "base")) is None
    assert orphan(disks, base) is None
    assert orphan(disks, base, ("bj-9", "throttle", "intermediate node")) is None
    assert orphan(disks, base, ("bj-9", "none", "intermediate node")) is None
    assert orphan(disks, ("bj-9", "n1", "base"), ("bj-9", "n0", "intermediate node")) is None
    assert orphan(disks, ("bj-9", "n1", "base"), ("bj-9", "n1", "intermediate node")) is None


def test_files_that_carry_each_other(disks: tuple[Disk, ...]) -> None:
    """Files that go round in a circle keep nobody busy."""
    short = tuple(disk_without(disk, "n1") for disk in disks)
    circle = [("n1", "fn1", "file"), ("fn1", "n1", "file")]
    found = orphan(short, ("bj-9", "n0", "base"), ("bj-9", "n1", "intermediate node"), *circle)
    assert found is not None
    assert len(found.disk.layers[1].below) == len(circle)


def device(qdev: str) -> Device:
    """A device without a medium."""
    return Device(backend="", qdev=qdev, medium=None)


def test_a_name_stays_with_its_device() -> None:
    """When others go, a device keeps its name, and nobody gets the name of one that has gone."""
    names: dict[str, str] = {}
    prefixes = dict.fromkeys(("a", "b", "c", "d"), "sd") | {"v": "vd"}
    graph.name_devices([device("a"), device("b"), device("v")], prefixes, names)
    assert names == {"a": "sda", "b": "sdb", "v": "vda"}
    graph.name_devices([device("b"), device("v")], prefixes, names)
    graph.name_devices([device("c"), device("b"), device("v"), device("d")], prefixes, names)
    assert names == {"a": "sda", "b": "sdb", "v": "vda", "c": "sdc", "d": "sdd"}
    graph.name_devices([device("a")], prefixes, names)
    assert names["a"] == "sda"


def test_drives_without_a_device_are_told_apart() -> None:
    """A backend alone has a name as well."""
    names: dict[str, str] = {}
    graph.name_devices([Device("one", None, None), Device("two", None, None)], {}, names)
    assert names == {"drive one": "xda", "drive two": "xdb"}


@pytest.mark.parametrize("known", [NODES, {}])
def test_chains_without_the_nodes(disks: tuple[Disk, ...], known: Mapping[str, Node]) -> None:
    """While the nodes can't be asked for, the images of the devices tell the same chain, but for its filters' kind."""
    devices, stats = replies.DEVICES.read(REPLIES["query-block"]), replies.STATS.read(REPLIES["query-blockstats"])
    nodes = graph.nodes_of_images(devices, stats, known)
    names: dict[str, str] = {}
    graph.name_devices(devices, {}, names)
    found = graph.read_disks(devices=devices, stats=stats, nodes=nodes, graph=None, names=names, folder=None)
    assert [disk.nodes for disk in found] == [disk.nodes for disk in disks]
    assert [disk.files for disk in found] == [disk.files for disk in disks]
    assert [disk.digest for disk in found] == [disk.digest for disk in disks]
    # A layer that a guest writes to must not be taken for one that has to be read-only again.
    active = [[layer.read_only for layer in disk.layers[:1]] for disk in disks]
    assert [[layer.read_only for layer in disk.layers[:1]] for disk in found] == active


def test_fewer_images_than_nodes() -> None:
    """Replies of different moments don't fit together."""
    devices, stats = replies.DEVICES.read(REPLIES["query-block"]), replies.STATS.read(REPLIES["query-blockstats"])
    short = [
        replace(each, medium=replace(each.medium, images=each.medium.images[:1])) if each.medium else each
        for each in devices
    ]
    with pytest.raises(graph.Torn):
        graph.nodes_of_images(short, stats, NODES)


def test_who_has_a_node_below_itself() -> None:
    """Exports are called by their ids, and what has no name is said to have none."""
    block_graph = BlockGraph(
        nodes={
            1: GraphNode(id=1, type="block-backend", name=""),
            2: GraphNode(id=2, type="block-backend", name=""),
            3: GraphNode(id=3, type="block-driver", name="top"),
            4: GraphNode(id=4, type="block-driver", name="base"),
        },
        edges=(
            GraphEdge(parent=1, child=4, name="root"),
            GraphEdge(parent=2, child=4, name="root"),
            GraphEdge(parent=3, child=4, name="backing"),
        ),
    )
    found = graph.parents(block_graph, (replies.Export(id="exp0", node="base"),), {})
    assert [(parent.kind, parent.name, parent.role) for parent in found["base"]] == [
        ("block-backend", "export exp0", "root"),
        ("block-backend", "an unnamed user", "root"),
        ("block-driver", "top", "backing"),
    ]
