"""A simulated QEMU process: its block graph, its jobs, and what it has not written to the disk yet.

It refuses what QEMU refuses, in QEMU's words. What is written to a base lives in the process until it is flushed, and
is lost if the process is killed before; what guests write is on the disk at once, as if they flushed after each write.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator

from app.core.chain import Disk, Layer
from app.core.errors import CANCELED
from app.core.evidence import Process
from tests.engine.simulation.blockjob import (
    DRAINED,
    GOES_ON,
    PASSING,
    STANDS,
    BlockJob,
    QemuRefuses,
)
from tests.engine.simulation.files import CLUSTER, CLUSTERS, Content, FileSystem, Image, merged
from tests.engine.simulation.nodes import DEVICE, Client, GuestDisk, Node


class Qemu:
    """One process. `openers` gives the other processes that have a file open, `note` takes what is to be traced."""

    def __init__(
        self,
        *,
        process: Process,
        disks: tuple[GuestDisk, ...],
        files: FileSystem,
        openers: Callable[[Qemu, Image], list[Qemu]],
        note: Callable[[str], None],
    ) -> None:
        self.process = process
        self.up = True
        self.hung = False
        self.disks = {disk.target: disk for disk in disks}
        self.roots: dict[str, Node] = {}
        self.nodes: dict[str, Node] = {}
        self.carriers: dict[str, str] = {}
        self.jobs: dict[str, BlockJob] = {}
        self.ended: dict[str, BlockJob] = {}
        self.clients: list[Client] = []
        self.unflushed: dict[int, Content] = {}
        self._files = files
        self._openers = openers
        self._note = note
        self._late_flush: list[Node] = []

    # The graph --------------------------------------------------------------------------------------------------------

    def add_node(self, node: Node) -> Node:
        """As `blockdev-add`."""
        self.nodes[node.name] = node
        if node.carrier:
            self.carriers[node.carrier] = node.name
        return node

    def below(self, node: Node) -> Iterator[Node]:
        """The node and all below it."""
        at: Node | None = node
        while at is not None:
            yield at
            at = at.below

    def chain(self, target: str) -> list[Node]:
        """The nodes of a disk, active layer first."""
        return list(self.below(self.roots[target]))

    def layer(self, node: Node) -> Content:
        """What is in this image alone, as this process sees it."""
        return node.image.clusters | self.unflushed.get(node.image.inode, {})

    def view(self, target: str) -> Content:
        """What the guest reads."""
        return merged([self.layer(node) for node in self.chain(target)])

    def has_open(self, image: Image) -> bool:
        """Whether this process has the file open."""
        return any(node.image is image for node in self.nodes.values())

    def writes_to(self, image: Image) -> bool:
        """Whether this process may write to the file: a guest does, or a job."""
        guests = any(root.image is image for root in self.roots.values())
        return guests or any(job.base.image is image for job in self.running)

    @property
    def running(self) -> list[BlockJob]:
        """The jobs that have not concluded."""
        return [job for job in self.jobs.values() if job.status != "concluded"]

    def job_on(self, target: str) -> BlockJob | None:
        """The job that works on a disk."""
        return next((job for job in self.running if job.target == target), None)

    def flush(self, node: Node) -> None:
        """Write to the disk what is held back of the node's data."""
        node.image.clusters |= self.unflushed.pop(node.image.inode, {})

    def write(self, target: str, cluster: int, number: int) -> bool:
        """The guest writes, and flushes; False where its I/O waits."""
        job = self.job_on(target)
        if not self.up or self.hung or (job is not None and job.active and job.status in DRAINED):
            return False
        image = self.roots[target].image
        image.clusters[cluster] = number
        self.unflushed.get(image.inode, {}).pop(cluster, None)
        self.disks[target].expected[cluster] = number
        if job is not None and job.active:
            job.left.add(cluster)
        return True

    def snapshot(self, target: str, node: Node) -> None:
        """As `blockdev-snapshot`: `node` becomes the active layer."""
        if self.job_on(target) is not None:
            raise QemuRefuses(f"Node '{self.roots[target].name}' is busy: block device is in use by block job: commit")
        old = self.roots[target]
        self._require_root(old)
        old.read_only = True
        self.roots[target] = self.add_node(node)
        self.disks[target].active = node.image.path

    def delete_node(self, name: str) -> None:
        """As `blockdev-del`."""
        if name in self.carriers:
            if self.carriers[name] in self.nodes:
                raise QemuRefuses(f"Node '{name}' is busy: node is used as 'file' of '{self.carriers[name]}'")
            del self.carriers[name]
            return
        node = self.nodes.get(name)
        if node is None:
            raise QemuRefuses(f"Failed to find node with node-name='{name}'")
        parents = [other.name for other in self.nodes.values() if other.below is node]
        held = [job.id for job in self.jobs.values() if not job.active and node in (*job.layers, job.base)]
        if parents or held or node in self.roots.values() or any(node is job.base for job in self.running):
            raise QemuRefuses(f"Node '{name}' is busy: node is used by {(parents or held or ['a device'])[0]}")
        del self.nodes[name]

    def _require_root(self, node: Node) -> None:
        if any(other.below is node for other in self.nodes.values()):
            raise QemuRefuses("Need a root block node")

    def describe(self) -> tuple[Disk, ...]:
        """The disks, as the QMP runner makes them of QEMU's replies."""
        seen = self.process.pid is not None
        found: list[Disk] = []
        for target, disk in self.disks.items():
            job = self.job_on(target)
            root = self.roots[target]
            layers = tuple(
                Layer(
                    file=node.image.path,
                    format="qcow2",
                    node=node.name,
                    virtual_size=CLUSTERS * CLUSTER,
                    actual_size=len(self.layer(node)) * CLUSTER,
                    backing=node.image.header,
                    backing_format="qcow2" if node.image.header else None,
                    identity=(DEVICE, node.image.inode) if seen and node.image.seen else None,
                    folder=posixpath.dirname(node.image.path),
                    below=(node.carrier,) if node.carrier else (),
                )
                for node in self.below(root)
            )
            top = f"#job-{job.id}" if job is not None and job.active else root.name
            found.append(
                Disk(
                    name=target,
                    aliases=(disk.qdev,),
                    node=top,
                    backend=disk.backend,
                    qdev=disk.qdev,
                    layers=layers,
                    running_jobs=(job.id,) if job is not None else (),
                )
            )
        return tuple(found)

    # Jobs -------------------------------------------------------------------------------------------------------------

    def block_commit(
        self,
        *,
        job_id: str,
        device: str,
        top_node: str,
        base_node: str,
        on_error: str,
        auto_finalize: bool,
        auto_dismiss: bool,
        backing_file: str | None = None,
        speed: int = 0,
    ) -> None:
        """As `block-commit`."""
        assert not auto_dismiss
        target = next((target for target, root in self.roots.items() if root.name == device), None)
        if target is None:
            known = device in self.nodes
            raise QemuRefuses("Need a root block node" if known else f"Cannot find device='' nor node-name='{device}'")
        if self.job_on(target) is not None:
            raise QemuRefuses("Need a root block node")
        chain = self.chain(target)
        self._require_root(chain[0])
        names = [node.name for node in chain]
        for name in (top_node, base_node):
            if name not in names:
                raise QemuRefuses(f"'{name}' is not in this backing file chain")
        if job_id in self.jobs:
            raise QemuRefuses(f"Job ID '{job_id}' already in use")
        top, base = names.index(top_node), names.index(base_node)
        if base <= top:
            raise QemuRefuses(f"'{base_node}' is not in this backing file chain")
        self._check_base(chain[:base], chain[base])
        job = BlockJob(
            id=job_id,
            target=target,
            active=top == 0,
            layers=tuple(chain[top:base]),
            base=chain[base],
            on_error=on_error,
            backing_file=backing_file,
            auto_finalize=auto_finalize,
            speed=speed,
        )
        job.left = set(merged([self.layer(node) for node in job.layers]))
        self.jobs[job_id] = job
        self._tell()

    def block_stream(
        self,
        *,
        job_id: str,
        device: str,
        on_error: str,
        auto_finalize: bool,
        auto_dismiss: bool,
        base_node: str | None = None,
        backing_file: str | None = None,
        speed: int = 0,
    ) -> None:
        """As `block-stream`."""
        assert not auto_dismiss
        target = next((target for target in self.roots if any(n.name == device for n in self.chain(target))), None)
        if target is None:
            raise QemuRefuses(f"Cannot find device='' nor node-name='{device}'")
        if self.job_on(target) is not None:
            raise QemuRefuses(f"Node '{device}' is busy: block device is in use by block job: stream")
        chain = self.chain(target)
        names = [node.name for node in chain]
        at = names.index(device)
        if base_node is not None and base_node not in names[at + 1 :]:
            raise QemuRefuses(f"Node '{base_node}' is not a backing image of '{device}'")
        if job_id in self.jobs:
            raise QemuRefuses(f"Job ID '{job_id}' already in use")
        end = len(chain) if base_node is None else names.index(base_node)
        if at and self._openers(self, chain[at].image):
            raise QemuRefuses('Failed to get "write" lock')
        job = BlockJob(
            id=job_id,
            target=target,
            active=False,
            layers=tuple(chain[at + 1 : end]),
            base=chain[at],
            stream=True,
            below=None if base_node is None else chain[end],
            on_error=on_error,
            backing_file=backing_file,
            auto_finalize=auto_finalize,
            speed=speed,
        )
        job.left = set(merged([self.layer(node) for node in job.layers])) - set(self.layer(job.base))
        self.jobs[job_id] = job
        self._tell()

    def _check_base(self, above: list[Node], base: Node) -> None:
        for other in self.nodes.values():
            if other.image is base.image and other is not base:
                raise QemuRefuses('Failed to get "write" lock')
            if other.below is base and other not in above:
                raise QemuRefuses(
                    f"Permission conflict on node '{base.name}': permissions 'write' are both required by an unnamed "
                    f"block device (uses node '{base.name}' as 'root' child) and unshared by node '{other.name}' (uses "
                    f"node '{base.name}' as 'backing' child)."
                )
        if self._openers(self, base.image):
            raise QemuRefuses('Failed to get "write" lock')

    def job(self, id_: str) -> BlockJob:
        """The job of that id."""
        if id_ not in self.jobs:
            raise QemuRefuses("Job not found")
        return self.jobs[id_]

    def dismiss(self, id_: str) -> None:
        """As `job-dismiss`."""
        job = self.job(id_)
        if job.status != "concluded":
            raise QemuRefuses(f"Job '{id_}' in state '{job.status}' cannot accept command verb 'dismiss'")
        del self.jobs[id_]

    def finalize(self, id_: str) -> None:
        """As `job-finalize`: the job takes effect at once."""
        job = self.job(id_)
        job.check_finalize()
        self._end(job)
        self._tell()

    def move(self, clusters: int) -> None:
        """Let every job take its next move, and copy that many clusters at most."""
        for node in self._late_flush:
            self.flush(node)
        self._late_flush.clear()
        for job in self.running:
            before = job.status
            self._move(job, clusters)
            if job.status != before:
                self._tell()

    def _move(self, job: BlockJob, clusters: int) -> None:
        if job.status == "aborting":
            self._conclude(job, "undone")
        elif job.status in PASSING:
            job.to(PASSING[job.status])
        elif job.status == "pending":
            if job.auto_finalize:
                self._end(job)
        elif job.paused and job.status in STANDS:
            job.to(STANDS[job.status])
        elif not job.paused and job.status in GOES_ON:
            job.to(GOES_ON[job.status])
        elif job.status in {"running", "ready"}:
            self._copy(job, clusters)

    def _copy(self, job: BlockJob, clusters: int) -> None:
        if job.left and self._files.full:
            job.run_out_of_space()
            return
        source = merged([self.layer(node) for node in job.layers])
        if job.stream:
            # What the guest has written meanwhile is newer.
            job.left -= set(self.layer(job.base))
        for cluster in sorted(job.left)[: 1 if job.speed else clusters]:
            self.unflushed.setdefault(job.base.image.inode, {})[cluster] = source[cluster]
            job.left.discard(cluster)
            job.copied += 1
        if job.left:
            return
        if job.status == "running":
            job.to("ready" if job.active else "waiting")
        elif job.complete or job.gentle_cancel:
            job.to("waiting")
        if job.status == "waiting":
            for client in self.clients:
                client.leaving.add(job.id)

    def _end(self, job: BlockJob) -> None:
        """The job has copied all, and takes effect."""
        if job.active and not job.complete:
            self._conclude(job, "kept")
            return
        if job.active:
            self.flush(job.base)
            self.roots[job.target] = job.base
            self.disks[job.target].active = job.base.image.path
            job.base.read_only = False
        elif job.stream:
            job.base.below = job.below
            job.base.image.header = job.backing_file
            self._late_flush.append(job.base)
        else:
            above = next(node for node in self.chain(job.target) if node.below is job.layers[0])
            above.below = job.base
            above.image.header = job.backing_file
            self._late_flush.append(job.base)
        if job.layers[0].implicit:
            for node in job.layers:
                del self.nodes[node.name]
        self._conclude(job, "merged")

    def _conclude(self, job: BlockJob, outcome: str) -> None:
        job.to("concluded")
        job.outcome = outcome
        self.ended[job.id] = job
        self._note(f"{job.id} concluded: {outcome}, {job.error or 'no error'}")
        for client in self.clients:
            client.final_reports[job.id] = job.observed

    def _tell(self) -> None:
        for client in self.clients:
            client.hint()

    # The process ------------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """SIGKILL: the jobs are gone, and so is what was not flushed."""
        self.up = self.hung = False
        self.unflushed.clear()
        self.jobs.clear()

    def quit(self) -> None:
        """SIGTERM: jobs are canceled, one that is about to pivot does so, and all is written to the disk."""
        for job in self.running:
            if job.active and job.complete and job.status == "pending":
                self._end(job)
            else:
                if job.status != "aborting":
                    job.error = CANCELED
                    job.status = "aborting"
                self._conclude(job, "undone")
        for node in self.nodes.values():
            self.flush(node)
        self.up = self.hung = False
        self.jobs.clear()

    def revert(self, job: BlockJob) -> None:
        """Another client moves the job's disk onto its base, as that is now, and deletes the layers above."""
        target = job.target
        above = [node for node in self.chain(target) if node is not job.base and node in job.layers]
        # Whoever does that by hand loses nothing of what is there by it.
        for node in self.chain(target):
            self.flush(node)
        self.roots[target] = job.base
        job.base.read_only = False
        for node in above:
            self.nodes.pop(node.name, None)
        disk = self.disks[target]
        disk.active = job.base.image.path
        disk.expected.clear()
        disk.expected |= self.view(target)
