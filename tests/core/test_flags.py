from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.errors import Code
from app.core.flags import SpeedFlag, bandwidth_in_bytes, flag_names, names_of, parse_flags
from app.core.kinds.commit import CommitFlag
from tests.core.samples import refusal

NAMES = ("shallow", "delete", "active", "relative", "bandwidth_bytes")


@pytest.mark.parametrize(
    ("name", "bit"), [("shallow", 1), ("delete", 2), ("active", 4), ("relative", 8), ("bandwidth_bytes", 16)]
)
def test_each_name_is_libvirts_bit(name: str, bit: int) -> None:
    """The names and libvirt's bits are two spellings of the same flag."""
    assert parse_flags([name], CommitFlag) == parse_flags(bit, CommitFlag) == CommitFlag(bit)
    assert flag_names(CommitFlag(bit)) == [name]


@given(st.lists(st.sampled_from(NAMES)))
def test_names_in_any_order_and_number_equal_the_mask(names: list[str]) -> None:
    """Names are a set: their order and repetitions don't matter, and they come back in the order of their bits."""
    mask = sum(1 << NAMES.index(name) for name in set(names))
    parsed = parse_flags(names, CommitFlag)
    assert isinstance(parsed, CommitFlag)
    assert parsed == parse_flags(mask, CommitFlag)
    assert flag_names(parsed) == [name for name in NAMES if name in names]


@given(st.integers())
def test_a_mask_is_taken_if_and_only_if_all_its_bits_are_known(mask: int) -> None:
    """Every sum of known bits is taken as it is; every other integer is refused at /flags."""
    parsed = parse_flags(mask, CommitFlag)
    if 0 <= mask <= 31:
        assert parsed == CommitFlag(mask)
    else:
        problem = refusal(parsed)
        assert problem.code is Code.INVALID_REQUEST
        assert [error["pointer"] for error in errors(problem.extra["errors"])] == ["/flags"]


@pytest.mark.parametrize(
    ("value", "shown"), [(32, "0x20"), (0x80000001, "0x80000000"), (-1, "-1")], ids=["next", "high", "negative"]
)
def test_unknown_bits_are_named(value: int, shown: str) -> None:
    """The caller sees which bits nobody knows, not the whole mask."""
    assert f"unknown bits {shown};" in refusal(parse_flags(value, CommitFlag)).detail


def test_every_unknown_name_has_its_pointer() -> None:
    """Each wrong name is told by its own JSON Pointer, and the right ones among them are not."""
    problem = refusal(parse_flags(["pull", "active", "Shallow"], CommitFlag))
    assert problem.code is Code.INVALID_REQUEST
    assert [error["pointer"] for error in errors(problem.extra["errors"])] == ["/flags/0", "/flags/2"]
    assert "'pull'" in problem.detail
    assert "'Shallow'" in problem.detail
    assert "active (4)" in problem.detail


@pytest.mark.parametrize("other", [name for name in NAMES if name != "bandwidth_bytes"])
def test_only_known_flags_are_taken(other: str) -> None:
    """A call that knows fewer flags refuses the others, by name and by bit, and names only its own as expected."""
    assert parse_flags(["bandwidth_bytes"], SpeedFlag) == SpeedFlag.BANDWIDTH_BYTES
    by_name = refusal(parse_flags([other], SpeedFlag, pointer="/f"))
    assert errors(by_name.extra["errors"])[0]["pointer"] == "/f/0"
    assert "expected one of bandwidth_bytes (16)" in by_name.detail
    assert f"{other} (" not in by_name.detail
    assert refusal(parse_flags(CommitFlag[other.upper()].value, SpeedFlag)).code is Code.INVALID_REQUEST


def test_all_flags_are_the_five() -> None:
    """No flag is known to one spelling only."""
    assert names_of(CommitFlag) == list(NAMES)
    assert parse_flags([], CommitFlag) == parse_flags(0, CommitFlag) == CommitFlag(0)


@pytest.mark.parametrize(
    ("value", "flags", "in_bytes"),
    [
        (0, CommitFlag(0), 0),
        (1, CommitFlag(0), 1 << 20),
        (8796093022207, CommitFlag(0), 8796093022207 << 20),
        (1, CommitFlag.BANDWIDTH_BYTES, 1),
        (2**63 - 1, CommitFlag.BANDWIDTH_BYTES, 2**63 - 1),
    ],
)
def test_bandwidth_in_bytes(value: int, flags: CommitFlag, in_bytes: int) -> None:
    """MiB/s are scaled, bytes/s are not, and the greatest values that QEMU's int64 holds are taken."""
    assert bandwidth_in_bytes(value, in_bytes=CommitFlag.BANDWIDTH_BYTES in flags) == in_bytes


@pytest.mark.parametrize(
    ("value", "flags", "bound"),
    [
        (8796093022208, CommitFlag(0), "0 to 8796093022207 MiB/s"),
        (-1, CommitFlag(0), "0 to 8796093022207 MiB/s"),
        (2**63, CommitFlag.BANDWIDTH_BYTES, "0 to 9223372036854775807 bytes/s"),
        (-1, CommitFlag.BANDWIDTH_BYTES, "0 to 9223372036854775807 bytes/s"),
    ],
)
def test_bandwidth_out_of_range(value: int, flags: CommitFlag, bound: str) -> None:
    """One beyond the bound on either side is refused, with the bounds in the caller's unit."""
    problem = refusal(bandwidth_in_bytes(value, in_bytes=CommitFlag.BANDWIDTH_BYTES in flags))
    assert problem.code is Code.INVALID_REQUEST
    assert errors(problem.extra["errors"])[0]["pointer"] == "/bandwidth"
    assert bound in problem.detail


def errors(of: object) -> list[dict[str, str]]:
    """The list of wrong fields that a problem carries."""
    assert isinstance(of, list)
    return of  # pyright: ignore[reportUnknownVariableType] - JSON
