"""Images: when two are the same, who uses them, which jobs exclude each other, and whose content is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.chain import Layer
from app.core.images import (
    Access,
    Claim,
    Conflict,
    DiskChain,
    Image,
    ImageUse,
    InvalidMark,
    InvalidReason,
    JobClaims,
    conflicts,
    find_conflict,
    format_of,
    has_image,
    marks_of_merge,
    may_be_same,
    related,
    same_image,
    users_of,
    uses_by,
    valid_layers,
)
from app.core.sameness import Sameness

from .samples import FILES, LAYERS, disk

# Few values, so that equal ones are common.
IMAGES = st.builds(
    Image,
    st.sampled_from(["/a", "/b", "/b/../a", "nbd://host/x"]),
    st.none() | st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.none() | st.integers(1, 2),
)
RESOURCES = IMAGES | st.builds(DiskChain, st.sampled_from(["web1", "web2"]), st.sampled_from(["vda", "vdb"]))
CLAIMS = st.builds(Claim, RESOURCES, st.sampled_from(Access))
IDS = st.sampled_from(["bj-1", "bj-2", "bj-3"])
JOBS = st.builds(
    JobClaims, job_id=IDS, parent=st.none() | IDS, claims=st.lists(CLAIMS, min_size=1, max_size=3).map(tuple)
)

A = Image("/a", (1, 10))
B = Image("/b", (1, 20))
VDA = DiskChain("web1", "vda")


def claims(job_id: str, *held: Claim, parent: str | None = None) -> JobClaims:
    return JobClaims(job_id=job_id, parent=parent, claims=held)


def use(image: Image | None, *, domain: str = "web1", name: str = "vda", place: int = 0) -> ImageUse:
    return ImageUse(domain=domain, disk=name, place=place, image=image, seen_at=7)


@pytest.mark.parametrize(
    ("one", "other", "answer"),
    [
        (Image("/a", (1, 10)), Image("/b", (1, 10)), Sameness.SAME),
        (Image("/a", (1, 10)), Image("/a", (1, 20)), Sameness.OTHER),
        (Image("/a", (1, 10)), Image("/b", (2, 10)), Sameness.OTHER),
        # After a restart of the host the file system may have another number.
        (Image("/a", (1, 10)), Image("/a", (2, 10)), Sameness.UNKNOWN),
        (Image("/a", None), Image("/b", (1, 10)), Sameness.UNKNOWN),
        (Image("/a", None), Image("/a", None), Sameness.UNKNOWN),
        # Two nodes of one device, and two devices.
        (Image("/dev/dm-3", (5, 10), 64771), Image("/dev/mapper/x", (5, 20), 64771), Sameness.SAME),
        (Image("/dev/dm-3", (5, 10), 64771), Image("/dev/dm-4", (5, 10), 64772), Sameness.OTHER),
        (Image("/dev/vg/a", (5, 10), 64771), Image("/dev/vg/a", (5, 10), 64772), Sameness.UNKNOWN),
        (Image("/dev/vg/a", (5, 10), 64771), Image("/dev/vg/a", (5, 10)), Sameness.SAME),
    ],
)
def test_when_two_images_are_the_same(one: Image, other: Image, answer: Sameness) -> None:
    """Identities and device numbers decide; what was not seen, and numbers that a restart changes, decide nothing."""
    assert same_image(one, other) is answer
    assert same_image(other, one) is answer


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("/images/web1/../base.qcow2", "/images/base.qcow2"),
        ("//images//base.qcow2", "/images/base.qcow2"),
        ("nbd://host/x/../y", "nbd://host/x/../y"),
        ("base.qcow2", "base.qcow2"),
    ],
)
def test_a_path_has_one_spelling(path: str, kept: str) -> None:
    """QEMU joins folders and names; names that are no absolute paths stay as they are."""
    assert Image(path).path == kept


def test_equal_paths_decide_where_nobody_can_tell() -> None:
    """An image that could not be seen is treated as the one with its path, and as no other."""
    assert may_be_same(Image("/a"), A)
    assert not may_be_same(Image("/a"), B)
    assert not may_be_same(A, Image("/a", (1, 11)))
    assert may_be_same(A, Image("/link-to-a", (1, 10)))


@given(IMAGES, IMAGES)
def test_sameness_is_symmetric(one: Image, other: Image) -> None:
    """It does not matter which image is asked about the other; each is the same as itself."""
    assert same_image(one, other) is same_image(other, one)
    assert may_be_same(one, other) is may_be_same(other, one)
    assert may_be_same(one, one)


@given(IMAGES, IMAGES)
def test_images_that_may_be_the_same_have_something_in_common(one: Image, other: Image) -> None:
    """The journal finds them by equal paths, identities and device numbers, so there is no other way."""
    if may_be_same(one, other):
        same_file = one.identity is not None and one.identity == other.identity
        same_device = one.device is not None and one.device == other.device
        assert one.path == other.path or same_file or same_device


def test_the_uses_of_a_disk() -> None:
    """Each layer of the chain is a use, at its place; a block device is known by its number."""
    lv = Layer(file="/dev/vg/base", format="raw", node="n0", virtual_size=1, actual_size=1, identity=(5, 9))
    found = uses_by("web1", disk(LAYERS[0], replace(lv, device=64771)), seen_at=7)
    assert found == (
        replace(use(Image("/images/s3.qcow2")), format="qcow2"),
        replace(use(Image("/dev/vg/base", (5, 9), 64771), place=1), format="raw"),
    )
    assert uses_by("web1", replace(disk(), layers=()), seen_at=7) == ()


def test_whether_a_disk_has_an_image() -> None:
    """Another file of the same number is another image; what nobody can see may be the one of that path."""
    on = disk(replace(LAYERS[0], identity=(1, 2), born=7), LAYERS[1])
    assert has_image(on, Image("/elsewhere", (1, 2), born=7))
    assert not has_image(on, Image(FILES[0], (1, 2), born=8))
    assert has_image(on, Image(FILES[1]))
    assert not has_image(on, Image(FILES[2]))


def test_who_uses_an_image() -> None:
    """Other disks that have the image anywhere, whatever they call it; a chain with an unknown image may have it."""
    mine = (use(A), use(B, place=1))
    other = (use(Image("/c", (1, 30)), domain="web2"), use(Image("/link", (1, 20)), domain="web2", place=1))
    unknown = (use(Image("/d", (1, 40)), domain="off1"), use(None, domain="off1", place=1))
    every = (*mine, *other, *unknown)
    assert users_of(every, B) == (mine[1], other[1], unknown[1])
    assert users_of(every, B, besides=mine) == (other[1], unknown[1])
    assert users_of(mine, B, besides=mine) == ()


def test_a_disk_with_the_same_active_layer_is_the_same_disk() -> None:
    """A domain that is known twice does not stand in its own way; an unknown active layer is not the same."""
    mine = (use(A), use(B, place=1))
    again = (use(Image("/a"), domain="seen-before"), use(B, domain="seen-before", place=1))
    unknown = (use(None, domain="off1"), use(B, domain="off1", place=1))
    assert users_of((*mine, *again), B, besides=mine) == ()
    assert users_of(unknown, B, besides=mine) == unknown
    assert users_of(mine, B, besides=unknown) == (mine[1],)


@given(
    st.lists(st.builds(use, st.none() | IMAGES, domain=st.sampled_from(["x", "y"]), place=st.integers(0, 2))), IMAGES
)
def test_users_are_uses(uses: list[ImageUse], image: Image) -> None:
    """Who uses an image is found among the uses, and nobody is left out who may use it."""
    found = users_of(uses, image)
    assert list(found) == [each for each in uses if each.image is None or may_be_same(each.image, image)]


READ_A, WRITE_A, DELETE_A = (Claim(A, access) for access in Access)


@pytest.mark.parametrize(
    ("one", "other", "excluded"),
    [
        (READ_A, READ_A, False),
        (READ_A, WRITE_A, True),
        (READ_A, DELETE_A, True),
        (WRITE_A, WRITE_A, True),
        (WRITE_A, DELETE_A, True),
        (DELETE_A, DELETE_A, True),
        (WRITE_A, Claim(B, Access.WRITE), False),
        (WRITE_A, Claim(Image("/a"), Access.READ), True),
        (Claim(VDA, Access.WRITE), Claim(VDA, Access.WRITE), True),
        (Claim(VDA, Access.READ), Claim(VDA, Access.READ), False),
        (Claim(VDA, Access.WRITE), Claim(DiskChain("web1", "vdb"), Access.WRITE), False),
        (Claim(VDA, Access.WRITE), WRITE_A, False),
    ],
)
def test_which_claims_exclude_each_other(one: Claim, other: Claim, excluded: bool) -> None:
    """Any number of jobs may read; who writes or deletes is alone."""
    assert conflicts(one, other) is excluded
    assert conflicts(other, one) is excluded


@given(CLAIMS, CLAIMS)
def test_conflicts_are_symmetric(one: Claim, other: Claim) -> None:
    """It does not matter who asks; a claim that is more than a read excludes its like."""
    assert conflicts(one, other) is conflicts(other, one)
    assert conflicts(one, one) is (one.access is not Access.READ)


@given(CLAIMS, CLAIMS)
def test_a_stronger_claim_excludes_no_less(one: Claim, other: Claim) -> None:
    """What a read excludes, a write excludes too; a write and a deletion exclude the same."""
    write, delete = replace(one, access=Access.WRITE), replace(one, access=Access.DELETE)
    assert conflicts(write, other) >= conflicts(one, other)
    assert conflicts(write, other) is conflicts(delete, other)


def test_the_conflict_is_named() -> None:
    """The first other job that stands in the way, and the two claims; nothing where there is none."""
    mine = claims("bj-3", READ_A, Claim(VDA, Access.WRITE))
    reader, chain = claims("bj-1", READ_A), claims("bj-2", Claim(VDA, Access.WRITE))
    assert find_conflict(mine, [reader, chain]) == Conflict(
        job_id="bj-2", mine=Claim(VDA, Access.WRITE), theirs=Claim(VDA, Access.WRITE)
    )
    assert find_conflict(mine, [reader]) is None


def test_a_job_and_its_steps_don_t_exclude_each_other() -> None:
    """A parent holds what its steps need; two steps of one parent, and strangers, exclude each other."""
    parent = claims("bj-1", WRITE_A)
    step, sibling = claims("bj-2", WRITE_A, parent="bj-1"), claims("bj-3", WRITE_A, parent="bj-1")
    assert find_conflict(step, [parent]) is None
    assert find_conflict(parent, [step]) is None
    assert find_conflict(parent, [parent]) is None
    found = find_conflict(step, [parent, sibling])
    assert found
    assert found.job_id == "bj-3"


@given(JOBS, JOBS)
def test_conflicts_of_jobs_are_symmetric(one: JobClaims, other: JobClaims) -> None:
    """Whichever job comes second is refused; related jobs never are."""
    assert related(one, other) is related(other, one)
    assert (find_conflict(one, [other]) is None) is (find_conflict(other, [one]) is None)
    if related(one, other):
        assert find_conflict(one, [other]) is None


CHAIN = tuple(Image(layer.file) for layer in LAYERS)


@pytest.mark.parametrize(
    ("top", "base", "valid"),
    [
        (0, 3, (True, False, False, True)),
        (1, 3, (True, False, False, True)),
        (1, 2, (True, False, True, True)),
        (0, 1, (True, True, True, True)),
    ],
)
def test_layers_between_top_and_a_modified_base_are_not_valid(top: int, base: int, valid: tuple[bool, ...]) -> None:
    """Once the base is written to, the merged images show a mixture; the active layer and the base itself do not."""
    marks = marks_of_merge(CHAIN, top=top, base=base, job_id="bj-1", domain="web1", reason=InvalidReason.BASE_MODIFIED)
    assert valid_layers(disk(), marks) == valid
    assert all((mark.job_id, mark.domain, mark.reason) == ("bj-1", "web1", "base-modified") for mark in marks)
    assert valid_layers(disk(), ()) == (True,) * 4


def test_a_mark_belongs_to_the_image() -> None:
    """Whichever chain the image is in, under whichever name; another file under its path has no part in it."""
    mark = InvalidMark(image=A, job_id="bj-1", domain="gone", reason=InvalidReason.KEPT)

    def layer(file: str, inode: int | None) -> Layer:
        return replace(LAYERS[1], file=file, identity=None if inode is None else (1, inode))

    chain = disk(layer("/top", 1), layer("/link", 10), layer("/a", None), layer("/a", 11), layer("/b", None))
    assert valid_layers(chain, [mark]) == (True, False, False, True, True)


def test_equal_paths_of_two_domains_exclude_nobody() -> None:
    """QEMUs on other hosts, or in other containers, have other files under one path; a file that is seen is one."""
    unseen, seen = Claim(Image("/data/base"), Access.WRITE), Claim(Image("/data/base", (1, 2)), Access.WRITE)
    for mine, theirs, excluded in ((unseen, unseen, False), (seen, unseen, False), (seen, seen, True)):
        one = JobClaims(job_id="bj-1", domain="web1", claims=(mine,))
        other = JobClaims(job_id="bj-2", domain="web2", claims=(theirs,))
        assert (find_conflict(one, [other]) is not None) is excluded
        assert find_conflict(one, [JobClaims(job_id="bj-3", domain="web1", claims=(theirs,))]) is not None


def test_a_number_that_was_given_again() -> None:
    """Two files that were made at different times are two, whatever number their file system gave them."""
    one, other = Image("/a", (1, 2), born=5), Image("/a", (1, 2), born=6)
    assert same_image(one, other) is Sameness.OTHER
    assert same_image(one, replace(other, born=None)) is Sameness.SAME
    assert same_image(one, replace(other, born=5)) is Sameness.SAME


def test_what_a_process_names_and_does_not_hold_is_no_use() -> None:
    """A monitor may name any file."""
    claimed = disk(replace(LAYERS[0], identity=(1, 9)), replace(LAYERS[3], unheld=True))
    assert [(use.place, use.image) for use in uses_by("liar", claimed, seen_at=1)] == [(0, Image(FILES[0], (1, 9)))]


def test_who_else_uses_a_base() -> None:
    """Another disk with the base in its chain is a user; the same active layer is the same disk."""
    mine = uses_by("web1", disk(), seen_at=0)
    theirs = uses_by("web2", disk(replace(LAYERS[0], file="/other"), LAYERS[3]), seen_at=0)
    again = uses_by("again", disk(), seen_at=0)
    users = users_of((*theirs, *again), Image(FILES[3]), besides=mine)
    assert [(use.domain, use.place) for use in users] == [("web2", 1)]


def test_a_use_keeps_what_qemu_has_told_of_the_format() -> None:
    """What QEMU had as raw is raw, whatever is in it."""
    raw = replace(LAYERS[3], format="raw")
    found = uses_by("web1", disk(LAYERS[0], raw), seen_at=1)
    assert [use.format for use in found] == [LAYERS[0].format, "raw"]
    assert format_of(Image.of(raw), found, "web1") == "raw"
    assert format_of(Image("/other", (1, 99)), found, "web1") is None


def test_which_told_format_counts() -> None:
    """The first that tells; of another domain only where the image is surely the same."""
    told = replace(use(A), format="raw")
    assert format_of(A, [use(None), use(A), told, replace(told, format="qcow2")], "web1") == "raw"
    assert format_of(A, [replace(told, image=None)], "web1") is None
    unseen = Image(A.path)
    assert format_of(unseen, [told], "web1") == "raw"
    assert format_of(unseen, [told], "web2") is None
    assert format_of(Image("/link", A.identity), [told], "web2") == "raw"
    born = replace(told, image=replace(A, born=1))
    assert format_of(replace(A, born=2), [born], "web1") is None
