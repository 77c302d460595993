"""What stands in the way of a merge, and in which order it is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from unittest.mock import ANY

import pytest

from app.core.chain import Disk, Layer
from app.core.errors import Code, Problem
from app.core.evidence import Evidence, GraphReading, HeaderReading, Verdict
from app.core.headers import HeaderFacts
from app.core.job import refusal_of
from app.core.kinds import commit
from app.core.kinds.commit import CommitFlag, CommitRequest, CommitSelection
from app.core.kinds.refusals import to_probe
from app.core.plan import Facts, Guest, Parent, Plan, Survey
from app.core.states import State
from tests.core.samples import FILES, GIB, LAYERS, active_job, disk, plan, request, selection

BELOW = request(top="vda[1]")
ACTIVE = request(flags=["active"])


def layers(**changed: Mapping[str, Any]) -> Disk:
    """The sample disk, with other fields of the layers named by their nodes."""
    found: list[Layer] = [replace(layer, **changed.get(layer.node, {})) for layer in LAYERS]
    return disk(*found)


def code(asked: CommitRequest, on: Disk | None = None, **facts: Any) -> Code | None:
    """The code under which the request is refused; None if it is not."""
    planned = commit.plan(selection(asked, on), Facts(free=100 * GIB, header=HeaderFacts(room=1023), **facts))
    return planned.code if isinstance(planned, Problem) else None


def graph(*edges: Any) -> Survey:
    """What QEMU says of these parents: (node, kind, name, role), besides the disk's own chain."""
    own = [("n3", "block-backend", "virtio0", "root"), ("n2", "block-driver", "n3", "backing")]
    own += [("n1", "block-driver", "n2", "backing"), ("n0", "block-driver", "n1", "backing")]
    parents: dict[str, tuple[Parent, ...]] = {}
    every: list[Any] = [*own, *edges]
    for node, *parent in every:
        parents[node] = (*parents.get(node, ()), Parent(*parent))
    return Survey(parents=parents)


EXPORT = ("block-backend", "export exp0", "root")
OVERLAY = ("block-driver", "ov", "backing")
FILTER = ("block-driver", "filter", "file")


@pytest.mark.parametrize(
    ("edges", "asked", "expected"),
    [
        ([], BELOW, None),
        ([("n0", *EXPORT)], BELOW, Code.IMAGE_SHARED),
        ([("n0", *OVERLAY)], ACTIVE, Code.IMAGE_SHARED),
        ([("n1", *OVERLAY)], BELOW, Code.IMAGE_SHARED),
        ([("n1", *EXPORT)], BELOW, Code.NODE_IN_USE),
        ([("n2", *EXPORT)], BELOW, None),
        ([("n2", *EXPORT)], ACTIVE, Code.NODE_IN_USE),
        ([("n2", *OVERLAY)], BELOW, Code.NODE_IN_USE),
        ([("n3", *EXPORT)], ACTIVE, None),
        ([("n3", *OVERLAY)], ACTIVE, Code.NODE_IN_USE),
        ([("n1", *FILTER)], BELOW, None),
        ([("n1", *FILTER), ("filter", *EXPORT)], BELOW, Code.NODE_IN_USE),
        ([("n0", *FILTER), ("filter", *FILTER), ("filter", *OVERLAY)], BELOW, Code.IMAGE_SHARED),
        ([("n0", "block-job", "backup", "main node")], BELOW, None),
        ([("n0", *OVERLAY, True)], BELOW, None),
    ],
)
def test_others_in_the_graph(edges: list[Any], asked: CommitRequest, expected: Code | None) -> None:
    """Who reads the base would read other data; who uses a node that the merge takes out is in its way."""
    assert code(asked, survey=graph(*edges)) is expected


def test_a_filter_above_top_keeps_the_header_from_being_changed() -> None:
    """QEMU changes the header of a layer that is right above only."""
    assert code(BELOW, layers(n2={"filters": ("throttle",)})) is Code.NODE_IN_USE
    assert code(ACTIVE, layers(n3={"filters": ("throttle",)})) is None


def test_a_filter_of_the_chain_is_none_of_the_others() -> None:
    """The disk's own filter is above its layer, and its overlay above the filter."""
    survey = Survey(
        parents={
            "n1": (Parent("block-driver", "own", "file"),),
            "own": (Parent("block-driver", "n2", "backing"),),
        }
    )
    assert code(BELOW, layers(n1={"filters": ("own",)}), survey=survey) is None


@pytest.mark.parametrize("guest", Guest)
def test_a_guest_that_is_elsewhere(guest: Guest) -> None:
    """Neither the QEMU that it leaves nor the one that it goes to may change its images; a lock is the other's."""
    moved = guest in (Guest.MIGRATING, Guest.INCOMING)
    assert code(BELOW, survey=Survey(guest=guest)) is (Code.DOMAIN_MIGRATING if moved else None)
    expected = Code.DOMAIN_MIGRATING if moved else Code.IMAGE_LOCKED
    assert code(BELOW, survey=Survey(guest=guest), locked=True) is expected


@pytest.mark.parametrize(
    ("unwritable", "asked", "expected"),
    [
        ({"n0": "Block node is read-only"}, BELOW, Code.IMAGE_READ_ONLY),
        ({"n0": 'Failed to get "write" lock'}, BELOW, Code.IMAGE_LOCKED),
        ({"n3": "Permission denied"}, BELOW, Code.OVERLAY_NOT_WRITABLE),
        ({"n3": "Permission denied"}, ACTIVE, None),
    ],
)
def test_who_can_not_be_written(unwritable: dict[str, str], asked: CommitRequest, expected: Code | None) -> None:
    """The base and the overlay are written to, and nothing else."""
    assert code(asked, survey=Survey(unwritable=unwritable)) is expected


def test_what_is_probed() -> None:
    """What QEMU has open for reading and will have to write to; bitmaps would be written by the probe itself."""
    on = layers(n3={"read_only": True}, n2={"read_only": True}, n0={"read_only": True})
    assert commit.inquiry(selection(BELOW, on)).probe == ("n0", "n3")
    assert commit.inquiry(selection(ACTIVE, on)).probe == ("n0",)
    assert commit.inquiry(selection(BELOW, layers(n0={"read_only": True, "bitmaps": ("b",)}))).probe == ()
    assert commit.inquiry(selection(BELOW, layers(n0={"read_only": True, "dirty": True}))).probe == ()


@pytest.mark.parametrize(("node", "refused"), [("n3", False), ("n2", True), ("n1", True), ("n0", True)])
def test_a_corrupt_image(node: str, *, refused: bool) -> None:
    """The base and the merged images are looked at; the overlay stays as it is."""
    assert code(BELOW, layers(**{node: {"corrupt": True}})) is (Code.IMAGE_CORRUPT if refused else None)


@pytest.mark.parametrize(
    ("node", "expected"),
    [("n3", Code.OVERLAY_NOT_WRITABLE), ("n2", None), ("n1", None), ("n0", Code.IMAGE_CORRUPT)],
)
def test_an_image_whose_writer_was_killed(node: str, expected: Code | None) -> None:
    """QEMU would take used clusters for free where it writes to it; merged images are only read."""
    assert code(BELOW, layers(**{node: {"dirty": True, "read_only": True}})) is expected
    assert code(BELOW, layers(**{node: {"dirty": True}})) is None, "QEMU has repaired it, as it has it open for writing"


@pytest.mark.parametrize(
    ("sizes", "asked", "expected"),
    [
        ((4, 2, 4, 4), BELOW, Code.SIZES_UNSAFE),
        ((2, 2, 4, 4), BELOW, None),
        ((4, 2, 4, 2), BELOW, None),
        ((4, 4, 2, 4), BELOW, None),
        ((2, 4, 4, 4), ACTIVE, None),
    ],
)
def test_a_short_top(sizes: tuple[int, ...], asked: CommitRequest, expected: Code | None) -> None:
    """A `top` that ends before the base and the overlay do hides what the base holds there."""
    changed = {node: {"virtual_size": size * GIB} for node, size in zip(("n3", "n2", "n1", "n0"), sizes, strict=True)}
    assert code(asked, layers(**changed)) is expected


@pytest.mark.parametrize(
    ("file", "fixed"),
    [
        ("nbd+unix:///root?socket=/run/n.sock", True),
        ('json:{"driver": "raw", "file": {"driver": "nbd", "path": "/run/n.sock"}}', True),
        ("iscsi://host/target/0", True),
        ("rbd:pool/image", False),
        ("/images/nbd:1", False),
    ],
)
def test_a_base_on_the_network_that_has_to_grow(file: str, *, fixed: bool) -> None:
    """An export has the size that it has; what is on it as qcow2 may have room in it."""
    on = layers(n0={"virtual_size": GIB // 2, "format": "raw", "file": file})
    assert code(ACTIVE, on) is (Code.BASE_CANNOT_GROW if fixed else None)


@pytest.mark.parametrize(
    ("base", "device", "expected"),
    [
        ({}, False, None),
        ({"format": "raw"}, False, None),
        ({"format": "raw"}, True, Code.BASE_CANNOT_GROW),
        ({}, True, None),
        ({"format": "vmdk"}, False, Code.BASE_CANNOT_GROW),
        ({"version_2": True}, False, None),
        ({"version_2": True, "snapshots": 1}, False, Code.BASE_CANNOT_GROW),
        ({"snapshots": 1}, False, None),
        ({"format": "raw", "name": 'json:{"driver":"raw","size":512}'}, False, Code.BASE_CANNOT_GROW),
    ],
)
def test_a_base_that_has_to_grow(base: dict[str, Any], expected: Code | None, *, device: bool) -> None:
    """Some images can't be made longer."""
    on = layers(n0=base | {"virtual_size": GIB // 2})
    assert code(ACTIVE, on, written_is_device=device) is expected
    assert code(ACTIVE, layers(n0=base), written_is_device=device) is None


@pytest.mark.parametrize(("above", "expected"), [((), None), ((EXPORT,), Code.IMAGE_SHARED)])
def test_what_is_above_a_node_that_was_left_over(above: tuple[Any, ...], expected: Code | None) -> None:
    """Such a node reads nothing itself; an export of it reads the base through it."""
    left = ("n0", "block-driver", "left", "backing", True)
    survey = graph(left, *(("left", *parent) for parent in above))
    assert code(BELOW, survey=survey) is code(ACTIVE, survey=survey) is expected


@pytest.mark.parametrize(("version_2", "beneath", "fits"), [(True, GIB, False), (False, GIB, True), (True, 1, True)])
def test_what_would_show_below_a_base_that_grows(*, version_2: bool, beneath: int, fits: bool) -> None:
    """A qcow2 image of version 2 can't say that it holds zeros where a longer image is below it."""
    on = layers(n1={"version_2": version_2, "virtual_size": GIB // 2}, n0={"virtual_size": beneath})
    asked = request(top="vda[1]", base="vda[2]")
    assert code(asked, on) is (None if fits else Code.BASE_CANNOT_GROW)


@pytest.mark.parametrize(
    ("node", "changes", "asked", "expected"),
    [
        ("n0", {"replaced": True, "read_only": True}, ACTIVE, Code.IMAGE_READ_ONLY),
        ("n0", {"replaced": True}, ACTIVE, None),
        ("n3", {"replaced": True, "read_only": True}, BELOW, Code.OVERLAY_NOT_WRITABLE),
        ("n0", {"packed": True}, ACTIVE, Code.IMAGE_READ_ONLY),
        ("n0", {"broken_bitmaps": ("b",)}, ACTIVE, None),
        ("n0", {"broken_bitmaps": ("b",), "virtual_size": GIB // 2}, ACTIVE, Code.BASE_CANNOT_GROW),
    ],
)
def test_what_can_not_be_written(
    node: str, changes: dict[str, Any], asked: CommitRequest, expected: Code | None
) -> None:
    """A file under another one's name, an image that is written once, and one whose bitmaps forbid it to grow."""
    on = layers(**{node: changes})
    assert code(asked, on) is expected
    if changes.get("replaced"):
        assert node not in to_probe(selection(asked, on))


@pytest.mark.parametrize(
    ("node", "changes"),
    [
        ("n1", {"encrypted": True}),
        ("n0", {"format": "vmdk"}),
        ("n2", {"data_file": "/images/data"}),
        ("n0", {"format": "raw", "name": 'json:{"driver":"raw","offset":512}'}),
    ],
)
def test_what_can_not_be_compared(node: str, changes: dict[str, Any]) -> None:
    """Who asks for a proof that the service can't give is told before; nobody else is."""
    asked = request(top="vda[1]", verify=True)
    refusal = commit.select(layers(**{node: changes}), asked)
    assert isinstance(refusal, Problem)
    assert refusal.code is Code.NOT_SUPPORTED
    assert isinstance(commit.select(layers(**{node: changes}), BELOW), CommitSelection)
    assert isinstance(commit.select(layers(), asked), CommitSelection)


@pytest.mark.parametrize("filters", [(), ("cbw",)])
def test_a_bitmap_of_another_node(filters: tuple[str, ...]) -> None:
    """QEMU aborts itself when it closes a node with a bitmap of another node; below the active layer it need not."""
    on = layers(n3={"tracking": ("", "daily"), "filters": filters})
    planned = commit.plan(selection(ACTIVE, on), Facts(header=HeaderFacts(room=1023)))
    assert isinstance(planned, Problem)
    named = filters[-1] if filters else "another node or job"
    assert (planned.code, planned.extra) == (Code.NODE_IN_USE, {"node": "n3", "used_by": named})
    assert code(BELOW, on) is None
    assert code(ACTIVE, layers(n3={"tracking": ("daily",)})) is None


def test_what_is_lost() -> None:
    """Internal snapshots and bitmaps are no part of a merge; an image with snapshots is not deleted."""
    on = layers(
        n2={"snapshots": 2},
        n1={"bitmaps": ("daily",), "tracking": ("daily", "weekly", "")},
        n0={"snapshots": 1, "bitmaps": ("kept",)},
    )
    made = plan(request(top="vda[1]", flags=["delete"]), on)
    found = {warning.code: warning.detail for warning in made.warnings}
    assert "2 internal snapshots" in found["internal-snapshots-lost"]
    assert "daily, weekly" in found["bitmaps-lost"]
    assert (made.deletes, [left.file for left in made.spec.undeletable]) == ((FILES[2],), [FILES[1]])
    assert isinstance(made, Plan)


@pytest.mark.parametrize(
    ("version", "asked", "warned"),
    [
        ((7, 2, 22), ACTIVE, False),
        ((8, 2, 0), ACTIVE, True),
        ((10, 0, 8), ACTIVE, True),
        ((10, 0, 8), BELOW, False),
        ((10, 0, 9), ACTIVE, False),
        ((10, 1, 2), ACTIVE, True),
        ((10, 2, 2), ACTIVE, False),
    ],
)
def test_a_defect_of_the_qemu_at_hand(version: tuple[int, int, int], asked: CommitRequest, *, warned: bool) -> None:
    """A version that is known to lose data in this job is told, with the address of the report."""
    made = plan(asked, facts=Facts(header=HeaderFacts(room=1023), survey=Survey(version=version)))
    found = [warning.detail for warning in made.warnings if warning.code == "qemu-known-defect"]
    assert bool(found) is warned
    assert all("https://bugs.debian.org/1129349" in detail for detail in found)


def test_how_a_user_is_known_is_told() -> None:
    """The refusal says where the user was found, and what ends its use."""
    facts = Facts(shared_with="web2/vda", shared_because="web2 is off")
    problem = commit.plan(selection(BELOW), facts)
    assert isinstance(problem, Problem)
    assert problem.detail.endswith("; web2 is off")
    problem = commit.plan(selection(BELOW), Facts(survey=graph(("n0", *EXPORT)), shared_because="x"))
    assert isinstance(problem, Problem)
    assert problem.detail.endswith("would destroy")


def test_a_search_that_took_too_long_is_told() -> None:
    """Not to have found an overlay says nothing then."""
    made = plan(BELOW, facts=Facts(header=HeaderFacts(room=1023), overlays_searched=False))
    assert "overlays-not-searched" in [warning.code for warning in made.warnings]


def test_the_request_of_a_job_that_has_waited() -> None:
    """It means the same layers, and the same string for the header."""
    made = plan(request(top="vda[1]", flags=["shallow", "delete"]))
    asked = commit.again(made.spec, "vda", on_ready=made.on_ready, bandwidth=7)
    assert (asked.top, asked.base, asked.backing_file) == ("vda[1]", "vda[2]", made.backing_file)
    assert (asked.flags, asked.bandwidth) == (CommitFlag.DELETE, 7)


def test_a_comparison_is_asked_for_below_the_active_layer() -> None:
    """The merged layers and the base are compared once the merge is proven, and where it fails nothing goes."""
    spec = plan(request(top="vda[1]", flags=["delete"], verify=True)).spec
    leads = HeaderReading(file=FILES[3])
    merged = GraphReading(nodes=("n3", "n0"), files=(FILES[0], FILES[3]))
    done = Evidence(verdict=Verdict.FINE, graph=merged, header=leads, flushed=True)
    tidy = commit.cleanup(spec, commit.judge(spec, done))
    assert [layer.file for layer in tidy.compared] == [*FILES[1:]]
    left = tidy.without_deletions("it differs")
    assert (left.to_delete, [each.reason for each in left.not_deleted]) == ({}, ["it differs"] * 2)
    problem = commit.select(disk(), request(flags=["active"], verify=True))
    assert isinstance(problem, Problem)
    assert problem.extra["errors"] == [{"pointer": "/verify", "detail": ANY}]


def test_how_a_job_that_qemu_did_not_start_is_refused() -> None:
    """The request gets the job's error, with its id; a job that was started has none for its request."""
    job = active_job()
    assert refusal_of(job) is None
    failed = replace(job, state=State.FAILED, error=Problem(code=Code.QEMU_ERROR, detail="no"))
    refused = refusal_of(failed)
    assert refused is not None
    assert refused.extra == {"job": job.id}
    assert refusal_of(replace(failed, started_at=1)) is None
