"""What a monitor says is judged in one place: a reply becomes values, or it is malformed, and nothing else happens."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.errors import CANCELED
from app.core.job import Progress
from app.core.kinds import adopt
from app.core.plan import Guest
from app.drivers.qmp import checks, graph, replies
from app.drivers.qmp.checks import MalformedReply, Query

SAMPLE: Final = json.loads(Path(__file__).with_name("qemu-7.2.json").read_text())
"""What a real QEMU said; see `tests.drivers.record`."""

QUERIES: Final[dict[str, Query[Any]]] = {
    query.command: query
    for name, query in vars(replies).items()
    if isinstance(query, Query) and not name.startswith("_")
}
REPLIES: Final[dict[str, Any]] = SAMPLE["replies"] | {"greeting": SAMPLE["replies"]["query-version"]}
EVENTS: Final[dict[str, Any]] = SAMPLE["events"]

Place = tuple[str | int, ...]
"""The way to a value: members and positions, outermost first."""


def read(command: str, reply: object) -> Any:
    """What the reply to a command, or the data of an event, says."""
    return replies.event(command, reply) if command in EVENTS else QUERIES[command].read(reply)


def recorded(command: str) -> Any:
    """The recorded reply to a command, or data of an event, to be changed at will."""
    return copy.deepcopy(EVENTS[command]["data"] if command in EVENTS else REPLIES[command])


def changed(said: Any, place: Place, value: object) -> Any:
    """A reply with another value at a place; `...` takes away what is there."""
    if not place:
        return value
    inner = said
    for step in place[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return said


def name_of(place: Place) -> str:
    """How a place is written in an error."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")


# Good replies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [*QUERIES, *EVENTS])
def test_recorded(command: str) -> None:
    """What QEMU really says is read."""
    read(command, recorded(command))


def test_values() -> None:
    """The values are those of the replies, by the service's names; what is missing is None."""
    assert read("query-status", recorded("query-status")) == replies.Status(running=False, state="")
    assert read("query-name", recorded("query-name")) == "sample"
    assert read("query-name", {}) is None
    assert str(read("greeting", recorded("greeting"))).startswith("7.2.")
    assert "block-commit" in read("query-commands", recorded("query-commands"))
    assert read("query-chardev", recorded("query-chardev")) == ("compat_monitor1", "compat_monitor0")
    assert read("qom-get", recorded("qom-get")) == "virtio-blk-pci"
    running, canceled = read("query-jobs", recorded("query-jobs"))
    assert (running.id, running.status, running.error) == ("bj-2", "running", None)
    assert (canceled.id, canceled.status, canceled.error) == ("bj-1", "concluded", CANCELED)
    assert read("query-block-jobs", recorded("query-block-jobs"))[0] == replies.BlockJob(
        id="bj-2", type="commit", status="running", io_status="ok", speed=1
    )
    disk, empty = read("query-block", recorded("query-block"))
    assert disk.medium is not None
    assert (disk.medium.node, disk.medium.read_only) == ("n2", False)
    assert [image.file for image in disk.medium.images] == [image.file for image in disk.medium.images]
    assert (empty.backend, empty.medium) == ("", None)
    nodes = read("query-named-block-nodes", recorded("query-named-block-nodes"))
    assert (nodes["n1"].driver, nodes["n1"].virtual_size, nodes["n1"].cluster_size) == ("qcow2", 4 << 20, 65536)
    assert (nodes["fn0"].file, nodes["fn0"].cluster_size, nodes["fn0"].backing) == ("/images/l0.qcow2", None, None)
    (root, _cd) = read("query-blockstats", recorded("query-blockstats"))
    assert (root.node, root.carrier.node, root.backing.node) == ("n2", "fn2", "n1")
    assert (root.backing.backing.node, root.backing.backing.backing.node) == ("throttle", "n0")


def test_values_of_events() -> None:
    """An event's data are values too, and of those that nobody uses nothing is looked at."""
    canceled = read("BLOCK_JOB_CANCELLED", recorded("BLOCK_JOB_CANCELLED"))
    assert (canceled.id, canceled.error) == ("bj-1", CANCELED)
    completed = recorded("BLOCK_JOB_COMPLETED") | {"error": "No space left on device", "offset": 5}
    assert replies.event("BLOCK_JOB_COMPLETED", completed) == replies.JobEnded(
        id="bj-2", progress=Progress(current=5, end=4 << 20), error="No space left on device"
    )
    assert replies.event("JOB_STATUS_CHANGE", {"id": "bj-1", "status": "ready"}) == replies.JobStatusChanged(
        id="bj-1", status="ready"
    )
    assert replies.event("STOP", None) == replies.OtherEvent(name="STOP")
    assert replies.event("NEVER_HEARD_OF", [1, [2]]) == replies.OtherEvent(name="NEVER_HEARD_OF")


def test_chain_of_the_recording() -> None:
    """The recorded replies make the disk that was recorded, with its filter, its job and what that works on."""
    disks, orphan = all_disks(copy.deepcopy(REPLIES))
    assert [disk.nodes for disk in disks] == [("n2", "n1", "n0"), ()]
    assert disks[0].layers[2].filters == ("throttle",)
    assert disks[0].running_jobs == ("bj-2",)
    assert orphan is not None
    assert (orphan.spec.top_index, orphan.spec.base_index, orphan.bandwidth) == (1, 2, 1)


def test_members_that_nobody_uses() -> None:
    """QEMU may say more than is used, of whatever shape."""
    for command in ("query-jobs", "query-block", "query-named-block-nodes"):
        plain, more = recorded(command), recorded(command)
        more[0] |= {"new": [{"deep": [[[]]]}], "stats": "x" * checks.TEXT_MAX * 2, "type": None}
        assert read(command, plain) == read(command, more)


# Every member, wrong in every way ------------------------------------------------------------------------------------

NAME, PATH, TEXT = checks.NAME_MAX, checks.PATH_MAX, checks.TEXT_MAX
MANY: Final = checks.INTEGER_MAX
STRING, INTEGER, BOOLEAN, OBJECT, LIST = "a string", "an integer", "true or false", "an object", "a list"
KINDS: Final[dict[str, list[object]]] = {
    STRING: ["text", ""],
    INTEGER: [7, 0, -3, 1.5, 1e300],
    BOOLEAN: [True, False],
    OBJECT: [{}, {"a": 1}],
    LIST: [[], [1]],
}
"""Values of each type."""

USED: Final[list[tuple[str, Place, str | int]]] = [
    ("query-status", ("running",), BOOLEAN),
    ("query-commands", (), LIST),
    ("query-commands", (3,), OBJECT),
    ("query-commands", (3, "name"), NAME),
    ("query-name", (), OBJECT),
    ("query-uuid", ("UUID",), NAME),
    ("greeting", ("qemu",), OBJECT),
    ("greeting", ("qemu", "major"), INTEGER),
    ("greeting", ("qemu", "minor"), INTEGER),
    ("greeting", ("qemu", "micro"), INTEGER),
    ("query-chardev", (1, "label"), NAME),
    ("qom-list", (0, "name"), NAME),
    ("qom-get", (), PATH),
    ("human-monitor-command", (), TEXT),
    ("query-jobs", (), LIST),
    ("query-jobs", (1,), OBJECT),
    ("query-jobs", (1, "id"), NAME),
    ("query-jobs", (1, "status"), NAME),
    ("query-jobs", (0, "current-progress"), INTEGER),
    ("query-jobs", (0, "total-progress"), INTEGER),
    ("query-block-jobs", (0, "device"), NAME),
    ("query-block-jobs", (0, "type"), NAME),
    ("query-block-jobs", (1, "status"), NAME),
    ("query-block-jobs", (1, "io-status"), NAME),
    ("query-block-jobs", (1, "speed"), INTEGER),
    ("query-block", (0,), OBJECT),
    ("query-block", (0, "inserted", "node-name"), NAME),
    ("query-block", (0, "inserted", "ro"), BOOLEAN),
    ("query-blockstats", (0,), OBJECT),
    ("query-named-block-nodes", (2,), OBJECT),
    ("query-named-block-nodes", (2, "node-name"), NAME),
    ("query-named-block-nodes", (2, "drv"), NAME),
    ("query-named-block-nodes", (2, "file"), PATH),
    ("query-named-block-nodes", (2, "image"), OBJECT),
    ("query-named-block-nodes", (2, "image", "virtual-size"), INTEGER),
    ("x-debug-query-block-graph", (), OBJECT),
    ("x-debug-query-block-graph", ("nodes",), LIST),
    ("x-debug-query-block-graph", ("nodes", 1, "id"), INTEGER),
    ("x-debug-query-block-graph", ("nodes", 1, "type"), NAME),
    ("x-debug-query-block-graph", ("nodes", 1, "name"), PATH),
    ("x-debug-query-block-graph", ("edges",), LIST),
    ("x-debug-query-block-graph", ("edges", 2, "parent"), INTEGER),
    ("x-debug-query-block-graph", ("edges", 2, "child"), INTEGER),
    ("x-debug-query-block-graph", ("edges", 2, "name"), NAME),
    ("BLOCK_JOB_CANCELLED", (), OBJECT),
    ("BLOCK_JOB_CANCELLED", ("device",), NAME),
    ("BLOCK_JOB_CANCELLED", ("offset",), INTEGER),
    ("BLOCK_JOB_COMPLETED", ("device",), NAME),
    ("BLOCK_JOB_COMPLETED", ("len",), INTEGER),
    ("JOB_STATUS_CHANGE", (), OBJECT),
    ("JOB_STATUS_CHANGE", ("status",), NAME),
]
"""Each value that is used and has to be there, with its type, or with its limit in bytes if it is a string."""

MAY_BE_MISSING: Final[list[tuple[str, Place, str | int]]] = [
    ("query-name", ("name",), TEXT),
    ("query-jobs", (1, "error"), TEXT),
    ("query-block", (0, "device"), NAME),
    ("query-block", (0, "qdev"), PATH),
    ("query-block", (0, "inserted"), OBJECT),
    ("query-blockstats", (0, "device"), NAME),
    ("query-blockstats", (0, "qdev"), PATH),
    ("query-blockstats", (0, "node-name"), NAME),
    ("query-blockstats", (0, "parent"), OBJECT),
    ("query-blockstats", (0, "backing", "parent", "node-name"), NAME),
    ("query-blockstats", (0, "backing", "backing"), OBJECT),
    ("query-named-block-nodes", (3, "image", "actual-size"), INTEGER),
    ("query-named-block-nodes", (3, "image", "cluster-size"), INTEGER),
    ("query-named-block-nodes", (3, "image", "backing-filename"), PATH),
    ("query-named-block-nodes", (3, "image", "backing-filename-format"), NAME),
    ("BLOCK_JOB_COMPLETED", ("error",), TEXT),
]
"""Likewise, of those that may be missing."""

SIGNED: Final = ("id", "parent", "child")
"""Integers that may be negative."""


def wrong_values(place: Place, kind: str | int) -> Iterator[tuple[object, str]]:
    """Values that may not stand there, each with the reason."""
    type_ = kind if isinstance(kind, str) else STRING
    for other, values in KINDS.items():
        for value in values:
            if other != type_ or isinstance(value, float):
                yield value, f"expected {type_}"
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    yield deep, f"expected {type_}" if type_ != LIST else "[0]: expected"
    if isinstance(kind, int):
        yield "x" * (kind + 1), f"longer than {kind} bytes"
        yield "é" * (kind // 2 + 1), f"longer than {kind} bytes"
        yield "a\0b", "holds a zero byte"
        yield "a\ud800b", "holds half of a surrogate pair"
        yield "😀"[:1] + "\udc00", "holds half of a surrogate pair"
    if kind == INTEGER:
        yield MANY + 1, f"and {MANY}"
        yield -MANY - 2, f"and {MANY}"
        if place[-1] not in SIGNED:
            yield -1, f"and {MANY}"


@pytest.mark.parametrize(("command", "place", "kind"), USED + MAY_BE_MISSING, ids=str)
def test_wrong(command: str, place: Place, kind: str | int) -> None:
    """A value of another type, or too large, is told with the command and its place in the reply."""
    for value, why in wrong_values(place, kind):
        said = changed(recorded(command), place, value)
        with pytest.raises(MalformedReply) as malformed:
            read(command, said)
        expected = f"{command}: {name_of(place)}: " if place else f"{command}: "
        assert str(malformed.value).startswith(expected if "[0]" not in why else expected.rstrip(": ")), value
        assert why.removeprefix("[0]: ") in str(malformed.value)
        # The error is kept for people to read; the reply is not to be kept with it.
        assert malformed.value.__context__ is None


@pytest.mark.parametrize(("command", "place", "kind"), [each for each in USED if each[1]], ids=str)
def test_missing(command: str, place: Place, kind: str | int) -> None:
    """A member that has to be there and is not is told; null is not a value of any."""
    if isinstance(place[-1], int):
        return
    with pytest.raises(MalformedReply) as malformed:
        read(command, changed(recorded(command), place, ...))
    assert str(malformed.value) == f"{command}: {name_of(place)}: missing"
    assert (malformed.value.command, malformed.value.member) == (command, name_of(place))
    with pytest.raises(MalformedReply, match="expected"):
        read(command, changed(recorded(command), place, None))


@pytest.mark.parametrize(("command", "place", "kind"), MAY_BE_MISSING, ids=str)
def test_may_be_missing(command: str, place: Place, kind: str | int) -> None:
    """A member that may be missing may be null as well, and both mean the same."""
    said = recorded(command)
    if place[-1] in said:
        assert str(read(command, changed(said, place, ...))) == str(read(command, changed(said, place, None)))
    read(command, changed(recorded(command), place, None))


@pytest.mark.parametrize(("command", "place", "kind"), USED + MAY_BE_MISSING, ids=str)
def test_as_long_as_may_be(command: str, place: Place, kind: str | int) -> None:
    """A string may be as long as its limit, of any characters; an integer as large as 64 bits allow."""
    if isinstance(kind, int):
        read(command, changed(recorded(command), place, "x" * kind))
        read(command, changed(recorded(command), place, "é" * (kind // 2)))
    elif kind == INTEGER and place[-1] not in SIGNED:
        read(command, changed(recorded(command), place, MANY))


def test_long_lists() -> None:
    """A list may have many items, and not any number."""
    entry = {"name": "qom-get"}
    assert read("query-commands", [entry] * checks.LIST_MAX) == {"qom-get"}
    with pytest.raises(MalformedReply, match=r"query-commands: more than 100000 items"):
        read("query-commands", [entry] * (checks.LIST_MAX + 1))


def chain_of(depth: int) -> dict[str, object]:
    """A tree of query-blockstats in which each node is below the one before, as deep as is asked for."""
    below: dict[str, object] = {"node-name": f"n{depth}"}
    for number in range(depth - 1, 0, -1):
        below = {"node-name": f"n{number}", "backing": below}
    return below


def test_deep_trees() -> None:
    """A chain may be longer than Python's stack is high, and not of any length."""
    assert sys.getrecursionlimit() <= checks.DEPTH_MAX
    (root,) = read("query-blockstats", [chain_of(checks.DEPTH_MAX)])
    for _ in range(checks.DEPTH_MAX - 1):
        root = root.backing
    assert root.node == f"n{checks.DEPTH_MAX}"
    with pytest.raises(MalformedReply, match=r"query-blockstats: \[0\]\.backing\.backing.*…") as malformed:
        read("query-blockstats", [chain_of(50_000)])
    assert len(str(malformed.value)) < 300


def test_wide_trees() -> None:
    """A tree in which each node has two others below is given up in time, however deep it is."""
    twice: dict[str, object] = {"node-name": "n"}
    for _ in range(60):
        twice = {"node-name": "n", "parent": twice, "backing": twice}
    with pytest.raises(MalformedReply, match="more than 100000 nodes"):
        read("query-blockstats", [twice])


def test_edges_to_nowhere() -> None:
    """An edge of the graph leads from a node that there is to a node that there is."""
    for end in ("parent", "child"):
        said = changed(recorded("x-debug-query-block-graph"), ("edges", 1, end), 12345)
        with pytest.raises(MalformedReply, match=rf"edges\[1\]\.{end}: no node has this id"):
            read("x-debug-query-block-graph", said)


@pytest.mark.parametrize("name", [None, 7, [], {}, "x" * 2000, "a\0", "\ud800"], ids=repr)
def test_names_of_events(name: object) -> None:
    """An event without a proper name is none."""
    with pytest.raises(MalformedReply, match="event: "):
        replies.event(name, {})


def test_refusals() -> None:
    """QEMU's refusal of a command is judged as well, before anybody reads its words."""
    assert replies.refusal("job-pause", "GenericError", "no") == ("GenericError", "no")
    for error_class, desc, place in (
        (7, "no", "class"),
        ("GenericError", "x" * 70_000, "desc"),
        ("G", "\ud800", "desc"),
    ):
        with pytest.raises(MalformedReply, match=f"job-pause: error: {place}: "):
            replies.refusal("job-pause", error_class, desc)


# Anything at any place -----------------------------------------------------------------------------------------------


def places(value: object, at: Place = ()) -> Iterator[Place]:
    """Every place in a reply."""
    yield at
    if isinstance(value, dict):
        for key, inner in cast("dict[str, object]", value).items():
            yield from places(inner, (*at, key))
    elif isinstance(value, list):
        for number, inner in enumerate(cast("list[object]", value)):
            yield from places(inner, (*at, number))


def at(said: Any, place: Place) -> Any:
    """What stands at a place; `...` if an earlier change has taken that away."""
    for step in place:
        leads_on = isinstance(said, list) if isinstance(step, int) else isinstance(said, dict)
        if not leads_on:
            return ...
        try:
            said = said[step]
        except LookupError:
            return ...
    return said


USED_NAMES: Final = {step for _, place, _ in USED + MAY_BE_MISSING for step in place if isinstance(step, str)}
ODD: Final[list[object]] = ["", "\0", "\ud800", "x" * 5000, "/machine/peripheral", "/", -1, 1 << 63, 1 << 200, 1e400]
JUNK: Final = (
    st.sampled_from(ODD)
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.recursive(st.integers(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner))
)


@st.composite
def mutated(draw: st.DrawFn, sample: Any) -> Any:
    """A sample, changed at a few places: to junk, to what stands elsewhere in it, or to nothing at all."""
    said = copy.deepcopy(sample)
    alike: dict[object, list[Place]] = {}
    for place in places(sample):
        # Items of lists are alike, and so are members of the same name.
        alike.setdefault(place[-1] if place and isinstance(place[-1], str) else None, []).append(place)
    used = [name for name in alike if name is None or name in USED_NAMES]
    for _ in range(draw(st.integers(1, 5))):
        places_of_one_name = st.sampled_from(alike[draw(st.sampled_from(used))])
        place = draw(places_of_one_name)
        elsewhere = places_of_one_name.map(lambda other: copy.deepcopy(at(sample, other)))
        value = draw(st.one_of(elsewhere, elsewhere, JUNK, st.just(...)))
        if at(said, place) is not ... and not (value is ... and not place):
            said = changed(said, place, value)
    return said


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_mutated_replies(data: st.DataObject) -> None:
    """Whatever stands at whatever place, a reply or an event is read, or told to be malformed, and nothing else."""
    command = data.draw(st.sampled_from([*QUERIES, *EVENTS]))
    said = data.draw(mutated(recorded(command)))
    with suppress(MalformedReply):
        read(command, said)


DISKS: Final = (
    "query-block",
    "query-blockstats",
    "query-named-block-nodes",
    "x-debug-query-block-graph",
    "query-block-jobs",
)


def all_disks(said: dict[str, Any]) -> Any:
    """The disks that raw replies make, and the plan by which the first block job is adopted."""
    devices, stats = replies.DEVICES.read(said["query-block"]), replies.STATS.read(said["query-blockstats"])
    nodes, edges = replies.NODES.read(said["query-named-block-nodes"]), replies.GRAPH.read(said[replies.GRAPH.command])
    names: dict[str, str] = {}
    graph.name_devices(devices, {}, names)
    disks = graph.read_disks(devices=devices, stats=stats, nodes=nodes, graph=edges, names=names, folder="/images")
    orphan = None
    for job in reversed(replies.BLOCK_JOBS.read(said["query-block-jobs"])):
        orphan = adopt(graph.read_orphan(job, disks=disks, nodes=nodes, graph=edges, folder=None))
    return disks, orphan


@settings(max_examples=500, deadline=None)
@given(mutated({command: REPLIES[command] for command in DISKS}))
def test_mutated_graphs(said: dict[str, Any]) -> None:
    """Replies that are read make disks, or are torn; no graph is so odd that reading it fails in another way."""
    if not isinstance(said, dict) or set(said) != set(DISKS):
        return
    try:
        _disks, orphan = all_disks(said)
    except (MalformedReply, graph.Torn):
        return
    assert orphan is None or orphan.spec.top_index < orphan.spec.base_index < len(orphan.disk.layers)


@pytest.mark.parametrize(
    ("state", "migration", "found"),
    [
        ("running", None, Guest.RUNNING),
        ("x" * 10_000, None, Guest.RUNNING),
        (None, "completed", Guest.RUNNING),
        ("running", "active", Guest.MIGRATING),
        ("running", "setup", Guest.MIGRATING),
        ("postmigrate", "completed", Guest.MIGRATING),
        ("finish-migrate", "device", Guest.MIGRATING),
        ("inmigrate", "active", Guest.INCOMING),
        ("running", "failed", Guest.RUNNING),
    ],
)
def test_where_the_guest_is(state: object, migration: str | None, found: Guest) -> None:
    """Its state and that of a migration tell it together; words that nobody knows mean nothing."""
    status = replies.STATUS.read({"running": True, "status": state})
    assert replies.guest(status, migration) is found
