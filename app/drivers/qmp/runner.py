"""QEMU as the engine sees it: disks, jobs, and what to do with them, over one QMP connection."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Final

import structlog

from app.core.adopt import OrphanJob
from app.core.chain import Disk
from app.core.errors import CANCELED, Code, Problem
from app.core.job import Job, Process, Progress
from app.core.machine.inputs import Observed
from app.core.qmp import block_commit_arguments
from app.drivers.qmp import graph
from app.drivers.qmp.connection import Connection
from app.engine.ports.driver import Address, Declined, QemuFacts, Unreachable
from app.hostfs.identity import with_files
from app.hostfs.process import alive, folder_of, start_time

log = structlog.get_logger(__name__)

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

HINTS: Final = frozenset(
    {
        "BLOCK_IO_ERROR",
        "BLOCK_JOB_CANCELLED",
        "BLOCK_JOB_COMPLETED",
        "BLOCK_JOB_READY",
        "DEVICE_DELETED",
        "DEVICE_TRAY_MOVED",
        "RESUME",
        "SHUTDOWN",
        "STOP",
    }
)
"""Events after which something is worth a look. BLOCK_JOB_ERROR is none: thousands may come, and a pause follows."""

STOPS: Final = frozenset({"paused", "ready", "standby", "pending", "concluded", "null"})
"""Statuses of a job (QAPI `JobStatus`) at which there may be something to do. It leaves the others by itself."""

FINAL_REPORTS_MAX: Final = 256

READS: Final = 3
"""How often the disks are read before a graph that changes all the while is given up."""

NODES_SAFE: Final = 10
"""QEMU's major version from which query-named-block-nodes is known to be harmless at any time.

7.2 crashes at it while a block-stream job has concluded and is not dismissed: the job still holds its filter, which has
no child any more.
"""


@contextmanager
def _understood() -> Generator[None]:
    """Take an answer of another shape than QAPI's for what it is: the word of a program that is no QEMU."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise Unreachable(f"the program behind the monitor answers as no QEMU does: {error!r}") from error


class QmpRunner:
    """The `Runner` port over a QMP connection."""

    def __init__(self, connection: Connection, facts: QemuFacts, commands: frozenset[str], events: _Events) -> None:
        self.facts = facts
        self._connection = connection
        self._commands = commands
        self._events = events
        self._prefixes: dict[str, str] = {}
        self._nodes: Sequence[Mapping[str, Any]] = ()

    @property
    def connected(self) -> bool:
        """Whether the connection stands."""
        return self._connection.connected

    @property
    def final_reports(self) -> Mapping[str, Observed]:
        """How jobs ended, by QEMU's events: all there is once QEMU has ended itself."""
        return self._events.final_reports

    async def guest_running(self) -> bool:
        """Whether the guest's processors run (QAPI `query-status`)."""
        if "query-status" not in self._commands:
            return bool(await self._connection.execute("query-commands"))
        with _understood():
            return bool((await self._connection.execute("query-status"))["running"])

    async def disks(self) -> tuple[Disk, ...]:
        """The domain's disks and their chains, as they are now."""
        for _ in range(READS):
            try:
                with _understood():
                    disks = await self._read_disks()
            except graph.Torn:
                continue
            disks = await asyncio.to_thread(with_files, disks, self.facts.process)
            if any(layer.identity is None for disk in disks for layer in disk.layers):
                # A process that ends holds no file any more. What it had open would seem to be no file of its own, and
                # a job planned by that could never be proven to have ended well.
                await self.guest_running()
            return disks
        raise Declined(Problem(code=Code.QEMU_ERROR, detail="the block graph changes while it is read; try again"))

    async def _read_disks(self) -> tuple[Disk, ...]:
        execute = self._connection.execute
        # All at once: next to the merge of a small layer, each wait for a reply shows.
        unfinished, blocks, stats = await asyncio.gather(
            self._read_nodes(), execute("query-block"), execute("query-blockstats")
        )
        stream = _stream(unfinished)
        prefixes = {qdev: await self._prefix(qdev) for block in blocks if (qdev := block.get("qdev"))}
        running = [job for job in unfinished if job["status"] not in ("concluded", "null")]
        block_graph = None
        if running and "x-debug-query-block-graph" in self._commands:
            block_graph = await execute("x-debug-query-block-graph")
        try:
            disks = graph.read_disks(
                blocks=blocks,
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
            ids = tuple(job["device"] for job in running)
            disks = tuple(replace(disk, running_jobs=ids) for disk in disks)
        return disks

    async def _read_nodes(self) -> Sequence[Mapping[str, Any]]:
        """Read the nodes, unless that is not safe now; QEMU's block jobs, which tell that."""
        unfinished: Sequence[Mapping[str, Any]] = await self._connection.execute("query-block-jobs")
        if _stream(unfinished) is None or self._connection.greeting.get("qemu", {}).get("major", 0) >= NODES_SAFE:
            self._nodes = await self._connection.execute("query-named-block-nodes", {"flat": True})
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
        return str(await self._connection.execute("qom-get", {"path": path, "property": name}))

    async def observe(self) -> Mapping[str, Observed]:
        """Every job that QEMU has, by id (QAPI `query-jobs`, and `query-block-jobs` for I/O errors)."""
        execute = self._connection.execute
        jobs, block_jobs = await asyncio.gather(execute("query-jobs"), execute("query-block-jobs"))
        with _understood():
            blocked = {job["device"]: job["io-status"] for job in block_jobs}
            return {
                job["id"]: Observed(
                    status=job["status"],
                    progress=Progress(current=job["current-progress"], end=job["total-progress"]),
                    error=job.get("error"),
                    io_status=blocked.get(job["id"], "ok"),
                )
                for job in jobs
            }

    async def orphan(self, job_id: str) -> OrphanJob | None:
        """What a job works on of which there is no record (`x-debug-query-block-graph`)."""
        if "x-debug-query-block-graph" not in self._commands:
            return None
        disks = await self.disks()
        with _understood():
            block_graph = await self._connection.execute("x-debug-query-block-graph")
            jobs = await self._connection.execute("query-block-jobs")
            job = next((job for job in jobs if job["device"] == job_id and job["type"] == "commit"), None)
            if job is None:
                return None
            folder = folder_of(self.facts.process)
            return graph.read_orphan(job, disks=disks, nodes=self._nodes, graph=block_graph, folder=folder)

    async def start(self, job: Job) -> None:
        """Start the job (QAPI `block-commit`)."""
        work = job.work
        arguments = block_commit_arguments(
            device=work.disk_node,
            top_node=work.nodes[work.top],
            base_node=work.nodes[work.base],
            backing_file=work.backing_file,
            speed=job.bandwidth,
            on_error=job.on_error.value,
        )
        await self._connection.execute("block-commit", {"job-id": job.id} | arguments)

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
        said = str(await self._connection.execute("human-monitor-command", {"command-line": line})).strip()
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
        self._events.final_reports.pop(job_id, None)
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


def _stream(jobs: Sequence[Mapping[str, Any]]) -> str | None:
    return next((job["device"] for job in jobs if job["type"] == "stream"), None)


class _Events:
    """What is taken from QEMU's events: that it is time to look, and how jobs ended."""

    def __init__(self, hint: Callable[[], None]) -> None:
        self.final_reports: dict[str, Observed] = {}
        self._hint = hint

    def __call__(self, event: Mapping[str, Any]) -> None:
        name = event["event"]
        if name in ("BLOCK_JOB_CANCELLED", "BLOCK_JOB_COMPLETED"):
            data = event["data"]
            error = CANCELED if name == "BLOCK_JOB_CANCELLED" else data.get("error")
            if len(self.final_reports) >= FINAL_REPORTS_MAX:
                self.final_reports.pop(next(iter(self.final_reports)))
            progress = Progress(current=data["offset"], end=data["len"])
            self.final_reports[data["device"]] = Observed(status="concluded", progress=progress, error=error)
        # A job tells of each of its steps, and most of them are on the way to one that matters.
        if name in HINTS or (name == "JOB_STATUS_CHANGE" and event["data"].get("status") in STOPS):
            self._hint()


class QmpDriver:
    """The `Driver` port; `timeout` is the most seconds that one command may take."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout

    async def connect(self, address: Address, hint: Callable[[], None]) -> QmpRunner:
        """A connection to the monitor at `address`; raises `Unreachable`, `Busy` or `Unanswered`."""
        events = _Events(hint)
        connection = await Connection.open(address, self._timeout, events, hint)
        try:
            with _understood():
                commands = frozenset(command["name"] for command in await connection.execute("query-commands"))
                return QmpRunner(connection, await _facts(connection, commands), commands, events)
        except BaseException:
            await connection.close()
            raise

    def alive(self, process: Process) -> bool | None:
        """Whether that very process still runs; None where it can't be seen from here."""
        return alive(process)


async def _facts(connection: Connection, commands: frozenset[str]) -> QemuFacts:
    uuid = await _ask_for(connection, "query-uuid", "UUID")
    uuid = None if uuid == NO_UUID else uuid
    number = connection.greeting.get("qemu", {})
    pid = connection.pid
    return QemuFacts(
        name=await _ask_for(connection, "query-name", "name"),
        uuid=uuid,
        version=".".join(str(number.get(part, 0)) for part in ("major", "minor", "micro")),
        process=Process(pid=pid, started=start_time(pid) if pid else None, uuid=uuid),
        managed_by="libvirt" if await _is_libvirts(connection) else None,
        missing=tuple(command for command in NEEDED if command not in commands),
    )


async def _is_libvirts(connection: Connection) -> bool:
    """Whether libvirt started this QEMU: its master key, its monitor, or its names of nodes are there."""
    objects = await _ask(connection, "qom-list", {"path": "/objects"}) or ()
    chardevs = await _ask(connection, "query-chardev") or ()
    # Not query-named-block-nodes: see NODES_SAFE.
    block_graph: Mapping[str, Any] = await _ask(connection, "x-debug-query-block-graph") or {}
    return (
        any(entry["name"] == "masterKey0" for entry in objects)
        or any(entry["label"] == "charmonitor" for entry in chardevs)
        or any(LIBVIRT_NODE.fullmatch(node["name"]) for node in block_graph.get("nodes", ()))
    )


async def _ask_for(connection: Connection, command: str, member: str) -> str | None:
    """A member of a reply, or None where the program has no such command or no such member."""
    reply: Mapping[str, Any] | None = await _ask(connection, command)
    return str(reply[member]) if reply is not None and member in reply else None


async def _ask(connection: Connection, command: str, arguments: Mapping[str, object] | None = None) -> Any:
    """A reply, or None where the program does not have the command."""
    try:
        return await connection.execute(command, arguments)
    except Declined:
        return None
