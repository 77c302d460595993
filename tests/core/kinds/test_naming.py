"""Which string the header of an overlay gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from app.core.chain import Disk, Identity, Layer, NotDeleted
from app.core.errors import Code, Problem
from app.core.headers import HeaderFacts, relative_name
from app.core.kinds.naming import header_string, proposals
from tests.core.samples import GIB, LAYERS, disk, plan, request, selection

BASE: Identity = (1, 10)
OTHER: Identity = (1, 11)
AT_AN_OFFSET = 'json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"/images/base.qcow2"}}'
SEEN = HeaderFacts(named={"base.qcow2": BASE, "/images/base.qcow2": BASE, "s1.qcow2": OTHER}, room=1023, seen=True)


def chain(overlay: Mapping[str, Any], above: Mapping[str, Any], base: Mapping[str, Any]) -> Disk:
    """The sample disk, with other fields of the overlay, of the layer right above the base, and of the base."""
    known = {"identity": BASE} | dict(base)
    return disk(replace(LAYERS[0], **overlay), LAYERS[1], replace(LAYERS[2], **above), replace(LAYERS[3], **known))


def proposed(on: Disk, *, given: str | None = None, relative: bool = False) -> tuple[str, ...]:
    """The strings for a merge of the two layers below the active one into the base."""
    return proposals(selection(request(top="vda[1]"), on), given=given, relative=relative)


def test_a_merge_of_the_active_layer_writes_no_header() -> None:
    """There is nothing to propose."""
    assert proposals(selection(request(flags=["active"])), given=None, relative=True) == ()


@pytest.mark.parametrize(
    ("overlay", "above", "base", "names"),
    [
        ({}, {}, {}, ("base.qcow2",)),
        ({}, {"backing": "./base.qcow2"}, {}, ("./base.qcow2", "base.qcow2")),
        ({"backing": "/images/s2.qcow2"}, {}, {}, ("/images/base.qcow2", "base.qcow2")),
        ({}, {"backing": "/images/base.qcow2"}, {}, ("base.qcow2", "/images/base.qcow2")),
        ({"file": "/snaps/s3.qcow2"}, {}, {}, ("../images/base.qcow2",)),
        ({"file": "/links/s3.qcow2", "folder": "/images"}, {"folder": "/images"}, {}, ("base.qcow2",)),
        ({}, {"backing": None}, {}, ("base.qcow2",)),
        ({}, {"backing": AT_AN_OFFSET}, {"name": AT_AN_OFFSET}, ("base.qcow2", AT_AN_OFFSET)),
    ],
)
def test_what_is_proposed(
    overlay: Mapping[str, Any], above: Mapping[str, Any], base: Mapping[str, Any], names: tuple[str, ...]
) -> None:
    """Today's string where it means the same in the overlay, the path in the style of before, and QEMU's own."""
    assert proposed(chain(overlay, above, base)) == names


def test_the_caller_s_string_is_the_only_one() -> None:
    """Nothing else is taken in its place."""
    assert proposed(chain({}, {}, {}), given="mine") == ("mine",)


def chosen(names: tuple[str, ...], facts: HeaderFacts, **base: Any) -> str | Problem | None:
    """The string that is taken of these."""
    on = chain({}, {}, base)
    return header_string(selection(request(top="vda[1]"), on), names, facts, given=False)


WITHOUT = 'json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"/images/base.qcow2"}}'
PLAIN = 'json:{"driver":"qcow2","file":{"driver":"file","filename":"/images/base.qcow2"}}'


@pytest.mark.parametrize(
    ("base", "names", "taken"),
    [
        ({"backing": "stale.qcow2", "name": WITHOUT}, ("base.qcow2", PLAIN, WITHOUT), WITHOUT),
        ({"backing": "stale.qcow2", "name": WITHOUT}, ("base.qcow2",), None),
        ({"backing": "nbd://host/x", "name": PLAIN}, ("base.qcow2",), "base.qcow2"),
        ({"backing": None, "name": WITHOUT}, ("base.qcow2", WITHOUT), "base.qcow2"),
        ({"backing": "stale.qcow2", "name": "/images/base.qcow2"}, ("base.qcow2",), "base.qcow2"),
    ],
)
def test_a_base_over_another_image_than_its_header_names(
    base: Mapping[str, Any], names: tuple[str, ...], taken: str | None
) -> None:
    """The header has to say what is below the base where the base's own says something else, and only there."""
    facts = replace(SEEN, named={"base.qcow2": BASE, PLAIN: BASE, WITHOUT: BASE})
    found = chosen(names, facts, **base)
    assert (None if isinstance(found, Problem) else found) == taken


@pytest.mark.parametrize(
    ("names", "facts", "base", "taken"),
    [
        (("base.qcow2",), SEEN, {}, "base.qcow2"),
        (("s1.qcow2", "/images/base.qcow2"), SEEN, {}, "/images/base.qcow2"),
        (("none.qcow2",), SEEN, {}, None),
        (("base.qcow2",), replace(SEEN, room=9), {}, None),
        (("base.qcow2",), replace(SEEN, room=0), {}, None),
        (("base.qcow2",), replace(SEEN, room=None), {}, "base.qcow2"),
        (("/" + "d" * 1023,), replace(SEEN, room=None), {}, None),
        (("base\n.qcow2",), replace(SEEN, named={"base\n.qcow2": BASE}), {}, None),
        (("base.qcow2",), SEEN, {"name": AT_AN_OFFSET}, None),
        (("",), SEEN, {"name": AT_AN_OFFSET}, None),
        ((AT_AN_OFFSET,), replace(SEEN, named={AT_AN_OFFSET: BASE}), {"name": AT_AN_OFFSET}, AT_AN_OFFSET),
        (("base.qcow2",), SEEN, {"name": 'json:{"driver":"qcow2","file.filename":"/b"}'}, "base.qcow2"),
        # Nobody here can look at the base.
        (("base.qcow2",), HeaderFacts(), {"identity": None}, "base.qcow2"),
        (("other.qcow2",), HeaderFacts(), {"identity": None}, None),
        (("",), HeaderFacts(), {"identity": None}, None),
        (("nbd://h/x",), HeaderFacts(), {"identity": None}, None),
        (("base.qcow2",), HeaderFacts(seen=True), {"identity": None}, None),
        (("/dev/fdset/3",), HeaderFacts(), {"identity": None, "file": "/dev/fdset/3"}, None),
        (("nbd://h/x",), HeaderFacts(seen=True), {"identity": None, "file": "nbd://h/x"}, "nbd://h/x"),
        (("nbd://h/y",), HeaderFacts(seen=True), {"identity": None, "file": "nbd://h/x"}, None),
    ],
)
def test_what_is_taken(names: tuple[str, ...], facts: HeaderFacts, base: dict[str, Any], taken: str | None) -> None:
    """The first that fits and leads to the base; where nobody can look, what QEMU itself calls the base."""
    found = chosen(names, facts, **base)
    if taken is None:
        assert isinstance(found, Problem)
        assert found.code is Code.BACKING_FILE_IMPOSSIBLE
        assert names[0][:50].replace("\n", "\\n") in found.detail
    else:
        assert found == taken


def test_a_format_whose_header_can_not_be_changed() -> None:
    """It is refused as an overlay, whatever its name."""
    on = chain({"format": "vmdk"}, {}, {})
    found = header_string(selection(request(top="vda[1]"), on), ("base.qcow2",), SEEN, given=False)
    assert isinstance(found, Problem)
    assert found.code is Code.OVERLAY_NOT_WRITABLE


def test_a_colon_is_no_protocol() -> None:
    """What is in front of a colon would be one."""
    below = Layer(file="/images/vm:1.qcow2", format="qcow2", node="n", virtual_size=GIB, actual_size=0)
    assert relative_name(below, seen_from=LAYERS[0]) == "./vm:1.qcow2"


def test_data_files_are_named_and_stay() -> None:
    """The data of a merged image may be in a file of its own, which is nobody's image."""
    on = disk(LAYERS[0], replace(LAYERS[1], data_file="/images/s2.data"), *LAYERS[2:])
    reason = "it holds the data of /images/s2.qcow2, and may hold that of others"
    kept = NotDeleted(file="/images/s2.data", reason=reason)
    assert plan(request(top="vda[1]", flags=["delete"]), on).spec.undeletable == (kept,)
    assert plan(request(top="vda[1]"), on).spec.undeletable == ()
