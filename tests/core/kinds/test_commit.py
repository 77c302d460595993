from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.chain import Disk, Layer, NotDeleted
from app.core.errors import Code, Problem
from app.core.headers import HeaderFacts
from app.core.images import Access, Claim, DiskChain, Image
from app.core.job import accept
from app.core.kinds import KINDS, capabilities_of, commit, kind_of
from app.core.kinds.commit import CommitFlag, CommitRequest, CommitSelection, CommitSpec
from app.core.plan import Facts, Plan
from app.core.states import JobType, OnError, OnReady, State
from tests.core.samples import (
    FILES,
    GIB,
    LAYERS,
    NODES,
    commit_spec,
    disk,
    plan,
    refusal,
    request,
    selection,
    with_layer,
)

EMPTY = Disk(name="vda")
ALONE = disk(LAYERS[3])
ABSOLUTE = disk(*with_layer(1, backing="/images/s1.qcow2"))
TEMPORARY = disk(temporary=True)
FULL = Facts(free=0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A request, the disk it meets, and what else is known."""

    body: Mapping[str, Any] = field(default_factory=dict[str, Any])
    on: Disk = field(default_factory=disk)
    conflict: str | None = None
    facts: Facts = Facts(free=100 * GIB)

    def answer(self) -> Plan[CommitSpec] | Problem:
        """What the three stages make of it."""
        asked = commit.request(**self.body)
        if isinstance(asked, Problem):
            return asked
        chosen = commit.select(self.on, asked, conflict=self.conflict)
        return chosen if isinstance(chosen, Problem) else commit.plan(chosen, self.facts)


@pytest.mark.parametrize(
    ("case", "code"),
    [
        (Case(body={"flags": ["bogus"]}), Code.INVALID_REQUEST),
        (Case(body={"bandwidth": -1}), Code.INVALID_REQUEST),
        (Case(body={"backing_file": ""}), Code.INVALID_REQUEST),
        (Case(body={"backing_file": "é" * 512}), Code.INVALID_REQUEST),
        (Case(body={"flags": ["active"], "backing_file": "b"}), Code.INVALID_REQUEST),
        (Case(body={"flags": ["shallow", "active"], "base": "vda[3]"}), Code.SHALLOW_WITH_BASE),
        (Case(on=EMPTY), Code.DISK_EMPTY),
        (Case(body={"flags": ["active"]}, conflict="bj-9"), Code.JOB_CONFLICT),
        (Case(body={"flags": ["active"]}, on=disk(running_jobs=("backup0",))), Code.JOB_CONFLICT),
        (Case(body={"top": "vda[9]"}), Code.TOP_NOT_FOUND),
        (Case(body={"top": "vda[1]", "base": "nowhere"}), Code.BASE_NOT_FOUND),
        (Case(body={"top": "vda[2]", "base": "vda[1]"}), Code.BASE_NOT_BELOW_TOP),
        (Case(body={"top": "vda[2]", "base": "vda[2]"}), Code.BASE_NOT_BELOW_TOP),
        (Case(body={"top": "vda[3]"}), Code.NO_BACKING),
        (Case(body={"top": "vda[3]", "flags": ["shallow"]}), Code.NO_BACKING),
        (Case(), Code.ACTIVE_FLAG_REQUIRED),
        (Case(body={"top": FILES[0]}), Code.ACTIVE_FLAG_REQUIRED),
        (Case(body={"top": "vda[1]", "flags": ["active"]}), Code.TOP_NOT_ACTIVE),
        (Case(body={"top": "vda[1]", "on_ready": OnReady.PIVOT}), Code.TOP_NOT_ACTIVE),
        (Case(body={"top": "vda[1]", "on_ready": OnReady.KEEP}), Code.TOP_NOT_ACTIVE),
        (Case(body={"flags": ["active", "delete"], "on_ready": OnReady.KEEP}), Code.DELETE_WITH_KEEP),
        (Case(body={"top": "vda[2]", "flags": ["relative"]}, on=ABSOLUTE), Code.RELATIVE_IMPOSSIBLE),
        (Case(body={"flags": ["active"]}, on=TEMPORARY), Code.TEMPORARY_OVERLAY),
        (Case(body={"top": "vda[1]"}, on=TEMPORARY), Code.TEMPORARY_OVERLAY),
        (Case(body={"flags": ["active"]}, facts=Facts(shared_with="web2/vda")), Code.IMAGE_SHARED),
        (Case(body={"flags": ["active"]}, facts=Facts(locked=True)), Code.IMAGE_LOCKED),
        (Case(body={"flags": ["active"]}, facts=FULL), Code.INSUFFICIENT_STORAGE),
    ],
)
def test_each_check_has_its_code(case: Case, code: Code) -> None:
    """A request with one fault is refused with that fault's code."""
    assert refusal(case.answer()).code is code


@pytest.mark.parametrize(
    ("case", "earlier", "later"),
    [
        (
            Case(body={"flags": ["shallow", "bogus"], "base": "vda[3]"}),
            Code.INVALID_REQUEST,
            Code.SHALLOW_WITH_BASE,
        ),
        (Case(body={"flags": ["shallow"], "base": "x"}, on=EMPTY), Code.SHALLOW_WITH_BASE, Code.DISK_EMPTY),
        (Case(on=EMPTY, conflict="bj-9"), Code.DISK_EMPTY, Code.JOB_CONFLICT),
        (Case(body={"top": "x"}, conflict="bj-9"), Code.JOB_CONFLICT, Code.TOP_NOT_FOUND),
        (Case(body={"top": "x", "base": "y"}), Code.TOP_NOT_FOUND, Code.BASE_NOT_FOUND),
        (Case(body={"top": "vda[3]", "base": "y"}), Code.BASE_NOT_FOUND, Code.NO_BACKING),
        (Case(body={"top": "vda[3]", "base": "vda[3]"}), Code.BASE_NOT_BELOW_TOP, Code.NO_BACKING),
        (Case(body={"base": "vda[0]"}), Code.BASE_NOT_BELOW_TOP, Code.ACTIVE_FLAG_REQUIRED),
        (Case(on=ALONE), Code.NO_BACKING, Code.ACTIVE_FLAG_REQUIRED),
        (Case(body={"top": "vda[3]", "flags": ["active"]}), Code.NO_BACKING, Code.TOP_NOT_ACTIVE),
        (
            Case(body={"flags": ["delete"], "on_ready": OnReady.KEEP}),
            Code.ACTIVE_FLAG_REQUIRED,
            Code.DELETE_WITH_KEEP,
        ),
        (
            Case(body={"top": "vda[1]", "flags": ["delete"], "on_ready": OnReady.KEEP}),
            Code.TOP_NOT_ACTIVE,
            Code.DELETE_WITH_KEEP,
        ),
        (
            Case(body={"top": "vda[2]", "flags": ["active", "relative"]}, on=ABSOLUTE),
            Code.TOP_NOT_ACTIVE,
            Code.RELATIVE_IMPOSSIBLE,
        ),
        (
            Case(body={"flags": ["active", "delete"], "on_ready": OnReady.KEEP}, on=TEMPORARY),
            Code.DELETE_WITH_KEEP,
            Code.TEMPORARY_OVERLAY,
        ),
        (
            Case(body={"top": "vda[2]", "flags": ["relative"]}, on=replace(ABSOLUTE, temporary=True)),
            Code.RELATIVE_IMPOSSIBLE,
            Code.TEMPORARY_OVERLAY,
        ),
        (
            Case(body={"flags": ["active"]}, on=TEMPORARY, facts=Facts(shared_with="web2/vda")),
            Code.TEMPORARY_OVERLAY,
            Code.IMAGE_SHARED,
        ),
        (
            Case(body={"flags": ["active"]}, facts=Facts(shared_with="web2/vda", locked=True)),
            Code.IMAGE_SHARED,
            Code.IMAGE_LOCKED,
        ),
        (
            Case(body={"flags": ["active"]}, facts=Facts(locked=True, free=0)),
            Code.IMAGE_LOCKED,
            Code.INSUFFICIENT_STORAGE,
        ),
    ],
)
def test_of_two_faults_the_earlier_check_answers(case: Case, earlier: Code, later: Code) -> None:
    """Where neighbours in the contract's table both apply, the caller sees the first one's code."""
    order = list(Code)
    assert order.index(earlier) < order.index(later)
    assert refusal(case.answer()).code is earlier


def test_every_wrong_field_is_told_at_once() -> None:
    """Flags, bandwidth and backing file are each named with their pointer in one answer."""
    problem = refusal(commit.request(flags=["active", "x"], bandwidth=-1, backing_file="x" * 1024))
    errors = problem.extra["errors"]
    assert isinstance(errors, list)
    assert [error["pointer"] for error in errors] == ["/flags/1", "/bandwidth", "/backing_file"]  # pyright: ignore[reportUnknownVariableType] - JSON


def test_the_unit_is_in_doubt_while_the_flags_are_wrong() -> None:
    """With an unknown flag, a bandwidth that is right in one of the units is not complained about."""
    problem = refusal(commit.request(flags=["x"], bandwidth=2**63 - 1))
    assert "/bandwidth" not in problem.detail


@pytest.mark.parametrize("length", [1, 1023])
def test_a_backing_file_that_a_header_can_hold(length: int) -> None:
    """1 to 1023 bytes fit into a qcow2 header."""
    assert request(backing_file="b" * length).backing_file == "b" * length


def test_no_name_is_null() -> None:
    """The empty string for a layer counts as null, also together with `shallow`."""
    assert request(base="", top="", flags=["shallow"]) == CommitRequest(flags=CommitFlag.SHALLOW)


def test_the_request_as_it_was_meant() -> None:
    """Flags become bits and the speed bytes a second; the rest is as it was given."""
    asked = request(base="b", top="t", bandwidth=2, flags=12, on_ready=OnReady.PIVOT, on_error=OnError.STOP)
    assert asked == CommitRequest(
        base="b",
        top="t",
        bandwidth=2 << 20,
        flags=CommitFlag.ACTIVE | CommitFlag.RELATIVE,
        on_ready=OnReady.PIVOT,
        on_error=OnError.STOP,
    )


@pytest.mark.parametrize(
    ("asked", "top", "base"),
    [
        (request(flags=["active"]), 0, 3),
        (request(flags=["active", "shallow"]), 0, 1),
        (request(top="vda[1]"), 1, 3),
        (request(top="n1", flags=["shallow"]), 2, 3),
        (request(top="/images/s2.qcow2", base="s1.qcow2"), 1, 2),
        (request(base="disk0[2]", flags=["active"]), 0, 2),
    ],
)
def test_the_layers_that_are_meant(asked: CommitRequest, top: int, base: int) -> None:
    """Null means the active layer and the bottom; `shallow` the layer right below `top`; names mean their layer."""
    chosen = selection(asked)
    assert (chosen.top_index, chosen.base_index) == (top, base)
    assert chosen.merged == LAYERS[top:base]
    assert chosen.base == LAYERS[base]
    assert chosen.active is (top == 0)
    assert chosen.overlay == (None if top == 0 else LAYERS[top - 1])


def test_a_file_behind_a_link_is_a_layer() -> None:
    """Paths in the request are told by the identity of what they lead to."""
    on = disk(*(replace(layer, identity=(1, inode)) for inode, layer in enumerate(LAYERS)))
    asked = request(top="/links/a", base="/links/b")
    chosen = commit.select(on, asked, identities={"/links/a": (1, 1), "/links/b": (1, 2)})
    assert not isinstance(chosen, Problem)
    assert (chosen.top_index, chosen.base_index) == (1, 2)


def test_a_conflict_names_the_job() -> None:
    """The job in the way is named, our own before one that only QEMU knows."""
    asked = request(flags=["active"])
    on = disk(running_jobs=("backup0",))
    assert refusal(commit.select(on, asked, conflict="bj-9")).extra == {"job": "bj-9"}
    problem = refusal(commit.select(on, asked))
    assert problem.extra == {"job": "backup0"}
    assert "backup0" in problem.detail


def test_a_chain_that_was_not_meant_is_refused() -> None:
    """One of the digests has to be the chain's; a refusal names the one that it has."""
    on = disk()
    asked = request(flags=["active"])
    assert isinstance(commit.select(on, replace(asked, digests=frozenset({"x", on.digest}))), CommitSelection)
    problem = refusal(commit.select(on, replace(asked, digests=frozenset({"x"})), conflict="bj-9"))
    assert (problem.code, problem.extra) == (Code.CHAIN_CHANGED, {"digest": on.digest})
    assert refusal(commit.select(on, replace(request(), digests=frozenset()))).code is Code.CHAIN_CHANGED


def test_a_layer_that_is_not_found_comes_with_those_that_are() -> None:
    """The refusal lists the layers by index and file, so that the caller need not ask again."""
    problem = refusal(commit.select(disk(), request(top="oops")))
    assert all(f"vda[{index}] {file}" in problem.detail for index, file in enumerate(FILES))


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        (request(top="vda[1]", flags=["active"]), "`active`"),
        (request(top="vda[1]", on_ready=OnReady.KEEP), "`on_ready: keep`"),
    ],
)
def test_top_not_active_says_what_was_asked(asked: CommitRequest, word: str) -> None:
    """The refusal names the field that does not go with an inner layer."""
    assert word in refusal(commit.select(disk(), asked)).detail


@pytest.mark.parametrize(
    ("position", "top", "refused"),
    [(0, "vda[1]", True), (1, "vda[1]", True), (2, "vda[1]", True), (0, "vda[2]", False), (1, "vda[2]", True)],
)
def test_relative_needs_every_header_down_to_the_base(position: int, top: str, *, refused: bool) -> None:
    """One absolute header between the layer above `top` and the base is enough to refuse; one further up is not."""
    on = disk(*with_layer(position, backing=f"/images/{('s2', 's1', 'base')[position]}.qcow2"))
    answer = commit.select(on, request(top=top, flags=["relative"]))
    if refused:
        assert refusal(answer).code is Code.RELATIVE_IMPOSSIBLE
        assert FILES[position] in refusal(answer).detail
    else:
        assert not isinstance(answer, Problem)


def test_relative_has_no_effect_on_an_active_commit() -> None:
    """An active commit writes no header, so absolute ones are no obstacle."""
    assert plan(request(flags=["active", "relative"]), ABSOLUTE).backing_file is None


def test_what_blocks_the_base_is_named() -> None:
    """The user of a shared base, the locked file, and the bytes that are missing stand in the answer."""
    chosen = selection(request(flags=["active"]))
    assert refusal(commit.plan(chosen, Facts(shared_with="web2/vda"))).extra == {
        "file": "/images/base.qcow2",
        "used_by": "web2/vda",
    }
    assert refusal(commit.plan(chosen, Facts(locked=True))).extra == {"file": "/images/base.qcow2"}
    growth = plan(request(flags=["active"])).demand.growth
    short = refusal(commit.plan(chosen, Facts(free=growth - 1)))
    assert short.extra == {"needed": growth, "free": growth - 1}
    assert isinstance(commit.plan(chosen, Facts(free=growth)), Plan)


# What a plan says --------------------------------------------------------------------------------------------------


def test_an_active_commit() -> None:
    """The base becomes the active layer, and all above it is worthless."""
    made = plan(request(flags=["active"]))
    assert made.spec.type is JobType.ACTIVE_COMMIT
    assert made.chain_after == ("/images/base.qcow2",)
    assert made.invalidates == FILES[:3]
    assert made.deletes == ()
    assert made.spec.undeletable == ()
    assert made.backing_file is None
    assert made.resizes_base_to is None
    assert made.free == 100 * GIB


def test_an_intermediate_commit() -> None:
    """The layers from `top` to above the base leave the chain, and the overlay's header names the base."""
    made = plan(request(top="vda[1]", base="vda[2]"))
    assert made.spec.type is JobType.COMMIT
    assert made.chain_after == (FILES[0], FILES[2], FILES[3])
    assert made.invalidates == (FILES[1],)
    assert made.backing_file == "s1.qcow2"


def test_keep_leaves_the_chain_and_the_overlay_alone() -> None:
    """With `keep` the chain stays as it is, the overlay stays right, and the layers between show a mixture."""
    made = plan(request(flags=["active"], on_ready=OnReady.KEEP))
    assert made.chain_after == FILES
    assert made.invalidates == FILES[1:3]


def test_deletes_are_the_invalidated_files_that_can_be_deleted() -> None:
    """What can't be unlinked is told in a warning, and carried by the job into its result; others' files are not."""
    facts = Facts(free=100 * GIB, undeletable={FILES[1]: "a block device", "/images/base.qcow2": "the base"})
    made = plan(request(flags=["active", "delete"]), facts=facts)
    assert made.deletes == (FILES[0], FILES[2])
    assert made.spec.undeletable == (NotDeleted(file=FILES[1], reason="a block device"),)
    assert [w.detail for w in made.warnings if w.code == "not-deletable"] == [f"{FILES[1]}: a block device"]
    work = made.spec
    assert work.deletes == made.deletes


def test_nothing_is_deleted_without_the_flag() -> None:
    """Without `delete` no file is named as one, and none is warned about."""
    made = plan(request(flags=["active"]), facts=Facts(free=100 * GIB, undeletable={FILES[1]: "a block device"}))
    assert made.deletes == ()
    assert made.spec.undeletable == ()
    assert "not-deletable" not in codes(made)


@pytest.mark.parametrize(
    ("overlay", "base", "flags", "given", "expected"),
    [
        ({}, {}, [], None, "base.qcow2"),
        ({"backing": "/images/s2.qcow2"}, {}, [], None, "/images/base.qcow2"),
        ({"file": "/snaps/s3.qcow2", "backing": "../images/s2.qcow2"}, {}, [], None, "../images/base.qcow2"),
        ({}, {}, ["relative"], None, "base.qcow2"),
        ({}, {}, [], "./x/../base.qcow2", "./x/../base.qcow2"),
        ({}, {"file": "nbd://host/base"}, [], None, "nbd://host/base"),
        ({"file": "nbd://host/s3"}, {}, [], None, "/images/base.qcow2"),
    ],
)
def test_the_string_for_the_overlays_header(
    overlay: dict[str, object], base: dict[str, object], flags: list[str], given: str | None, expected: str
) -> None:
    """The caller's string as it is; else relative where the header was, and absolute where it was or must be."""
    on = disk(*with_layer(0, **overlay)[:3], with_layer(3, **base)[3])
    assert plan(request(top="vda[1]", flags=flags, backing_file=given), on).backing_file == expected


@pytest.mark.parametrize(
    ("top_size", "base_size", "resized", "grown"),
    [(GIB, GIB, None, False), (2 * GIB, GIB, 2 * GIB, False), (GIB, 2 * GIB, None, True)],
)
def test_sizes_that_differ(top_size: int, base_size: int, resized: int | None, *, grown: bool) -> None:
    """A smaller base is grown to `top`'s size at the start; a bigger one shows in the guest after the pivot."""
    on = disk(*with_layer(0, virtual_size=top_size)[:3], with_layer(3, virtual_size=base_size)[3])
    made = plan(request(flags=["active"]), on)
    assert made.resizes_base_to == resized
    assert ("base-resized" in codes(made)) is (resized is not None)
    assert ("disk-grows" in codes(made)) is grown


def test_an_inner_merge_does_not_grow_the_guests_disk() -> None:
    """Below the active layer the base's size never reaches the guest."""
    on = disk(*LAYERS[:3], replace(LAYERS[3], virtual_size=2 * GIB))
    assert "disk-grows" not in codes(plan(request(top="vda[1]"), on))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (Facts(free=GIB), ["base-grows", "size-estimated"]),
        (Facts(), ["base-grows", "free-unknown", "size-estimated"]),
        (Facts(written_is_device=True), ["base-grows", "free-unknown", "size-estimated"]),
        (Facts(written_is_device=True, bytes_to_copy=10, new_bytes=0), []),
        (Facts(free=GIB, bytes_to_copy=10, new_bytes=10), ["base-grows"]),
        (Facts(free=GIB, bytes_to_copy=10, new_bytes=0), []),
    ],
)
def test_warnings(facts: Facts, expected: list[str]) -> None:
    """Each warning stands if and only if its reason does, in a fixed order."""
    assert codes(plan(request(flags=["active"]), facts=facts)) == expected


def test_filters_between_the_layers_are_dropped() -> None:
    """QEMU drops filters below `top`, down to the base; those above `top` stay and are not warned of."""
    on = disk(*with_layer(0, filters=("throttle0",))[:2], with_layer(2, filters=("cor0",))[2], LAYERS[3])
    warning = next(w for w in plan(request(flags=["active"]), on).warnings if w.code == "filters-dropped")
    assert "cor0" in warning.detail
    assert "throttle0" not in warning.detail
    assert "filters-dropped" not in codes(plan(request(flags=["active", "shallow"]), on))


def test_the_copy_is_what_the_maps_say_else_what_the_layers_take() -> None:
    """Without the images' maps, the sizes of the merged layers are summed, the base's not among them."""
    assert plan(request(flags=["active"])).demand.copies == 6000
    assert plan(request(top="vda[1]")).demand.copies == 3000
    assert plan(request(flags=["active"]), facts=Facts(bytes_to_copy=7, new_bytes=5)).demand.copies == 7


# How much the base can grow ------------------------------------------------------------------------------------------


def growth(base: Layer, facts: Facts, *, top_size: int = GIB) -> int:
    """The growth of `base` that a plan reckons with."""
    on = disk(replace(LAYERS[0], virtual_size=top_size), base)
    return plan(request(flags=["active"]), on, facts).demand.growth


def full_qcow2(size: int, cluster: int) -> int:
    """The bytes of a qcow2 file in which every cluster of `size` bytes is allocated (docs/interop/qcow2.txt)."""
    data = -(-size // cluster)
    l2 = -(-data // (cluster // 8))
    l1 = -(-l2 * 8 // cluster)
    blocks = table = 0
    while blocks * (cluster // 2) < 1 + data + l2 + l1 + blocks + table:
        blocks += 1
        table = -(-blocks * 8 // cluster)
    return (1 + data + l2 + l1 + blocks + table) * cluster


@given(st.integers(1, 1 << 22), st.sampled_from([512, 4096, 65536, 2 << 20]))
def test_a_qcow2_base_has_room_for_everything(blocks: int, cluster: int) -> None:
    """The bound on an empty base covers a file with every cluster allocated, its tables too."""
    size = blocks * 512
    base = replace(LAYERS[3], virtual_size=size, actual_size=0, cluster_size=cluster)
    bound = growth(base, Facts(bytes_to_copy=size, new_bytes=size), top_size=size)
    full = full_qcow2(size, cluster)
    assert full <= bound <= full + full // 1000 + 8 * cluster


def test_new_data_in_a_qcow2_base_brings_tables() -> None:
    """A cluster needs a table at most: a 1 GiB image has two L2 tables, an L1, a header and refcounts."""
    base = replace(LAYERS[3], actual_size=0)
    assert growth(base, Facts(bytes_to_copy=65536, new_bytes=65536)) == 65536 + 6 * 65536
    assert growth(base, Facts(bytes_to_copy=131072, new_bytes=131072)) == 131072 + 7 * 65536


def test_a_thin_base_does_not_need_all_of_its_tables() -> None:
    """2 MiB in 4 TiB take their own tables, not those of all of the disk."""
    size = 4096 * GIB
    base = replace(LAYERS[3], virtual_size=size, actual_size=0)
    assert growth(base, Facts(bytes_to_copy=2 << 20, new_bytes=2 << 20), top_size=size) < 8 << 20


def test_a_qcow2_base_does_not_grow_beyond_its_full_size() -> None:
    """A base that is nearly full grows by what is left only, and a fuller than full one not at all."""
    base = replace(LAYERS[3], actual_size=GIB)
    assert growth(base, Facts(bytes_to_copy=GIB, new_bytes=GIB)) == 7 * 65536
    assert growth(replace(base, actual_size=2 * GIB), Facts(bytes_to_copy=GIB, new_bytes=GIB)) == 0


def test_the_tables_are_those_of_the_grown_base() -> None:
    """A base that is resized to a bigger `top` needs tables for the new size."""
    base = replace(LAYERS[3], actual_size=GIB)
    facts = Facts(bytes_to_copy=64 * GIB, new_bytes=64 * GIB)
    assert growth(base, facts, top_size=64 * GIB) > 63 * GIB


def test_a_base_that_grows_hides_what_is_below_it() -> None:
    """Zeros are marked in tables, where a longer layer is below; nothing is, where there is none."""
    shorter = replace(LAYERS[1], virtual_size=GIB // 2, cluster_size=512)
    facts = Facts(bytes_to_copy=0, new_bytes=0, header=HeaderFacts(room=1023))
    asked = request(top="vda[1]", base="vda[2]")
    hidden = plan(asked, disk(LAYERS[0], LAYERS[0], shorter, LAYERS[3]), facts).demand.growth
    nothing = plan(asked, disk(LAYERS[0], LAYERS[0], shorter, replace(LAYERS[3], virtual_size=1)), facts).demand.growth
    assert hidden - nothing > (GIB // 2) // 64
    assert nothing > 0


def test_zeros_beyond_an_end_are_counted() -> None:
    """A layer that ends early below another one is copied as zeros from there on."""
    on = disk(*with_layer(2, virtual_size=GIB // 2))
    assert plan(request(top="vda[1]"), on).demand.copies == 3000 + GIB // 2


def test_nothing_new_means_no_growth() -> None:
    """Data that has its place in the base already takes no more space."""
    assert growth(LAYERS[3], Facts(bytes_to_copy=GIB, new_bytes=0)) == 0


@pytest.mark.parametrize(
    ("actual", "new", "expected"),
    [(0, 1000, 1000), (GIB - 10, 1000, 10), (GIB, 1000, 0), (2 * GIB, 1000, 0)],
)
def test_a_raw_base_fills_its_holes(actual: int, new: int, expected: int) -> None:
    """A raw image takes the new data and never more than its size."""
    base = replace(LAYERS[3], format="raw", actual_size=actual)
    assert growth(base, Facts(bytes_to_copy=new, new_bytes=new)) == expected


def test_other_formats_and_devices() -> None:
    """A format whose tables are not known grows by the data; a block device does not grow, so nothing is refused."""
    assert growth(replace(LAYERS[3], format="vmdk"), Facts(bytes_to_copy=9, new_bytes=9)) == 9
    device = Facts(bytes_to_copy=9, new_bytes=9, written_is_device=True, free=0)
    assert growth(replace(LAYERS[3], format="raw"), device) == 0


def test_an_image_on_a_device_grows_in_it() -> None:
    """A qcow2 image needs new clusters wherever it is."""
    device = Facts(bytes_to_copy=9, new_bytes=65536, written_is_device=True, free=GIB)
    assert growth(LAYERS[3], device) >= 65536
    refused = commit.plan(selection(request(flags=["active"])), replace(device, free=65535))
    assert isinstance(refused, Problem)
    assert (refused.code, refused.extra["free"]) == (Code.INSUFFICIENT_STORAGE, 65535)


def test_what_is_not_written_over_in_its_place() -> None:
    """Compressed clusters, and those of internal snapshots, stay beside the new ones: no size bounds the file's."""
    full = replace(LAYERS[3], actual_size=2 * GIB)
    assert growth(full, Facts(bytes_to_copy=GIB, new_bytes=GIB)) == 0
    assert growth(full, Facts(bytes_to_copy=GIB, new_bytes=GIB, crowded=True)) > GIB


@given(st.integers(0, 2 * GIB), st.integers(0, 2 * GIB), st.sampled_from(["qcow2", "raw", "vmdk"]))
def test_more_data_never_needs_less_room(one: int, other: int, format_: str) -> None:
    """The bound rises with the new data and is never negative."""
    base = replace(LAYERS[3], format=format_)
    less, more = (growth(base, Facts(bytes_to_copy=n, new_bytes=n)) for n in sorted((one, other)))
    assert 0 <= less <= more


# The job ------------------------------------------------------------------------------------------------------------


def test_the_job_carries_the_plan() -> None:
    """All that is needed to do and to prove the work stands in the queued job."""
    asked = request(top="vda[1]", bandwidth=3, flags=["delete"], on_error=OnError.ENOSPC)
    job = accept(plan(asked), id_="bj-7", domain="web1", requested_by="ci", now=99)
    assert (job.id, job.domain, job.disk, job.requested_by, job.created_at) == ("bj-7", "web1", "vda", "ci", 99)
    assert (job.type, job.state, job.version) == (JobType.COMMIT, State.QUEUED, 1)
    assert (job.top_file, job.base_file, job.overlay_file) == (FILES[1], FILES[3], FILES[0])
    assert (job.spec.flags, job.on_ready, job.on_error) == (CommitFlag.DELETE, OnReady.WAIT, OnError.ENOSPC)
    assert job.bandwidth == 3 << 20
    spec = commit_spec(job)
    assert (spec.disk.node, spec.disk.qdev, spec.disk.backend) == ("n3", "virtio0", "disk0")
    assert (spec.disk.files, spec.disk.nodes, spec.top_index, spec.base_index) == (FILES, NODES, 1, 3)
    assert [layer.node for layer in spec.merged] == ["n2", "n1"]
    assert (spec.backing_file, spec.disk.digest) == ("base.qcow2", disk().digest)
    assert spec.invalidates == spec.deletes == FILES[1:3]
    assert (spec.kind, spec.layout, job.parent) == ("commit", 1, None)


def test_an_active_job_has_no_overlay() -> None:
    """Nothing is above the active layer; a disk whose root QEMU has not named goes without."""
    job = plan(request(flags=["active"]), replace(disk(), node=None))
    assert (job.spec.type, job.spec.overlay_file, job.spec.disk.node) == (JobType.ACTIVE_COMMIT, None, "")


def test_nodes_are_released_from_the_top_down() -> None:
    """Each format node goes before the nodes of its file and the filters below it, and the base's own file stays."""
    on = disk(
        replace(LAYERS[0], filters=("throttle0",), below=("p3a", "p3")),
        replace(LAYERS[1], filters=("f2a", "f2b"), below=("p2",)),
        replace(LAYERS[2], below=("p1",)),
        replace(LAYERS[3], filters=("f0",), below=("p0",)),
    )
    whole = plan(request(flags=["active"]), on)
    assert whole.spec.release == ("n3", "p3a", "p3", "f2a", "f2b", "n2", "p2", "n1", "p1", "f0")
    inner = plan(request(top="vda[2]"), on)
    assert inner.spec.release == ("n1", "p1", "f0")


def codes(of: Plan[CommitSpec]) -> list[str]:
    """The codes of a plan's warnings, in order."""
    return [warning.code for warning in of.warnings]


# The command --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top", "speed", "optional"),
    [
        (0, 0, {}),
        (1, 0, {"backing-file": "base.qcow2"}),
        (0, 1, {"speed": 1}),
        (1, 2**63 - 1, {"backing-file": "base.qcow2", "speed": 2**63 - 1}),
    ],
)
def test_the_arguments_of_block_commit(top: int, speed: int, optional: dict[str, object]) -> None:
    """Nodes are named, never files; where a header is to be written the job waits for that; it stays to be read."""
    made = plan(request(flags=() if top else ("active",), top=f"vda[{top}]"))
    command = commit.command(made.spec, bandwidth=speed, on_error=OnError.ENOSPC)
    assert command.execute == "block-commit"
    assert command.arguments == {
        "device": "n3",
        "top-node": NODES[top],
        "base-node": "n0",
        "on-error": "enospc",
        "auto-finalize": top == 0,
        "auto-dismiss": False,
        **optional,
    }


def test_a_dry_run_shows_the_command_of_the_run() -> None:
    """The plan's command is made by the one function that a driver calls for the job."""
    made = plan(request(top="vda[1]", bandwidth=3, on_error=OnError.STOP))
    assert made.commands == (commit.command(made.spec, bandwidth=3 << 20, on_error=OnError.STOP),)


# What the house asks of the kind ------------------------------------------------------------------------------------


def test_what_has_to_be_known_of_the_host() -> None:
    """The base is written, the merged layers are read, and with `delete` they are what may be unlinked."""
    chosen = selection(request(top="vda[1]", flags=["delete"]))
    inquiry = commit.inquiry(chosen)
    assert (inquiry.written, inquiry.read) == (LAYERS[3], LAYERS[1:3])
    assert inquiry.to_delete == {FILES[1]: None, FILES[2]: None}
    assert commit.inquiry(selection(request(top="vda[1]"))).to_delete == {}


def test_the_names_that_may_be_paths() -> None:
    """Only names that were given are looked up."""
    assert commit.layer_names(request(flags=["active"])) == ()
    assert commit.layer_names(request(base="/b", top="/t")) == ("/t", "/b")


def test_what_proves_and_what_is_flushed() -> None:
    """Below the active layer the overlay's header proves the merge, once the base is on the disk."""
    inner, whole = plan(request(top="vda[1]")).spec, plan(request(flags=["active"])).spec
    assert (commit.header_file(inner), commit.flushes(inner)) == (FILES[0], "n0")
    assert (commit.header_file(whole), commit.flushes(whole)) == (None, "")
    assert (
        [layer.file for layer in commit.mixed(inner)] == [layer.file for layer in commit.mixed(whole)] == [*FILES[1:3]]
    )


@pytest.mark.parametrize("spec", [plan(request(top="vda[1]")).spec, plan(request(flags=["active"])).spec])
def test_a_kind_is_found_by_its_spec(spec: CommitSpec) -> None:
    """The one list leads from a spec to its kind, and what is capable of a pivot has no reason to be without one."""
    assert kind_of(spec) is KINDS[spec.kind] is commit
    capabilities = capabilities_of(spec)
    assert capabilities.pivots is (not capabilities.ends_because)
    assert capabilities.held_at_pending is bool(commit.flushes(spec))
    assert capabilities.header_proves is (commit.header_file(spec) is not None)


def test_what_a_commit_claims() -> None:
    """It changes the shape of the chain and the base; what it merges is read, or deleted in the end."""
    facts = Facts(free=GIB, undeletable={FILES[1]: "in use"}, header=HeaderFacts(room=1023))
    spec = plan(request(top="vda[1]", flags=["delete"]), facts=facts).spec
    assert commit.claims(spec, "web1", "vda") == (
        Claim(DiskChain("web1", "vda"), Access.WRITE),
        Claim(Image(FILES[3]), Access.WRITE),
        Claim(Image(FILES[1]), Access.READ),
        Claim(Image(FILES[2]), Access.DELETE),
    )
