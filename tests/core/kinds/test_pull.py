"""Pull: which layers a request means, what stands in its way, what it is planned to do, and how its end is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from app.core.chain import Disk, Layer
from app.core.errors import Code, Problem
from app.core.evidence import Evidence, GraphReading, HeaderReading, Proof, Verdict
from app.core.headers import HeaderFacts
from app.core.images import Access, DiskChain, Image
from app.core.job import Job, Progress, accept
from app.core.kinds import pull
from app.core.kinds.pull import PullFlag, PullRequest, PullSelection, PullSpec
from app.core.machine.inputs import Accepted, Gathered, Observed
from app.core.machine.table import step
from app.core.marks import mark_change
from app.core.orphan import OrphanJob
from app.core.plan import Facts, Guest, Plan, Survey
from app.core.sameness import Sameness
from app.core.states import Command, DataState, Intent, JobType, OnReady, State
from tests.core.samples import FILES, GIB, LAYERS, NODES, PROCESS, disk, refusal, with_layer

GOOD = Facts(free=100 * GIB, header=HeaderFacts(room=1023))


def request(**fields: Any) -> PullRequest:
    """A request whose fields are right."""
    made = pull.request(**fields)
    assert isinstance(made, PullRequest), made
    return made


def selection(on: Disk | None = None, **fields: Any) -> PullSelection:
    """The layers that a request means."""
    chosen = pull.select(on or disk(), request(**fields))
    assert isinstance(chosen, PullSelection), chosen
    return chosen


def plan(on: Disk | None = None, facts: Facts = GOOD, **fields: Any) -> Plan[PullSpec]:
    """The plan of a request that can be served."""
    planned = pull.plan(selection(on, **fields), facts)
    assert isinstance(planned, Plan), planned
    return planned


def job_for(**fields: Any) -> Job:
    """The queued job of a request on the sample disk."""
    return accept(plan(**fields), id_="bj-1", domain="web1", requested_by="ci", now=100)


# Choosing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "target", "taken", "below"),
    [
        ({}, "n3", ("n2", "n1", "n0"), None),
        ({"base": "vda[3]"}, "n3", ("n2", "n1"), "n0"),
        ({"top": "", "base": "n1"}, "n3", ("n2",), "n1"),
        ({"top": FILES[1]}, "n2", ("n1", "n0"), None),
        ({"top": "vda[1]", "base": FILES[3]}, "n2", ("n1",), "n0"),
    ],
)
def test_layers(fields: dict[str, Any], target: str, taken: tuple[str, ...], below: str | None) -> None:
    """What is between `top` and `base` leaves the chain; without `base`, all that is below."""
    chosen = selection(**fields)
    assert (chosen.target.node, tuple(layer.node for layer in chosen.merged)) == (target, taken)
    assert (None if chosen.below is None else chosen.below.node) == below


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"top": "nope"}, Code.TOP_NOT_FOUND),
        ({"base": "nope"}, Code.BASE_NOT_FOUND),
        ({"top": "vda[2]", "base": "vda[1]"}, Code.BASE_NOT_BELOW_TOP),
        ({"top": "vda[3]"}, Code.NOTHING_TO_PULL),
        ({"base": "vda[1]"}, Code.NOTHING_TO_PULL),
        ({"backing_file": "x"}, Code.BACKING_FILE_IMPOSSIBLE),
    ],
)
def test_refusals_of_a_request(fields: dict[str, Any], code: Code) -> None:
    """The first check that fails, in the contract's order."""
    assert refusal(pull.select(disk(), request(**fields))).code is code


def test_refusals_of_a_disk() -> None:
    """One that is in use, that has changed, or that is thrown away."""
    assert refusal(pull.select(disk(), request(), conflict="bj-2")).code is Code.JOB_CONFLICT
    assert refusal(pull.select(disk(temporary=True), request())).code is Code.TEMPORARY_OVERLAY
    absolute = disk(*with_layer(1, backing="/images/s1.qcow2"))
    asked = request(base="vda[3]", flags=["relative"])
    assert refusal(pull.select(absolute, asked)).code is Code.RELATIVE_IMPOSSIBLE
    assert isinstance(pull.select(absolute, request(flags=["relative"])), PullSelection)
    assert isinstance(pull.select(disk(), asked), PullSelection)


@pytest.mark.parametrize(
    "fields",
    [{"flags": ["shallow"]}, {"flags": 8}, {"bandwidth": -1}, {"backing_file": ""}, {"backing_file": "x" * 1024}],
)
def test_wrong_fields(fields: dict[str, Any]) -> None:
    """They are found without a disk."""
    assert refusal(pull.request(**fields)).code is Code.INVALID_REQUEST


def test_flags_are_libvirts() -> None:
    """Those of virDomainBlockRebase."""
    made = request(flags=80, bandwidth=3)
    assert made.flags == PullFlag.RELATIVE | PullFlag.BANDWIDTH_BYTES
    assert made.bandwidth == 3
    assert request(bandwidth=3).bandwidth == 3 << 20
    assert pull.layer_names(request(top="a", base="b")) == ("a", "b")


# Planning -------------------------------------------------------------------------------------------------------------


def survey(**unwritable: str) -> Facts:
    """What QEMU says of nodes that it can't open for writing."""
    return replace(GOOD, survey=Survey(unwritable=unwritable))


@pytest.mark.parametrize(
    ("on", "fields", "facts", "code"),
    [
        (disk(), {}, replace(GOOD, locked=True), Code.IMAGE_LOCKED),
        (disk(), {}, replace(GOOD, survey=Survey(guest=Guest.MIGRATING)), Code.DOMAIN_MIGRATING),
        (disk(), {"top": "vda[1]"}, survey(n2="no"), Code.IMAGE_READ_ONLY),
        (disk(*with_layer(0, corrupt=True)), {}, GOOD, Code.IMAGE_CORRUPT),
        (disk(*with_layer(2, corrupt=True)), {}, GOOD, Code.IMAGE_CORRUPT),
        (disk(*with_layer(1, dirty=True, read_only=True)), {"top": "vda[1]"}, GOOD, Code.IMAGE_CORRUPT),
        (disk(*with_layer(1, virtual_size=1)), {"base": "vda[2]"}, GOOD, Code.SIZES_UNSAFE),
        (disk(), {"base": "vda[3]"}, replace(GOOD, header=HeaderFacts(room=3)), Code.BACKING_FILE_IMPOSSIBLE),
        (disk(), {"base": "vda[3]", "backing_file": "other"}, GOOD, Code.BACKING_FILE_WRONG),
        (disk(*with_layer(0, format="vmdk")), {}, GOOD, Code.OVERLAY_NOT_WRITABLE),
        (disk(), {}, replace(GOOD, free=0), Code.INSUFFICIENT_STORAGE),
    ],
)
def test_refusals_of_a_plan(on: Disk, fields: dict[str, Any], facts: Facts, code: Code) -> None:
    """`top` has to be writable and sound, and to have room for data and for a name."""
    assert refusal(pull.plan(selection(on, **fields), facts)).code is code


@pytest.mark.parametrize(
    ("on", "fields"),
    [
        (disk(*with_layer(3, corrupt=True)), {"base": "vda[3]"}),
        (disk(*with_layer(1, virtual_size=1)), {}),
        (disk(*with_layer(2, virtual_size=1)), {"base": "vda[3]"}),
    ],
)
def test_what_is_no_reason(on: Disk, fields: dict[str, Any]) -> None:
    """The base is not touched; zeros beyond the end of a layer are copied where a longer one is above."""
    assert plan(on, **fields).spec.kind == "pull"


def test_a_shared_base_refuses_nothing() -> None:
    """The house does not even ask who else has the images."""
    inquiry = pull.inquiry(selection(base="vda[3]"))
    assert (inquiry.written.node, [layer.node for layer in inquiry.read]) == ("n3", ["n2", "n1"])
    assert (inquiry.alone, inquiry.upwards, inquiry.overlay, inquiry.probe) == (False, True, LAYERS[0], ())
    assert inquiry.names == ("base.qcow2",)
    assert plan(facts=replace(GOOD, shared_with="web2/vda")).unused == FILES[1:]


@pytest.mark.parametrize(
    ("changes", "probed"), [({"read_only": True}, ("n2",)), ({"read_only": True, "bitmaps": ("b",)}, ()), ({}, ())]
)
def test_who_is_asked_whether_it_can_be_written(changes: dict[str, Any], probed: tuple[str, ...]) -> None:
    """A layer below, unless to open it for writing would change it."""
    assert pull.inquiry(selection(disk(*with_layer(1, **changes)), top="vda[1]")).probe == probed


def test_a_plan() -> None:
    """The chain, the header, the command, and what nobody needs any more."""
    made = plan(base="vda[3]", bandwidth=2)
    assert (made.chain_after, made.unused, made.backing_file) == ((FILES[0], FILES[3]), FILES[1:3], "base.qcow2")
    assert (made.invalidates, made.deletes, made.on_ready) == ((), (), OnReady.WAIT)
    assert (made.demand.file, made.demand.copies) == (FILES[0], 3000)
    [command] = made.commands
    assert (command.execute, command.arguments) == (
        "block-stream",
        {
            "device": "n3",
            "base-node": "n0",
            "backing-file": "base.qcow2",
            "speed": 2 << 20,
            "on-error": "report",
            "auto-finalize": False,
            "auto-dismiss": False,
        },
    )
    [command] = plan().commands
    assert sorted(command.arguments) == ["auto-dismiss", "auto-finalize", "device", "on-error"]


def test_zeros_beyond_an_end_are_counted() -> None:
    """A layer that ends early below another one is copied as zeros from there on."""
    made = plan(disk(*with_layer(2, virtual_size=GIB // 2)), base="vda[3]")
    assert made.demand.copies == 3000 + GIB // 2


def test_warnings() -> None:
    """What grows, what is dropped, and which bitmaps are no part of the disk any more."""
    chain = list(with_layer(1, bitmaps=("day",), tracking=("now", "")))
    chain[3] = replace(chain[3], filters=("throttle",))
    made = plan(disk(*chain), base="vda[3]", facts=replace(GOOD, bytes_to_copy=1, new_bytes=1))
    assert [warning.code for warning in made.warnings] == ["top-grows", "filters-dropped", "bitmaps-lost"]
    assert "day, now" in made.warnings[-1].detail
    assert made.spec.release == ("n2", "n1", "throttle")


def test_the_same_again() -> None:
    """A job that waited is planned anew by the same layers and the same string."""
    spec = plan(top="vda[1]", base="vda[3]").spec
    asked = pull.again(spec, "sda", on_ready=OnReady.WAIT, bandwidth=5)
    assert (asked.top, asked.base, asked.backing_file, asked.bandwidth) == ("sda[1]", "sda[3]", "base.qcow2", 5)
    assert pull.again(plan().spec, "vda", on_ready=OnReady.WAIT, bandwidth=0).base is None


# What is accepted -----------------------------------------------------------------------------------------------------


def test_what_is_shown() -> None:
    """`top` is the layer that is copied into, `overlay` the one above it."""
    job = job_for(top="vda[1]", base="vda[3]", flags=["relative"])
    assert (job.type, job.top_file, job.base_file, job.overlay_file) == (JobType.PULL, FILES[1], FILES[3], FILES[0])
    assert (job.spec.flag_names, job.pivotable) == (["relative"], False)
    whole = job_for()
    assert (whole.top_file, whole.base_file, whole.overlay_file) == (FILES[0], None, None)
    spec = plan().spec
    assert (pull.header_file(spec), pull.flushes(spec), pull.written(spec).file) == (FILES[0], "n3", FILES[0])


def test_claims() -> None:
    """It writes to `top`, reads what is below, and is alone on the disk."""
    claims = {claim.resource: claim.access for claim in pull.claims(plan(base="vda[2]").spec, "web1", "vda")}
    assert claims == {
        DiskChain("web1", "vda"): Access.WRITE,
        Image(FILES[0]): Access.WRITE,
        Image(FILES[1]): Access.READ,
        Image(FILES[2]): Access.READ,
    }
    assert len(pull.claims(plan().spec, "web1", "vda")) == 5


def test_no_image_becomes_invalid() -> None:
    """Neither while it runs, nor afterwards."""
    job = job_for()
    running = replace(job, state=State.RUNNING, data_state=job.capabilities.data_at_start)
    assert mark_change(DataState.UNTOUCHED, running) is None
    done = mark_change(DataState.UNTOUCHED, replace(job, state=State.COMPLETED))
    assert done is None or (done.add, done.remove) == ((), ())


def test_nothing_takes_effect_before_it_is_flushed() -> None:
    """A pending job is finalized by the engine, which flushes."""
    job = replace(job_for(), state=State.STARTING)
    running = step(job, Accepted(PROCESS), 0).job
    assert step(running, Observed("pending", Progress()), 0).commands == (Command.FINALIZE,)


# How it ends ----------------------------------------------------------------------------------------------------------


def graph(*nodes: str) -> GraphReading:
    """A chain of these nodes."""
    return GraphReading(nodes=nodes, files=tuple(FILES[NODES.index(node)] if node in NODES else node for node in nodes))


INNER, WHOLE = plan(base="vda[3]").spec, plan().spec


@pytest.mark.parametrize(
    ("spec", "nodes", "leads", "proof"),
    [
        (INNER, ("n3", "n0"), FILES[3], Proof.MERGED),
        (INNER, NODES, FILES[1], Proof.UNCHANGED),
        (INNER, NODES, FILES[3], Proof.UNKNOWN),
        (INNER, ("n3", "n0"), None, Proof.UNKNOWN),
        (WHOLE, ("n3",), None, Proof.MERGED),
        (WHOLE, NODES, FILES[1], Proof.UNCHANGED),
        # A header that leads past the layers counts where the graph has become another since.
        (WHOLE, ("n3", "n9"), None, Proof.MERGED),
        (WHOLE, ("n3",), FILES[1], Proof.UNKNOWN),
        (WHOLE, ("n2", "n1", "n0"), FILES[1], Proof.UNKNOWN),
    ],
)
def test_what_graph_and_header_prove(spec: PullSpec, nodes: Sequence[str], leads: str | None, proof: Proof) -> None:
    """They have to agree; a header that names nothing proves a pull of everything."""
    evidence = Evidence(verdict=Verdict.FINE, graph=graph(*nodes), header=HeaderReading(file=leads))
    assert pull.prove(spec, evidence) is proof


def fine(spec: PullSpec, **more: Any) -> Evidence:
    """QEMU has concluded it without error, and the chain is the shorter one."""
    below = () if spec.below is None else (spec.below.node,)
    leads = HeaderReading(file=spec.base_file)
    known = Evidence(verdict=Verdict.FINE, graph=graph("n3", *below), header=leads, process=Sameness.SAME, flushed=True)
    return replace(known, **more)


@pytest.mark.parametrize("spec", [INNER, WHOLE])
def test_completed(spec: PullSpec) -> None:
    """QEMU's verdict, the graph, the header, and the flush."""
    judgement = pull.judge(spec, fine(spec))
    assert (judgement.state, judgement.data_state, judgement.merged) == (State.COMPLETED, DataState.MERGED, True)
    tidy = pull.cleanup(spec, judgement)
    assert (tidy.release, tidy.to_delete, tidy.invalidated) == (spec.release, {}, ())
    assert (tidy.chain, tidy.unused) == ((FILES[0], *spec.disk.files[spec.base_index :]), FILES[1 : spec.base_index])


@pytest.mark.parametrize("spec", [INNER, WHOLE])
@pytest.mark.parametrize("more", [{}, {"verdict": Verdict.GONE, "graph": None, "ended": True}])
def test_what_was_not_flushed_is_not_completed(spec: PullSpec, more: dict[str, Any]) -> None:
    """The header may lead past data that never was on the disk; the text says how to put the layers back."""
    judgement = pull.judge(spec, fine(spec, flushed=False, **more))
    assert (judgement.state, judgement.merged) == (State.LOST, False)
    assert judgement.error is not None
    assert f"qemu-img rebase -u -b {FILES[1]}" in judgement.error.detail
    assert pull.cleanup(spec, judgement).release == ()


@pytest.mark.parametrize(
    ("evidence", "state", "code"),
    [
        (Evidence(verdict=Verdict.ERROR, verdict_error="Operation canceled"), State.CANCELED, None),
        (Evidence(verdict=Verdict.ERROR, verdict_error="Input/output error"), State.FAILED, Code.QEMU_ERROR),
        (fine(WHOLE, graph=graph(*NODES), header=HeaderReading(file=FILES[1])), State.FAILED, Code.NOT_MERGED),
        (
            Evidence(verdict=Verdict.GONE, ended=True, header=HeaderReading(file=FILES[1])),
            State.FAILED,
            Code.DOMAIN_GONE,
        ),
        (
            Evidence(
                verdict=Verdict.VANISHED,
                process=Sameness.SAME,
                graph=graph(*NODES),
                header=HeaderReading(file=FILES[1]),
                intent=Intent.ABORT,
            ),
            State.CANCELED,
            None,
        ),
        (Evidence(verdict=Verdict.GONE, ended=True), State.LOST, Code.OUTCOME_UNKNOWN),
    ],
)
def test_other_endings(evidence: Evidence, state: State, code: Code | None) -> None:
    """As of any job that a header proves."""
    judgement = pull.judge(WHOLE, evidence)
    assert (judgement.state, judgement.error and judgement.error.code) == (state, code)
    assert pull.cleanup(WHOLE, judgement).chain == FILES


def test_who_is_lost_is_told_where_to_look() -> None:
    """By the name of the image whose header tells."""
    for spec, words in ((WHOLE, "names none"), (INNER, "names the base")):
        problem = pull.judge(spec, Evidence(verdict=Verdict.GONE, ended=True)).error
        assert isinstance(problem, Problem)
        assert words in problem.detail
        assert f"--backing-chain {FILES[0]}`" in problem.detail


def test_a_layer_below_is_read_only_again() -> None:
    """However the job ends."""
    spec = plan(disk(*with_layer(1, read_only=True)), top="vda[1]").spec
    for known in (replace(fine(spec), graph=graph("n3", "n2")), Evidence(verdict=Verdict.GONE)):
        assert pull.cleanup(spec, pull.judge(spec, known)).read_only == ("n2",)


def test_it_is_not_another_machines_disk() -> None:
    """A job that was never seen to start is started again on the disk that it was accepted for."""
    job = replace(job_for(), state=State.STARTING)
    known = Evidence(graph=graph(*NODES), header=HeaderReading(file=FILES[1]), process=Sameness.SAME)
    assert step(job, Gathered(known), 0).commands == (Command.START,)


# Found again ----------------------------------------------------------------------------------------------------------


def orphan(on: Disk, *between: str, target: str = "n3", loose: Mapping[str, Layer] | None = None) -> OrphanJob:
    """A stream job as QEMU's graph shows it."""
    held = {"active node": (target,), "intermediate node": between}
    return OrphanJob(job_type="stream", speed=7, disks=(Disk(name="vdb"), on), held=held, loose=loose or {})


def test_an_orphan_gets_a_record() -> None:
    """While it runs its base is below what it holds; once it has taken effect, below the layer itself."""
    for on, loose in ((disk(), {}), (disk(LAYERS[0], LAYERS[3]), {"n2": LAYERS[1], "n1": LAYERS[2]})):
        made = pull.adopt(orphan(on, "n2", "n1", loose=loose))
        assert made is not None
        spec = made.spec
        assert (spec.disk.files, spec.top_file, spec.base_file, made.bandwidth) == (FILES, FILES[0], FILES[3], 7)
    whole = pull.adopt(orphan(disk(), "n2", "n1", "n0"))
    assert whole is not None
    assert whole.spec.base_file is None


@pytest.mark.parametrize(
    "found",
    [
        orphan(disk()),
        orphan(disk(), "n1", "n0"),
        orphan(disk(LAYERS[0], LAYERS[3]), "n2", "n1"),
        orphan(disk(), "n2", "n9"),
        orphan(disk(), "n2", target="n9"),
        replace(orphan(disk(), "n2"), job_type="commit"),
        replace(orphan(disk(), "n2"), held={}),
    ],
)
def test_an_orphan_that_can_not_be_told(found: OrphanJob) -> None:
    """Nothing is guessed."""
    assert pull.adopt(found) is None
