"""What a monitor says, as values: the one place that looks into what came over a connection.

Each reply and event that is used has its shape here, as QAPI defines it (qapi/block-core.json, qapi/job.json). Its
members are held against the limits of `app.drivers.qmp.checks`; whatever does not fit is a `MalformedReply`. Members
that nobody uses are not looked at, so QEMU may add some.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from app.core.errors import CANCELED
from app.core.job import Progress
from app.core.plan import Guest
from app.drivers.qmp import blocks
from app.drivers.qmp.checks import (
    Members,
    Query,
    Wrong,
    any_integer,
    boolean,
    count,
    list_of,
    member,
    members,
    name,
    only,
    optional,
    path,
    text,
    tree,
)

# Jobs ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobInfo:
    """A job of query-jobs (QAPI `JobInfo`); `error` is QEMU's text for people."""

    id: str
    status: str
    progress: Progress
    error: str | None


@dataclass(frozen=True, slots=True)
class BlockJob:
    """A job of query-block-jobs (QAPI `BlockJobInfo`); `speed` is in bytes/s."""

    id: str
    type: str
    status: str
    io_status: str
    speed: int


def _job(value: object) -> JobInfo:
    of = members(value)
    progress = Progress(current=member(of, "current-progress", count), end=member(of, "total-progress", count))
    return JobInfo(member(of, "id", name), member(of, "status", name), progress, optional(of, "error", text))


def _block_job(value: object) -> BlockJob:
    of = members(value)
    return BlockJob(
        member(of, "device", name),
        member(of, "type", name),
        member(of, "status", name),
        member(of, "io-status", name),
        member(of, "speed", count),
    )


@dataclass(frozen=True, slots=True)
class GraphNode:
    """A node, a backend or a job in the block graph (QAPI `XDbgBlockGraphNode`)."""

    id: int
    type: str
    name: str


@dataclass(frozen=True, slots=True)
class GraphEdge:
    """Who uses whom, by their ids, as what, and whether others may write then (QAPI `XDbgBlockGraphEdge`)."""

    parent: int
    child: int
    name: str
    shares_write: bool = False


@dataclass(frozen=True, slots=True)
class BlockGraph:
    """The block graph (QAPI `XDbgBlockGraph`). `nodes` are by id, and each id in `edges` is that of one of them."""

    nodes: Mapping[int, GraphNode]
    edges: tuple[GraphEdge, ...]


def _graph_node(value: object) -> GraphNode:
    of = members(value)
    # A backend without a name of its own goes by its device's QOM path.
    return GraphNode(member(of, "id", any_integer), member(of, "type", name), member(of, "name", path))


_graph_nodes = list_of(_graph_node)
_names_only = list_of(name)


def _graph(value: object) -> BlockGraph:
    of = members(value)
    nodes = {node.id: node for node in member(of, "nodes", _graph_nodes)}

    def known(value: object) -> int:
        id_ = any_integer(value)
        if id_ not in nodes:
            raise Wrong("no node has this id")
        return id_

    def edge(value: object) -> GraphEdge:
        of = members(value)
        shared = optional(of, "shared-perm", _names_only) or ()
        return GraphEdge(
            member(of, "parent", known), member(of, "child", known), member(of, "name", name), "write" in shared
        )

    return BlockGraph(nodes, member(of, "edges", list_of(edge)))


# The program ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Version:
    """A version of QEMU (QAPI `VersionTriple`)."""

    major: int
    minor: int
    micro: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.micro}"


def _version(value: object) -> Version:
    of = members(value)
    return Version(member(of, "major", count), member(of, "minor", count), member(of, "micro", count))


_names = list_of(only("name", name))


def _commands(value: object) -> frozenset[str]:
    return frozenset(_names(value))


def _given_name(value: object) -> str | None:
    return optional(members(value), "name", text)


@dataclass(frozen=True, slots=True)
class Status:
    """What query-status says (QAPI `StatusInfo`)."""

    running: bool
    state: str


KNOWN_STATES: Final = ("inmigrate", "finish-migrate", "postmigrate")
"""States of a guest (QAPI `RunState`) in which its images are another QEMU's."""


def _status(value: object) -> Status:
    of = members(value)
    state = of.get("status")
    # Two of its words mean something here, and any other means nothing.
    return Status(member(of, "running", boolean), next((known for known in KNOWN_STATES if known == state), ""))


def _migration(value: object) -> str | None:
    return optional(members(value), "status", name)


STATUS: Final = Query("query-status", _status)
MIGRATION: Final = Query("query-migrate", _migration)
"""The state of the migration that was asked for last (QAPI `MigrationStatus`); None where none was."""

NO_MIGRATION: Final = frozenset({None, "none", "completed", "failed", "cancelled", "colo"})
"""States of a migration that is not under way."""


def guest(status: Status, migration: str | None) -> Guest:
    """What both say of the guest together."""
    if status.state == "inmigrate":
        return Guest.INCOMING
    if status.state or migration not in NO_MIGRATION:
        return Guest.MIGRATING
    return Guest.RUNNING if status.running else Guest.PAUSED


@dataclass(frozen=True, slots=True)
class Export:
    """An export of a node (QAPI `BlockExportInfo`)."""

    id: str
    node: str


def _export(value: object) -> Export:
    of = members(value)
    return Export(member(of, "id", name), member(of, "node-name", name))


EXPORTS: Final = Query("query-block-exports", list_of(_export))

DEVICES: Final = Query("query-block", list_of(blocks.device))
STATS: Final = Query("query-blockstats", list_of(tree(("parent", "backing"), blocks.stat)))

NODES: Final = Query("query-named-block-nodes", blocks.nodes_by_name)
"""All nodes by name."""

JOBS: Final = Query("query-jobs", list_of(_job))
BLOCK_JOBS: Final = Query("query-block-jobs", list_of(_block_job))
GRAPH: Final = Query("x-debug-query-block-graph", _graph)

GREETING: Final = Query("greeting", only("qemu", _version))
"""The version in a greeting, which is what query-version returns (QAPI `VersionInfo`)."""

COMMANDS: Final = Query("query-commands", _commands)

NAME: Final = Query("query-name", _given_name)
"""What `-name` says; None without it."""

UUID: Final = Query("query-uuid", only("UUID", name))

OBJECTS: Final = Query("qom-list", _names)
"""The names of what is at a QOM path."""

PROPERTY: Final = Query("qom-get", path)
"""A property of QOM that is a string, as types and links are."""

CHARDEVS: Final = Query("query-chardev", list_of(only("label", name)))
MONITOR_TEXT: Final = Query("human-monitor-command", text)


# Refusals and events -------------------------------------------------------------------------------------------------


def refusal(command: str, error_class: object, desc: object) -> tuple[str, str]:
    """The class and the text of QEMU's refusal of a command (QAPI `QapiErrorClass`); raises `MalformedReply`."""
    return Query(f"{command}: error", _refusal).read({"class": error_class, "desc": desc})


def _refusal(value: object) -> tuple[str, str]:
    of = members(value)
    return member(of, "class", name), member(of, "desc", text)


@dataclass(frozen=True, slots=True)
class JobEnded:
    """BLOCK_JOB_COMPLETED, or BLOCK_JOB_CANCELLED, which has no error of its own: it is QEMU's of a canceled job."""

    id: str
    progress: Progress
    error: str | None


@dataclass(frozen=True, slots=True)
class JobStatusChanged:
    """JOB_STATUS_CHANGE."""

    id: str
    status: str


@dataclass(frozen=True, slots=True)
class OtherEvent:
    """An event of which no more than the name is used."""

    name: str


Event = JobEnded | JobStatusChanged | OtherEvent


def event(event_name: object, data: object) -> Event:
    """What an event says; raises `MalformedReply`."""
    known = _EVENT_NAME.read(event_name)
    query = _EVENTS.get(known)
    return OtherEvent(known) if query is None else query.read(data)


def _completed(value: object) -> JobEnded:
    of = members(value)
    return _ended(of, optional(of, "error", text))


def _canceled(value: object) -> JobEnded:
    return _ended(members(value), CANCELED)


def _ended(of: Members, error: str | None) -> JobEnded:
    progress = Progress(current=member(of, "offset", count), end=member(of, "len", count))
    return JobEnded(member(of, "device", name), progress, error)


def _status_changed(value: object) -> JobStatusChanged:
    of = members(value)
    return JobStatusChanged(member(of, "id", name), member(of, "status", name))


_EVENT_NAME: Final = Query("event", name)
_EVENTS: Final[Mapping[str, Query[JobEnded] | Query[JobStatusChanged]]] = {
    "BLOCK_JOB_CANCELLED": Query("BLOCK_JOB_CANCELLED", _canceled),
    "BLOCK_JOB_COMPLETED": Query("BLOCK_JOB_COMPLETED", _completed),
    "JOB_STATUS_CHANGE": Query("JOB_STATUS_CHANGE", _status_changed),
}
