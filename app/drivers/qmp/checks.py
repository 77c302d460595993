"""What a value that came over a monitor may be: its type, its size, and where it stands in its reply.

The limits are far above what QEMU sends, and bound what a peer that is no QEMU can have the service keep.

| what | limit | QEMU's own |
|---|---|---|
| names, ids, types and statuses | `NAME_MAX` bytes | a node-name has 31 at most |
| paths, of files and in QOM | `PATH_MAX` bytes | a file name has 4095 at most, also one that begins with `json:` |
| texts for people | `TEXT_MAX` bytes | |
| lists, and all nodes of one tree | `LIST_MAX` items | |
| nodes below each other in a tree | `DEPTH_MAX` | |
| integers | 64 bits, with a sign | the same |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeVar, cast

from app.engine.ports.driver import Unreachable

T = TypeVar("T")

Judge = Callable[[object], T]
"""Takes a raw value for what it should be, or raises `Wrong`."""

Members = Mapping[str, object]
"""A raw JSON object."""

NAME_MAX: Final = 1024
PATH_MAX: Final = 4096
TEXT_MAX: Final = 65536
LIST_MAX: Final = 100_000
DEPTH_MAX: Final = 1000
INTEGER_MIN: Final = -(1 << 63)
INTEGER_MAX: Final = (1 << 63) - 1

SHOWN: Final = 100
"""How many characters are shown of each end of a long path to a member."""


class MalformedReply(Unreachable):
    """A reply or an event has another shape than QAPI's, or is too large: the peer is not QEMU.

    `command` is what was asked, or the event's name; `member` is the place in the reply, such as `[3].status`.
    """

    def __init__(self, command: str, member: str, why: str) -> None:
        super().__init__(f"{command}: {member}: {why}" if member else f"{command}: {why}")
        self.command = command
        self.member = member


class Wrong(Exception):
    """A value is not what it should be; `places` say where it stands, innermost first."""

    def __init__(self, why: str, *places: str) -> None:
        super().__init__(why)
        self.why = why
        self.places = list(places)

    @property
    def member(self) -> str:
        """The place in the reply, with its middle left out where it is long."""
        member = "".join(reversed(self.places)).removeprefix(".")
        return member if len(member) <= 2 * SHOWN else f"{member[:SHOWN]}…{member[-SHOWN:]}"


@dataclass(frozen=True, slots=True)
class Query(Generic[T]):
    """A command whose reply is used, and how that is judged."""

    command: str
    judge: Judge[T]

    def read(self, reply: object) -> T:
        """The values of a raw reply; raises `MalformedReply`."""
        try:
            return self.judge(reply)
        except Wrong as wrong:
            member, why = wrong.member, wrong.why
        # Raised out here: an error that follows another one keeps that one's frames, and all of the reply with them.
        raise MalformedReply(self.command, member, why)


def string(limit: int) -> Judge[str]:
    """A string of `limit` bytes of UTF-8 at most, without zero bytes, as QEMU's own strings end at one."""

    def judge(value: object) -> str:
        # Most are plain, and there are thousands in one reply.
        if type(value) is str and len(value) <= limit and value.isascii() and "\0" not in value:
            return value
        return _unusual(value, limit)

    return judge


def _unusual(value: object, limit: int) -> str:
    if type(value) is not str:
        raise Wrong("expected a string")
    if len(value) > limit:
        raise Wrong(f"longer than {limit} bytes")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise Wrong("holds half of a surrogate pair") from None
    if size > limit:
        raise Wrong(f"longer than {limit} bytes")
    if "\0" in value:
        raise Wrong("holds a zero byte")
    return value


name = string(NAME_MAX)
path = string(PATH_MAX)
text = string(TEXT_MAX)


def integer(least: int) -> Judge[int]:
    """An integer of `least` at least; true and false are none."""

    def judge(value: object) -> int:
        if type(value) is not int:
            raise Wrong("expected an integer")
        if not least <= value <= INTEGER_MAX:
            raise Wrong(f"not between {least} and {INTEGER_MAX}")
        return value

    return judge


any_integer = integer(INTEGER_MIN)
count = integer(0)
cluster = integer(512)
"""The size of a cluster; no format that QEMU knows has a smaller one than a sector (block/qcow2.h)."""


def boolean(value: object) -> bool:
    """True or false."""
    if type(value) is not bool:
        raise Wrong("expected true or false")
    return value


def members(value: object) -> Members:
    """A JSON object."""
    if type(value) is not dict:
        raise Wrong("expected an object")
    return cast("dict[str, object]", value)


def list_of(judge: Judge[T]) -> Judge[tuple[T, ...]]:
    """A list whose items are all as `judge` says."""

    def judge_all(value: object) -> tuple[T, ...]:
        if type(value) is not list:
            raise Wrong("expected a list")
        items = cast("list[object]", value)
        if len(items) > LIST_MAX:
            raise Wrong(f"more than {LIST_MAX} items")
        found: list[T] = []
        try:
            for item in items:
                found.append(judge(item))  # noqa: PERF401 - how many there are tells which item is wrong
        except Wrong as wrong:
            wrong.places.append(f"[{len(found)}]")
            raise
        return tuple(found)

    return judge_all


def member(of: Members, key: str, judge: Judge[T]) -> T:
    """A member that has to be there."""
    value = of.get(key)
    if value is None and key not in of:
        raise Wrong("missing", f".{key}")
    try:
        return judge(value)
    except Wrong as wrong:
        wrong.places.append(f".{key}")
        raise


def optional(of: Members, key: str, judge: Judge[T]) -> T | None:
    """A member that may be missing; null stands for that, too."""
    value = of.get(key)
    if value is None:
        return None
    try:
        return judge(value)
    except Wrong as wrong:
        wrong.places.append(f".{key}")
        raise


def only(key: str, judge: Judge[T]) -> Judge[T]:
    """An object of which one member is used."""
    return lambda value: member(members(value), key, judge)


def tree(roles: tuple[str, ...], build: Callable[[Members, Mapping[str, T]], T]) -> Judge[T]:
    """An object whose members `roles` are objects of its own kind; `build` gets what those have become, by role.

    It is walked without recursion, as a chain may be longer than Python's stack is high.
    """

    def judge(value: object) -> T:
        root = _Branch[T](value)
        branches = [root]
        for branch in branches:
            if branch.depth > DEPTH_MAX:
                raise branch.wrong(Wrong(f"below more than {DEPTH_MAX - 1} others"))
            branches.extend(_Branch(branch.of[role], branch, role) for role in roles if branch.of.get(role) is not None)
            if len(branches) > LIST_MAX:
                raise branch.wrong(Wrong(f"more than {LIST_MAX} nodes"))
        # What is below a branch comes after it, so from the end on it has been built when it is needed.
        for branch in reversed(branches):
            branch.grow(build)
        return root.built[""]

    return judge


class _Branch(Generic[T]):
    """A node of a tree, and `built`, which is what the nodes below it have become, by role; itself has the role ''."""

    __slots__ = ("built", "depth", "of", "owner", "role")

    def __init__(self, value: object, owner: _Branch[T] | None = None, role: str = "") -> None:
        self.owner = owner
        self.role = role
        self.depth: int = owner.depth + 1 if owner else 1
        self.built: dict[str, T] = {}
        try:
            self.of = members(value)
        except Wrong as wrong:
            raise self.wrong(wrong) from None

    def grow(self, build: Callable[[Members, Mapping[str, T]], T]) -> None:
        """Build this node; those below it have been built."""
        try:
            made = build(self.of, self.built)
        except Wrong as wrong:
            raise self.wrong(wrong) from None
        (self.owner or self).built[self.role] = made

    def wrong(self, wrong: Wrong) -> Wrong:
        """What is wrong with this node, with where it stands."""
        at = self
        while at.owner is not None:
            wrong.places.append(f".{at.role}")
            at = at.owner
        return wrong
