"""QEMU as the engine sees it: disks, jobs, and what to do with them, over one QMP connection."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final, TypeVar

import structlog

from app.core.chain import Disk
from app.core.errors import Code, Problem
from app.core.job import Job
from app.core.kinds import kind_of
from app.core.machine.inputs import Observed
from app.core.orphan import OrphanJob
from app.core.plan import Guest, Parent, Survey
from app.drivers.qmp import graph, replies
from app.drivers.qmp.blocks import Node
from app.drivers.qmp.connection import Connection
from app.drivers.qmp.events import QmpEvents
from app.drivers.qmp.names import Names
from app.engine.ports.driver import Declined, QemuFacts
from app.hostfs.identity import with_files
from app.hostfs.patience import Overdue, Workers
from app.hostfs.process import folder_of

log = structlog.get_logger(__name__)

T = TypeVar("T")

FILES_S: Final = 5.0
"""Seconds that the file systems have to answer what the files of the disks are."""

READS: Final = 3
"""How often the disks are read before a graph that changes all the while is given up."""


class QmpRunner:
    """The `Runner` port over a QMP connection; `names` are the target names that the devices have had so far."""

    def __init__(
        self,
        connection: Connection,
        facts: QemuFacts,
        commands: frozenset[str],
        events: QmpEvents,
        *,
        names: Names,
        workers: Workers,
    ) -> None:
        self.facts = facts
        self._workers = workers
        self._names = names
        self._connection = connection
        self._commands = commands
        self._events = events
        self._prefixes: dict[str, str] = {}
        self._nodes: Mapping[str, Node] = {}

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
        version = self._connection.version
        return Survey(
            version=(version.major, version.minor, version.micro),
            guest=guest,
            parents=parents,
            unwritable=unwritable,
        )

    async def _parents(self) -> Mapping[str, tuple[Parent, ...]]:
        if replies.GRAPH.command not in self._commands:
            return {}
        if replies.EXPORTS.command not in self._commands:
            return graph.parents(await self._connection.ask(replies.GRAPH), (), self._nodes)
        block_graph, exports = await asyncio.gather(
            self._connection.ask(replies.GRAPH), self._connection.ask(replies.EXPORTS)
        )
        return graph.parents(block_graph, exports, self._nodes)

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
            disks = await self._with_files(disks)
            if any(layer.identity is None for disk in disks for layer in disk.layers):
                # A process that ends holds no file any more. What it had open would seem to be no file of its own, and
                # a job planned by that could never be proven to have ended well.
                await self.guest()
            return disks
        raise Declined(Problem(code=Code.QEMU_ERROR, detail="the block graph changes while it is read; try again"))

    async def _with_files(self, disks: tuple[Disk, ...]) -> tuple[Disk, ...]:
        process = self.facts.process
        try:
            return await self._workers.do(with_files, disks, process, within=FILES_S, owner=process, most=1)
        except Overdue as error:
            # What is not known of the files refuses whatever needs it.
            log.warning("file system silent", name=self.facts.name, pid=process.pid, error=str(error))
            return disks

    async def _read_disks(self) -> tuple[Disk, ...]:
        ask = self._connection.ask
        # All at once: next to the merge of a small layer, each wait for a reply shows.
        unfinished, devices, stats = await asyncio.gather(self._read_nodes(), ask(replies.DEVICES), ask(replies.STATS))
        prefixes = {qdev: await self._prefix(qdev) for device in devices if (qdev := device.qdev)}
        graph.name_devices(devices, prefixes, self._names)
        await self._names.keep()
        running = [job for job in unfinished if job.status not in ("concluded", "null")]
        block_graph = None
        if running and replies.GRAPH.command in self._commands:
            block_graph = await ask(replies.GRAPH)
        if _streams(unfinished):
            self._nodes = graph.nodes_of_images(devices, stats, self._nodes)
        disks = graph.read_disks(
            devices=devices,
            stats=stats,
            nodes=self._nodes,
            graph=block_graph,
            names=self._names,
            folder=folder_of(self.facts.process),
        )
        if running and block_graph is None:
            # Nothing says which disk a job works on, so it counts for all of them.
            ids = tuple(job.id for job in running)
            disks = tuple(replace(disk, running_jobs=ids) for disk in disks)
        return disks

    async def _read_nodes(self) -> Sequence[replies.BlockJob]:
        """Read the nodes, unless that is not safe now; QEMU's block jobs, which tell that.

        query-named-block-nodes can end QEMU 7.2, and some later ones, while a block-stream job has concluded and is not
        dismissed (https://gitlab.com/qemu-project/qemu/-/issues/3149). A cancel or an error concludes a job between two
        looks, so that command is not sent while one exists, whatever its state is.
        """
        unfinished = await self._connection.ask(replies.BLOCK_JOBS)
        if not _streams(unfinished):
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

    async def conclude(self, job_id: str, nodes: Sequence[str] = (), read_only: Sequence[str] = ()) -> None:
        """Let QEMU forget a concluded job (QAPI `job-dismiss`), and delete nodes (QAPI `blockdev-del`).

        A layer below that was opened for writing by a job is left so by QEMU 10 (HMP `qemu-io`: `reopen -r`).

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
        for node in read_only:
            said = await self._connection.ask(replies.MONITOR_TEXT, {"command-line": f'qemu-io "{node}" "reopen -r"'})
            if said.strip():
                log.debug("node left writable", node=node, reason=said.strip())

    async def close(self) -> None:
        """End the connection; never raises."""
        await self._connection.close()

    async def _tolerant(self, command: str, arguments: Mapping[str, object], *harmless: str) -> None:
        try:
            await self._connection.execute(command, arguments)
        except Declined as declined:
            if not any(text in declined.problem.detail for text in harmless):
                raise


def _streams(jobs: Sequence[replies.BlockJob]) -> bool:
    return any(job.type == "stream" for job in jobs)
