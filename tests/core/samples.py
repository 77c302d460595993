"""A four-layer disk, requests, plans and jobs to tell the tests' stories with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from app.core.chain import Disk, Layer
from app.core.errors import Problem
from app.core.evidence import Evidence, GraphReading, HeaderReading, Process, Proof
from app.core.headers import HeaderFacts
from app.core.job import Job, accept
from app.core.kinds import commit
from app.core.kinds.commit import CommitRequest, CommitSelection, CommitSpec
from app.core.machine.inputs import Gathered, Input
from app.core.machine.step import Step
from app.core.machine.table import start_job, step
from app.core.plan import Facts, Plan
from app.core.sameness import Sameness
from app.core.states import OnError, OnReady

GIB = 1 << 30
PROCESS = Process(pid=4242, started=1000, uuid="4f4b6a5e-0000-4000-8000-000000000001")
"""The QEMU that runs the sample disk."""

LAYERS = (
    Layer(file="/images/s3.qcow2", format="qcow2", node="n3", virtual_size=GIB, actual_size=3000, backing="s2.qcow2"),
    Layer(file="/images/s2.qcow2", format="qcow2", node="n2", virtual_size=GIB, actual_size=2000, backing="s1.qcow2"),
    Layer(file="/images/s1.qcow2", format="qcow2", node="n1", virtual_size=GIB, actual_size=1000, backing="base.qcow2"),
    Layer(file="/images/base.qcow2", format="qcow2", node="n0", virtual_size=GIB, actual_size=500_000),
)
"""Active layer first, each header relative."""

FILES = tuple(layer.file for layer in LAYERS)
NODES = tuple(layer.node for layer in LAYERS)


def disk(*layers: Layer, temporary: bool = False, running_jobs: tuple[str, ...] = ()) -> Disk:
    """The disk `vda`, with the four layers above if no others are given."""
    chain = layers or LAYERS
    return Disk(
        name="vda",
        aliases=("virtio0", "disk0"),
        node="n3",
        backend="disk0",
        qdev="virtio0",
        layers=chain,
        temporary=temporary,
        running_jobs=running_jobs,
    )


def request(
    *,
    base: str | None = None,
    top: str | None = None,
    bandwidth: int = 0,
    flags: int | Sequence[str] = (),
    on_ready: OnReady = OnReady.WAIT,
    on_error: OnError = OnError.REPORT,
    backing_file: str | None = None,
    verify: bool = False,
) -> CommitRequest:
    """A request whose fields are right."""
    made = commit.request(
        base=base,
        top=top,
        bandwidth=bandwidth,
        flags=flags,
        on_ready=on_ready,
        on_error=on_error,
        backing_file=backing_file,
        verify=verify,
    )
    assert isinstance(made, CommitRequest), made
    return made


def selection(asked: CommitRequest, on: Disk | None = None) -> CommitSelection:
    """The layers that a request means, which pass every check."""
    chosen = commit.select(on or disk(), asked)
    assert isinstance(chosen, CommitSelection), chosen
    return chosen


def plan(asked: CommitRequest, on: Disk | None = None, facts: Facts | None = None) -> Plan[CommitSpec]:
    """The plan of a request that can be served."""
    planned = commit.plan(selection(asked, on), facts or Facts(free=100 * GIB, header=HeaderFacts(room=1023)))
    assert isinstance(planned, Plan), planned
    return planned


def refusal(of: object) -> Problem:
    """The problem that `of` has to be."""
    assert isinstance(of, Problem), of
    return of


def job_for(asked: CommitRequest, *, id_: str = "bj-1", facts: Facts | None = None) -> Job:
    """The queued job of a request on the sample disk, created at 100 ms."""
    return accept(plan(asked, facts=facts), id_=id_, domain="web1", requested_by="ci", now=100)


def intermediate_job(*flags: str, on_error: OnError = OnError.REPORT) -> Job:
    """A commit of s2 and s1 into base, below the active layer."""
    return job_for(request(top="vda[1]", flags=flags, on_error=on_error))


def active_job(*flags: str, on_ready: OnReady = OnReady.WAIT, on_error: OnError = OnError.REPORT) -> Job:
    """A commit of the active layer and all below it into base."""
    return job_for(request(flags=("active", *flags), on_ready=on_ready, on_error=on_error))


def commit_spec(job: Job) -> CommitSpec:
    """The spec of a job that is a commit."""
    assert isinstance(job.spec, CommitSpec)
    return job.spec


def shows(proof: Proof, *, flushed: bool = True) -> Gathered:
    """A reading of the graph, and of the overlay's header, that proves this of any job above.

    The process is the one that took the job, and whether it runs is left to the verdict.
    """
    nodes = {Proof.MERGED: NODES[3:], Proof.UNCHANGED: NODES, Proof.UNKNOWN: ()}[proof]
    files = tuple(FILES[NODES.index(node)] for node in nodes)
    leads = {Proof.MERGED: FILES[3], Proof.UNCHANGED: FILES[1], Proof.UNKNOWN: None}[proof]
    return Gathered(
        Evidence(
            graph=GraphReading(nodes=nodes, files=files),
            header=None if leads is None else HeaderReading(file=leads),
            process=Sameness.SAME,
            ended=True,
            flushed=flushed,
        )
    )


class Story:
    """A job's life, told event by event; the time rises by one ms with each.

    `told` are the event types so far, `last` what the latest event asked for. `crash` is what a restart makes of it:
    only what was stored is known.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.stored = job
        self.now = job.created_at
        self.told: list[str] = []
        self.versions: list[int] = []
        self.last: tuple[str, ...] = ()
        self._take(start_job(job))

    def _take(self, following: Step) -> tuple[str, ...]:
        for told in following.versions:
            self.stored = told.job
            self.versions.append(told.job.version)
            if told.type is not None:
                self.told.append(told.type.removeprefix("job."))
        self.job = following.job
        self.last = tuple(str(command) for command in following.commands)
        return self.last

    def on(self, event: Input) -> tuple[str, ...]:
        """What the job asks for after `event`."""
        self.now += 1
        return self._take(step(self.job, event, self.now))

    def crash(self) -> None:
        """Forget everything but what was stored."""
        self.job = self.stored


def with_layer(position: int, **changes: object) -> tuple[Layer, ...]:
    """The sample layers, one of them changed."""
    layers = list(LAYERS)
    layers[position] = replace(layers[position], **changes)  # pyright: ignore[reportArgumentType] - named by the test
    return tuple(layers)
