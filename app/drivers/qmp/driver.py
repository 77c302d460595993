"""Connects to monitors: who answers there, and whether this service can work on it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from app.core.evidence import Process
from app.core.kinds import KINDS
from app.drivers.qmp import replies
from app.drivers.qmp.checks import Query
from app.drivers.qmp.connection import Connection
from app.drivers.qmp.events import QmpEvents
from app.drivers.qmp.names import Names
from app.drivers.qmp.runner import QmpRunner
from app.engine.ports.driver import Address, Declined, DriverCapabilities, QemuFacts, Unreachable
from app.engine.ports.journal import JournalError
from app.engine.ports.names import DeviceNames
from app.hostfs.patience import Workers
from app.hostfs.process import alive, own_view, start_time

T = TypeVar("T")

NEEDED: Final = (
    "block-commit",
    "block-job-cancel",
    "block-job-set-speed",
    "blockdev-del",
    "job-cancel",
    "job-complete",
    "job-dismiss",
    "job-finalize",
    "job-pause",
    "job-resume",
    "qom-get",
    "query-block",
    "query-block-jobs",
    "query-blockstats",
    "query-jobs",
    "query-named-block-nodes",
    "query-status",
)
"""The commands without which this service can't work on a domain. A storage daemon lacks query-status."""

LIBVIRT_NODE: Final = re.compile(r"libvirt-\d+-(format|storage)")
NO_UUID: Final = "00000000-0000-0000-0000-000000000000"


PROCESSES: Final = 4096
"""How many processes are remembered for the names of their disks; the ones seen longest ago are let go first."""


class QmpDriver:
    """The `Driver` port; `timeout` is the most seconds that one command may take.

    `names` keeps the target names of devices over restarts; None: nobody does.
    """

    def __init__(self, timeout: float, workers: Workers | None = None, names: DeviceNames | None = None) -> None:
        self.capabilities = DriverCapabilities(kinds=frozenset(KINDS))
        self._timeout = timeout
        self._workers = workers or Workers()
        self._kept = names
        self._names: dict[Process, Names] = {}

    async def connect(self, address: Address, hint: Callable[[], None]) -> QmpRunner:
        """A connection to the monitor at `address`; raises `Unreachable`, `Busy` or `Unanswered`."""
        events = QmpEvents(address, hint)
        connection = await Connection.open(address, self._timeout, events.take, hint)
        try:
            commands = await connection.ask(replies.COMMANDS)
            facts = await _facts(connection, commands)
            names = await self._names_in(facts.process)
            return QmpRunner(connection, facts, commands, events, names=names, workers=self._workers)
        except BaseException:
            await connection.close()
            raise

    async def _names_in(self, process: Process) -> Names:
        """The target names that the devices of this process have had, also over earlier connections and starts."""
        if process.pid is None or process.started is None:
            return Names()
        names = self._names.pop(process, None)
        if names is None:
            try:
                names = await Names.load(process, self._kept)
            except JournalError as error:
                # Under new names a script would merge another disk than it means.
                raise Unreachable(f"what its disks were called can't be read: {error}") from error
        while len(self._names) >= PROCESSES:
            del self._names[next(iter(self._names))]
        self._names[process] = names
        return names

    def alive(self, process: Process) -> bool | None:
        """Whether that very process still runs; None where it can't be seen from here."""
        return alive(process)


async def _facts(connection: Connection, commands: frozenset[str]) -> QemuFacts:
    uuid = await _ask(connection, replies.UUID)
    uuid = None if uuid == NO_UUID else uuid
    pid = connection.pid
    return QemuFacts(
        name=await _ask(connection, replies.NAME),
        uuid=uuid,
        version=str(connection.version),
        process=Process(pid=pid, started=start_time(pid) if pid else None, uuid=uuid, view=own_view()),
        managed_by="libvirt" if await _is_libvirts(connection) else None,
        missing=tuple(command for command in NEEDED if command not in commands),
    )


async def _is_libvirts(connection: Connection) -> bool:
    """Whether libvirt started this QEMU: its master key, its monitor, or its names of nodes are there."""
    objects = await _ask(connection, replies.OBJECTS, {"path": "/objects"}) or ()
    chardevs = await _ask(connection, replies.CHARDEVS) or ()
    # Not query-named-block-nodes, which is not safe at any time.
    block_graph = await _ask(connection, replies.GRAPH)
    nodes = block_graph.nodes.values() if block_graph else ()
    return (
        "masterKey0" in objects or "charmonitor" in chardevs or any(LIBVIRT_NODE.fullmatch(node.name) for node in nodes)
    )


async def _ask(connection: Connection, query: Query[T], arguments: Mapping[str, object] | None = None) -> T | None:
    """What a query's reply says, or None where the program does not have the command."""
    try:
        return await connection.ask(query, arguments)
    except Declined:
        return None
