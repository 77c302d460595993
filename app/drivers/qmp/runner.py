"""QEMU as the engine sees it: disks, jobs, and what to do with them, over one QMP connection."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final, TypeVar

import structlog

from app.core.chain import Disk
from app.core.errors import Code, Problem
from app.core.evidence import Process
from app.core.job import Job
from app.core.kinds import KINDS, kind_of
from app.core.machine.inputs import Observed
from app.core.orphan import OrphanJob
from app.core.plan import Guest, Parent, Survey
from app.drivers.qmp import graph, replies
from app.drivers.qmp.checks import Query
from app.drivers.qmp.connection import Connection
from app.drivers.qmp.events import QmpEvents
from app.engine.ports.driver import Address, Declined, DriverCapabilities, QemuFacts
from app.hostfs.identity import with_files
from app.hostfs.process import alive, folder_of, start_time

log = structlog.get_logger(__name__)

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

READS: Final = 3
"""How often the disks are read before a graph that changes all the while is given up."""

NODES_SAFE: Final = 10
"""QEMU's major version from which query-named-block-nodes is known to be harmless at any time.

7.2 crashes at it while a block-stream job has concluded and is not dismissed: the job still holds its filter, which has
no child any more.
"""


class QmpRunner:
    """The `Runner` port over a QMP connection."""

    def __init__(self, connection: Connection, facts: QemuFacts, commands: frozenset[str], events: QmpEvents) -> None:
        self.facts = facts
        self._connection = connection
        self._commands = commands
        self._events = events
        self._prefixes: dict[str, str] = {}
        self._nodes: Mapping[str, replies.Node] = {}

    @property
    def connected(self) -> bool:
        """Whether the connection stands."""
        return self._connection.connected

    @property
    def final_reports(self) -> Mapping[str, Observed]:
        """How jobs ended, by QEMU's events: all there is once QEMU has ended itself."""
        return self._events.final_reports

    def heard_to_the_end(self, job_id: str) -> bool:
        """Whether QEMU itself ended the connection, and had not told by then that the job was about to take effect."""
        return self._connection.heard_all and not self._events.was_leaving(job_id)

    async def guest(self) -> Guest:
        """What QEMU says of its guest (QAPI `query-status`, `query-migrate`)."""
        if "query-status" not in self._commands:
            await self._connection.ask(replies.COMMANDS)
            return Guest.RUNNING
        if replies.MIGRATION.command not in self._commands:
            return replies.guest(await self._connection.ask(replies.STATUS), None)
        status, migration = await asyncio.gather(
            self._connection.ask(replies.STATUS), self._connection.ask(replies.MIGRATION)
        )
        return replies.guest(status, migration)

    async def survey(self, probe: Sequence[str]) -> Survey:
        """What QEMU says before a job (QAPI `x-debug-query-block-graph`, `query-block-exports`; HMP `qemu-io`)."""
        # All at once: next to the merge of a small layer, each wait for a reply shows.
        guest, parents, words = await asyncio.gather(
            self.guest(), self._parents(), asyncio.gather(*(self._reopened(node) for node in probe))
        )
        unwritable = {node: said for node, said in zip(probe, words, strict=True) if said}
        return Survey(guest=guest, parents=parents, unwritable=unwritable)

    async def _parents(self) -> Mapping[str, tuple[Parent, ...]]:
        if replies.GRAPH.command not in self._commands:
            return {}
        if replies.EXPORTS.command not in self._commands:
            return graph.parents(await self._connection.ask(replies.GRAPH), ())
        block_graph, exports = await asyncio.gather(
            self._connection.ask(replies.GRAPH), self._connection.ask(replies.EXPORTS)
        )
        return graph.parents(block_graph, exports)

    async def _reopened(self, node: str) -> str:
        """What QEMU says against opening a node for writing; it is open as before afterwards."""
        lines = (f'qemu-io "{node}" "reopen -{mode}"' for mode in "wr")
        said, _ = await asyncio.gather(
            *(self._connection.ask(replies.MONITOR_TEXT, {"command-line": line}) for line in lines)
        )
        return said.strip()

    async def disks(self) -> tuple[Disk, ...]:
        """The domain's disks and their chains, as they are now."""
        for _ in range(READS):
            try:
                disks = await self._read_disks()
            except graph.Torn:
                continue
            disks = await asyncio.to_thread(with_files, disks, self.facts.process)
            if any(layer.identity is None for disk in disks for layer in disk.layers):
                # A process that ends holds no file any more. What it had open would seem to be no file of its own, and
                # a job planned by that could never be proven to have ended well.
                await self.guest()
            return disks
        raise Declined(Problem(code=Code.QEMU_ERROR, detail="the block graph changes while it is read; try again"))

    async def _read_disks(self) -> tuple[Disk, ...]:
        ask = self._connection.ask
        # All at once: next to the merge of a small layer, each wait for a reply shows.
        unfinished, devices, stats = await asyncio.gather(self._read_nodes(), ask(replies.DEVICES), ask(replies.STATS))
        stream = _stream(unfinished)
        prefixes = {qdev: await self._prefix(qdev) for device in devices if (qdev := device.qdev)}
        running = [job for job in unfinished if job.status not in ("concluded", "null")]
        block_graph = None
        if running and replies.GRAPH.command in self._commands:
            block_graph = await ask(replies.GRAPH)
        try:
            disks = graph.read_disks(
                devices=devices,
                stats=stats,
                nodes=self._nodes,
                graph=block_graph,
                prefixes=prefixes,
                folder=folder_of(self.facts.process),
            )
        except graph.Torn:
            if stream is None:
                raise
            detail = f"QEMU {self.facts.version} can't be asked about its nodes until its job {stream} is dismissed"
            raise Declined(Problem(code=Code.JOB_CONFLICT, detail=detail, extra={"job": stream})) from None
        if running and block_graph is None:
            # Nothing says which disk a job works on, so it counts for all of them.
            ids = tuple(job.id for job in running)
            disks = tuple(replace(disk, running_jobs=ids) for disk in disks)
        return disks

    async def _read_nodes(self) -> Sequence[replies.BlockJob]:
        """Read the nodes, unless that is not safe now; QEMU's block jobs, which tell that."""
        unfinished = await self._connection.ask(replies.BLOCK_JOBS)
        if _stream(unfinished) is None or self._connection.version.major >= NODES_SAFE:
            self._nodes = await self._connection.ask(replies.NODES, {"flat": True})
        return unfinished

    async def _prefix(self, qdev: str) -> str:
        prefix = self._prefixes.get(qdev)
        if prefix is None:
            path = qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"
            device_type = controller_type = None
            with suppress(Declined):
                device_type = await self._property(path, "type")
                if device_type.startswith("ide-"):
                    bus = await self._property(path, "parent_bus")
                    controller_type = await self._property(bus.rpartition("/")[0], "type")
            prefix = self._prefixes[qdev] = graph.bus_prefix(device_type, controller_type)
        return prefix

    async def _property(self, path: str, name: str) -> str:
        return await self._connection.ask(replies.PROPERTY, {"path": path, "property": name})

    async def observe(self) -> Mapping[str, Observed]:
        """Every job that QEMU has, by id (QAPI `query-jobs`, and `query-block-jobs` for I/O errors)."""
        ask = self._connection.ask
        jobs, block_jobs = await asyncio.gather(ask(replies.JOBS), ask(replies.BLOCK_JOBS))
        io_status = {job.id: job.io_status for job in block_jobs}
        return {
            job.id: Observed(
                status=job.status,
                progress=job.progress,
                error=job.error,
                io_status=io_status.get(job.id, "ok"),
            )
            for job in jobs
        }

    async def orphan(self, job_id: str) -> OrphanJob | None:
        """What a job works on of which there is no record (`x-debug-query-block-graph`)."""
        if replies.GRAPH.command not in self._commands:
            return None
        disks = await self.disks()
        block_graph = await self._connection.ask(replies.GRAPH)
        jobs = await self._connection.ask(replies.BLOCK_JOBS)
        job = next((job for job in jobs if job.id == job_id), None)
        if job is None:
            return None
        folder = folder_of(self.facts.process)
        return graph.read_orphan(job, disks=disks, nodes=self._nodes, graph=block_graph, folder=folder)

    async def start(self, job: Job) -> None:
        """Start the job by the command of its kind."""
        command = kind_of(job.spec).command(job.spec, bandwidth=job.bandwidth, on_error=job.on_error)
        await self._connection.execute(command.execute, {"job-id": job.id} | dict(command.arguments))

    async def pivot(self, job_id: str) -> None:
        """Ask a ready job to pivot (QAPI `job-complete`)."""
        await self._connection.execute("job-complete", {"id": job_id})

    async def abort(self, job_id: str, *, force: bool) -> None:
        """Cancel (QAPI `block-job-cancel`, or `job-cancel`, which is always by force)."""
        if force:
            await self._tolerant("job-cancel", {"id": job_id}, "cannot accept command verb", "not found")
            return
        arguments = {"device": job_id}
        try:
            await self._tolerant("block-job-cancel", arguments, "cannot accept command verb", "not found")
        except Declined as declined:
            if "is currently paused" not in declined.problem.detail:
                raise
            await self.resume(job_id)
            await self._connection.execute("block-job-cancel", arguments)

    async def pause(self, job_id: str) -> None:
        """Pause at the next possible point (QAPI `job-pause`)."""
        await self._tolerant("job-pause", {"id": job_id}, "already paused")

    async def resume(self, job_id: str) -> None:
        """Go on (QAPI `job-resume`)."""
        await self._tolerant("job-resume", {"id": job_id}, "was not paused")

    async def set_speed(self, job_id: str, bandwidth: int) -> None:
        """Change the speed, in bytes/s; 0 is no limit (QAPI `block-job-set-speed`)."""
        await self._connection.execute("block-job-set-speed", {"device": job_id, "speed": bandwidth})

    async def finalize(self, job_id: str) -> None:
        """Let a pending job take effect (QAPI `job-finalize`)."""
        await self._tolerant("job-finalize", {"id": job_id}, "cannot accept command verb", "not found")

    async def flush(self, node: str) -> None:
        """Write to the disk what is held back of a node's data (HMP `qemu-io`, as QAPI has no command for it)."""
        line = f'qemu-io "{node}" "flush"'
        said = (await self._connection.ask(replies.MONITOR_TEXT, {"command-line": line})).strip()
        if said:
            raise Declined(Problem(code=Code.QEMU_ERROR, detail=f"{line}: {said}"))

    async def conclude(self, job_id: str, nodes: Sequence[str] = ()) -> None:
        """Let QEMU forget a concluded job (QAPI `job-dismiss`), and delete nodes (QAPI `blockdev-del`).

        The nodes that QEMU made itself go with the node above them.
        """
        # Sent at once, and carried out in this order: a node can be deleted when nothing uses it any more, neither the
        # job nor a node above it.
        deletions = [self._connection.execute("blockdev-del", {"node-name": node}) for node in nodes]
        dismissal = self._tolerant("job-dismiss", {"id": job_id}, "not found")
        dismissed, *deleted = await asyncio.gather(dismissal, *deletions, return_exceptions=True)
        if isinstance(dismissed, BaseException):
            raise dismissed
        self._events.forget(job_id)
        for node, answer in zip(nodes, deleted, strict=True):
            if isinstance(answer, Declined):
                log.debug("node not deleted", node=node, reason=answer.problem.detail)
            elif isinstance(answer, BaseException):
                raise answer

    async def close(self) -> None:
        """End the connection; never raises."""
        await self._connection.close()

    async def _tolerant(self, command: str, arguments: Mapping[str, object], *harmless: str) -> None:
        try:
            await self._connection.execute(command, arguments)
        except Declined as declined:
            if not any(text in declined.problem.detail for text in harmless):
                raise


def _stream(jobs: Sequence[replies.BlockJob]) -> str | None:
    return next((job.id for job in jobs if job.type == "stream"), None)


class QmpDriver:
    """The `Driver` port; `timeout` is the most seconds that one command may take."""

    def __init__(self, timeout: float) -> None:
        self.capabilities = DriverCapabilities(kinds=frozenset(KINDS))
        self._timeout = timeout

    async def connect(self, address: Address, hint: Callable[[], None]) -> QmpRunner:
        """A connection to the monitor at `address`; raises `Unreachable`, `Busy` or `Unanswered`."""
        events = QmpEvents(address, hint)
        connection = await Connection.open(address, self._timeout, events.take, hint)
        try:
            commands = await connection.ask(replies.COMMANDS)
            return QmpRunner(connection, await _facts(connection, commands), commands, events)
        except BaseException:
            await connection.close()
            raise

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
        process=Process(pid=pid, started=start_time(pid) if pid else None, uuid=uuid),
        managed_by="libvirt" if await _is_libvirts(connection) else None,
        missing=tuple(command for command in NEEDED if command not in commands),
    )


async def _is_libvirts(connection: Connection) -> bool:
    """Whether libvirt started this QEMU: its master key, its monitor, or its names of nodes are there."""
    objects = await _ask(connection, replies.OBJECTS, {"path": "/objects"}) or ()
    chardevs = await _ask(connection, replies.CHARDEVS) or ()
    # Not query-named-block-nodes: see NODES_SAFE.
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
