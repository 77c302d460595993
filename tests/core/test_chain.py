from __future__ import annotations

import posixpath
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from app.core.chain import Disk, Layer, matching_disks
from app.core.headers import relative_name
from tests.core.samples import FILES, LAYERS, NODES, disk, with_layer

SEGMENTS = st.text("abc.-[]", min_size=1, max_size=4).filter(lambda name: name not in {".", ".."})
FOLDERS = st.lists(SEGMENTS, max_size=4).map(lambda names: "/" + "/".join(names))


@pytest.mark.parametrize("position", range(4))
def test_a_layer_is_found_by_each_of_its_names(position: int) -> None:
    """Index, node and path name the same layer, whichever of the disk's names the index is on."""
    names = [f"vda[{position}]", f"disk0[{position}]", f"virtio0[0{position}]", NODES[position], FILES[position]]
    assert [disk().find(name) for name in names] == [position] * 5


@pytest.mark.parametrize(
    "name",
    ["vda[4]", "vdb[0]", "vda[]", "vda[-1]", "vda[1", "[1]", "n9", "/images/other.qcow2", "s3.qcow2", "", "vda"],
)
def test_a_name_of_no_layer_finds_none(name: str) -> None:
    """An index beyond the chain or on another disk, and a name that nothing has, are no layer."""
    assert disk().find(name) is None


@pytest.mark.parametrize(("name", "position"), [("s2.qcow2", 1), ("s1.qcow2", 2), ("base.qcow2", 3)])
def test_a_layer_is_found_by_the_string_in_the_header_above(name: str, position: int) -> None:
    """What the overlay's header says names the layer below it, as it does for QEMU."""
    assert disk().find(name) == position


@pytest.mark.parametrize("name", ["/images/../images/s1.qcow2", "/images//s1.qcow2", "/./images/s1.qcow2"])
def test_a_path_is_normalised(name: str) -> None:
    """Dots and double slashes in an absolute path don't hide a layer."""
    assert disk().find(name) == 2


def test_a_path_is_told_by_its_file() -> None:
    """A symlink or hard link names the layer whose file it is; a file that can't be seen is compared by path only."""
    chain = disk(*with_layer(2, identity=(1, 42)))
    assert chain.find("/links/one", (1, 42)) == 2
    assert chain.find("/links/one", (1, 43)) is None
    assert chain.find("/links/one") is None
    assert disk().find("/links/one", (1, 42)) is None


def test_a_file_with_an_index_in_its_name_is_a_file() -> None:
    """Brackets in a path are not an index: only the disk's own names take one."""
    chain = disk(*with_layer(1, file="/images/s2[7]"))
    assert chain.find("/images/s2[7]") == 1


@pytest.mark.parametrize(
    ("backing", "relative"),
    [
        ("base.qcow2", True),
        ("../base.qcow2", True),
        ("sub/a:b.qcow2", True),
        ("/images/base.qcow2", False),
        ("nbd://host/export", False),
        ("json:{}", False),
        (None, False),
    ],
)
def test_what_counts_as_a_relative_header(backing: str | None, *, relative: bool) -> None:
    """A path without a leading slash is relative; with a protocol in front, or without any name, it is not."""
    assert replace(LAYERS[0], backing=backing).relative is relative


@pytest.mark.parametrize(
    ("overlay", "base", "name"),
    [
        ("/images/s3", "/images/base", "base"),
        ("/images/snaps/today/s3", "/images/base", "../../base"),
        ("/images/s3", "/images/deep/er/base", "deep/er/base"),
        ("/a/b/s3", "/c/d/base", "../../c/d/base"),
        ("/s3", "/base", "base"),
        ("/images/snaps/../s3", "/images/base", "base"),
    ],
)
def test_a_name_relative_to_the_overlays_folder(overlay: str, base: str, name: str) -> None:
    """A header names the base from its own image's folder, however the two are nested."""
    assert relative_name(replace(LAYERS[3], file=base), seen_from=replace(LAYERS[0], file=overlay)) == name


def test_symlinked_folders_are_resolved() -> None:
    """`..` leaves the real folder, not the symlink: a name through a linked folder would lead elsewhere."""
    overlay = replace(LAYERS[0], file="/link/s3", folder="/data/deep/snaps")
    base = replace(LAYERS[3], file="/images/base", folder="/data/images")
    assert relative_name(base, seen_from=overlay) == "../../images/base"


@given(FOLDERS, FOLDERS, SEGMENTS)
def test_a_relative_name_leads_back(here: str, there: str, name: str) -> None:
    """Whatever the folders are, the name seen from the overlay's folder leads to the base again."""
    target = posixpath.join(there, name)
    relative = relative_name(replace(LAYERS[3], file=target), seen_from=replace(LAYERS[0], file=f"{here}/overlay"))
    assert not relative.startswith("/")
    assert posixpath.normpath(posixpath.join(here, relative)) == posixpath.normpath(target)


def test_the_disks_shape() -> None:
    """Files and nodes stand as in the chain, and the guest sees the active layer's size."""
    assert (disk().files, disk().nodes, disk().virtual_size) == (FILES, NODES, 1 << 30)
    assert Disk(name="sr0").virtual_size == 0


LAYER_VALUES = st.builds(
    Layer,
    file=st.sampled_from(["/a", "/b"]),
    format=st.sampled_from(["qcow2", "raw"]),
    backing=st.sampled_from([None, "/b", "b"]),
    node=st.sampled_from(["n1", "n2"]),
    virtual_size=st.integers(0, 2),
    actual_size=st.integers(0, 2),
)


@given(st.lists(LAYER_VALUES, max_size=3), st.lists(LAYER_VALUES, max_size=3))
def test_the_digest_is_the_chains(one: list[Layer], other: list[Layer]) -> None:
    """Two digests are equal if and only if files, formats and headers are; nodes and sizes don't count."""
    same = [(layer.file, layer.format, layer.backing) for layer in one] == [
        (layer.file, layer.format, layer.backing) for layer in other
    ]
    assert (Disk(name="vda", layers=tuple(one)).digest == Disk(name="vdb", layers=tuple(other)).digest) is same


@given(st.sampled_from(range(4)), st.sampled_from(["file", "format", "backing"]), st.text(max_size=8))
def test_a_change_of_a_layer_changes_the_digest(position: int, what: str, value: str) -> None:
    """The digest is another as soon as one layer has another file, format or header, and has a fixed form."""
    layers = with_layer(position, **{what: value})
    assume(layers != LAYERS)
    assert disk(*layers).digest != disk().digest
    assert disk().digest.startswith("sha256:")
    assert len(disk().digest) == len("sha256:") + 64


def test_disks_answer_to_their_names() -> None:
    """A disk is found by target name, alias, and the path or file of any of its layers."""
    other = Disk(name="vdb", aliases=("virtio1",), layers=(replace(LAYERS[3], file="/other", identity=(1, 7)),))
    disks = (disk(), other)
    for name in ("vda", "virtio0", "disk0", *FILES, "/images/./s1.qcow2"):
        assert list(matching_disks(disks, name, None)) == [disk()], name
    for name, identity in (("vdb", None), ("virtio1", None), ("/other", None), ("/links/other", (1, 7))):
        assert list(matching_disks(disks, name, identity)) == [other], name
    assert list(matching_disks(disks, "vdc", None)) == []
    assert list(matching_disks(disks, "n3", None)) == []


def test_a_name_of_two_disks_is_ambiguous() -> None:
    """A shared image names both disks, and so does a target name that is another disk's alias."""
    other = Disk(name="vdb", aliases=("vda",), layers=(LAYERS[3],))
    disks = (disk(), other)
    assert list(matching_disks(disks, "/images/base.qcow2", None)) == [disk(), other]
    assert list(matching_disks(disks, "vda", None)) == [disk(), other]
