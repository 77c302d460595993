from __future__ import annotations

from dataclasses import replace

import pytest

from app.core.chain import Identity, NotDeleted
from app.core.errors import CANCELED
from app.core.evidence import Evidence, GraphReading, HeaderReading, Proof, Verdict
from app.core.kinds import commit
from app.core.kinds.commit import CommitSpec
from app.core.plan import Facts
from app.core.sameness import Sameness
from app.core.states import Intent, State
from tests.core.samples import FILES, NODES, active_job, commit_spec, intermediate_job, plan, request

ACTIVE = commit_spec(active_job())
INNER = replace(commit_spec(intermediate_job()), header_seen=False)


def graph(*nodes: str) -> GraphReading:
    """A chain of these nodes."""
    return GraphReading(nodes=nodes, files=tuple(FILES[NODES.index(node)] if node in NODES else node for node in nodes))


def header(path: str | None, identity: Identity | None = None, **more: object) -> Evidence:
    """QEMU has ended, and the overlay's header leads there."""
    read = None if path is None else HeaderReading(file=path, identity=identity)
    return replace(Evidence(ended=True, verdict=Verdict.GONE, header=read), **more)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("spec", "nodes", "proof"),
    [
        (ACTIVE, ("n0",), Proof.MERGED),
        (ACTIVE, ("snap", "n0"), Proof.MERGED),
        (ACTIVE, ("n3", "n2", "n1", "n0"), Proof.UNCHANGED),
        (ACTIVE, ("snap", "n3", "n2", "n1", "n0"), Proof.UNCHANGED),
        (ACTIVE, ("n3", "n0"), Proof.UNKNOWN),
        (ACTIVE, ("n2", "n1", "n0"), Proof.UNKNOWN),
        (ACTIVE, ("n2", "n3", "n1", "n0"), Proof.UNKNOWN),
        (ACTIVE, ("other",), Proof.UNKNOWN),
        (ACTIVE, (), Proof.UNKNOWN),
        (INNER, ("n3", "n0"), Proof.MERGED),
        (INNER, ("n3", "n2", "n1", "n0"), Proof.UNCHANGED),
        (INNER, ("n3", "n2", "n0"), Proof.UNKNOWN),
        (INNER, ("n3", "n2", "n1"), Proof.UNKNOWN),
        (INNER, ("n2", "n1", "new", "n0"), Proof.UNKNOWN),
    ],
)
def test_what_the_chain_proves(spec: CommitSpec, nodes: tuple[str, ...], proof: Proof) -> None:
    """Merged: the merged layers are gone and the base is there. Unchanged: all are there in order. Else it is open."""
    assert commit.prove(spec, Evidence(verdict=Verdict.FINE, graph=graph(*nodes))) is proof


@pytest.mark.parametrize(
    ("backing", "proof"),
    [
        ("/images/base.qcow2", Proof.MERGED),
        ("/images/../images/base.qcow2", Proof.MERGED),
        ("/images/s2.qcow2", Proof.UNCHANGED),
        ("/images/./s2.qcow2", Proof.UNCHANGED),
        ("/images/s1.qcow2", Proof.UNKNOWN),
        (None, Proof.UNKNOWN),
    ],
)
def test_what_the_overlays_header_proves(backing: str | None, proof: Proof) -> None:
    """QEMU writes the overlay's header at the end of an inner merge, so the header tells on which side it died."""
    assert commit.prove(INNER, header(backing)) is proof


@pytest.mark.parametrize(
    ("identity", "proof"),
    [((1, 0), Proof.MERGED), ((1, 2), Proof.UNCHANGED), ((1, 1), Proof.UNKNOWN), (None, Proof.UNKNOWN)],
)
def test_the_header_leads_to_a_file_whatever_it_calls_it(identity: Identity | None, proof: Proof) -> None:
    """A link or `..` in the header leads to the base, or to the top, all the same."""
    layers = tuple(replace(layer, identity=(1, 3 - index)) for index, layer in enumerate(INNER.disk.layers))
    spec = replace(INNER, disk=replace(INNER.disk, layers=layers))
    assert commit.prove(spec, header("/links/image.qcow2", identity)) is proof


def test_a_header_that_nobody_could_ever_read_is_not_waited_for() -> None:
    """The graph of QEMU speaks then; where the header could be read before, its silence proves nothing."""
    evidence = Evidence(verdict=Verdict.FINE, graph=graph("n3", "n0"), flushed=True)
    judgement = commit.judge(INNER, evidence)
    assert (judgement.state, judgement.durable) == (State.COMPLETED, False)
    assert commit.judge(replace(INNER, header_seen=True), evidence).state is State.LOST


@pytest.mark.parametrize(
    ("nodes", "leads", "proof"),
    [
        (("n3", "n0"), FILES[3], Proof.MERGED),
        (("n3", "n0"), FILES[1], Proof.UNKNOWN),
        (NODES, FILES[1], Proof.UNCHANGED),
        (NODES, FILES[3], Proof.UNKNOWN),
        (("other",), FILES[3], Proof.MERGED),
        (("other",), FILES[1], Proof.UNKNOWN),
    ],
)
def test_graph_and_header_have_to_agree(nodes: tuple[str, ...], leads: str, proof: Proof) -> None:
    """One that contradicts the other leaves it open; a chain that others have changed since leaves it to the header."""
    evidence = Evidence(verdict=Verdict.FINE, graph=graph(*nodes), header=HeaderReading(file=leads))
    assert commit.prove(INNER, evidence) is proof


def seen(*pairs: tuple[str, int]) -> GraphReading:
    """A chain of these nodes, with the inodes of their files."""
    return GraphReading(
        nodes=tuple(node for node, _ in pairs),
        files=tuple(node for node, _ in pairs),
        identities=tuple((1, inode) for _, inode in pairs),
    )


@pytest.mark.parametrize(
    ("chain", "proof"),
    [
        (seen(("n0", 0)), Proof.MERGED),
        (seen(("n0", 9)), Proof.UNKNOWN),
        (seen(("x", 3), ("n0", 0)), Proof.UNKNOWN),
        (seen(("n3", 3), ("n2", 2), ("n1", 1), ("n0", 0)), Proof.UNCHANGED),
        (seen(("n3", 3), ("n2", 7), ("n1", 1), ("n0", 0)), Proof.UNKNOWN),
    ],
)
def test_a_name_with_another_file_is_another_layer(chain: GraphReading, proof: Proof) -> None:
    """A node called as the base was proves nothing with another file, nor does a merged file under another name."""
    layers = tuple(replace(layer, identity=(1, 3 - index)) for index, layer in enumerate(ACTIVE.disk.layers))
    spec = replace(ACTIVE, disk=replace(ACTIVE.disk, layers=layers))
    assert commit.prove(spec, Evidence(verdict=Verdict.FINE, graph=chain)) is proof


GONE = Evidence(verdict=Verdict.GONE, ended=True, watched=True)


@pytest.mark.parametrize(
    ("evidence", "state"),
    [
        (GONE, State.FAILED),
        (replace(GONE, intent=Intent.FORCE), State.FAILED),
        (replace(GONE, intent=Intent.PIVOT, pivot_asked=True), State.LOST),
        (replace(GONE, pivot_asked=True), State.LOST),
        (replace(GONE, intent=Intent.KEEP), State.LOST),
        (replace(GONE, watched=False), State.LOST),
        (replace(GONE, ended=False), State.LOST),
        # Another client may have asked for the pivot before we asked for the end.
        (replace(GONE, verdict=Verdict.FINE, intent=Intent.ABORT), State.LOST),
        (replace(GONE, verdict=Verdict.FINE, intent=Intent.ABORT, pivot_asked=True), State.LOST),
        (replace(GONE, verdict=Verdict.FINE), State.LOST),
    ],
)
def test_no_image_tells_of_a_pivot(evidence: Evidence, state: State) -> None:
    """With QEMU gone, only what it was heard to say until then shows that it has not pivoted."""
    assert commit.judge(ACTIVE, evidence).state is state


@pytest.mark.parametrize(
    ("intent", "verdict", "state"),
    [
        (Intent.PIVOT, Verdict.FINE, State.COMPLETED),
        (Intent.RUN, Verdict.FINE, State.LOST),
        (Intent.ABORT, Verdict.FINE, State.LOST),
        (Intent.PIVOT, Verdict.VANISHED, State.LOST),
    ],
)
def test_a_disk_that_was_unplugged(intent: Intent, verdict: Verdict, state: State) -> None:
    """Without a guest on it, a merge that QEMU ended well after we asked for the pivot has all of the data."""
    evidence = Evidence(verdict=verdict, unplugged=True, intent=intent, pivot_asked=intent is Intent.PIVOT)
    judgement = commit.judge(ACTIVE, replace(evidence, flushed=True))
    assert (judgement.state, judgement.merged) == (state, state is State.COMPLETED)


@pytest.mark.parametrize("same", [Sameness.OTHER, Sameness.UNKNOWN])
@pytest.mark.parametrize("spec", [ACTIVE, INNER])
def test_a_qemu_that_may_be_another_says_nothing(spec: CommitSpec, same: Sameness) -> None:
    """The job may still run in the one that took it."""
    evidence = Evidence(
        verdict=Verdict.VANISHED, graph=graph(*NODES), header=HeaderReading(file=FILES[1]), process=same
    )
    assert commit.judge(spec, evidence).state is State.LOST


def test_who_is_lost_is_told_what_to_compare() -> None:
    """The text names the images and the commands, and says how the answer is given."""
    problem = commit.judge(ACTIVE, Evidence(verdict=Verdict.VANISHED, graph=graph("n0"))).error
    assert problem is not None
    assert f"qemu-img compare -U {FILES[0]} {FILES[3]}" in problem.detail
    problem = commit.judge(INNER, Evidence(verdict=Verdict.GONE, ended=True)).error
    assert problem is not None
    assert f"qemu-img info -U --backing-chain {FILES[0]}" in problem.detail
    problem = commit.judge(INNER, Evidence()).error
    assert problem is not None
    assert problem.detail.startswith("nothing is known of it")


@pytest.mark.parametrize(
    ("spec", "evidence", "state", "words"),
    [
        (
            INNER,
            Evidence(verdict=Verdict.FINE, graph=graph("n0"), header=HeaderReading(file=FILES[3])),
            State.COMPLETED,
            (
                "QEMU had concluded it without error; QEMU's block graph and the overlay's header showed the merged "
                "layers gone"
            ),
        ),
        (
            ACTIVE,
            Evidence(verdict=Verdict.FINE, graph=graph(*NODES), intent=Intent.KEEP),
            State.COMPLETED,
            "QEMU had concluded it without error; QEMU's block graph showed the chain unchanged",
        ),
        (
            INNER,
            Evidence(verdict=Verdict.ERROR, verdict_error="No medium", graph=graph("n0")),
            State.FAILED,
            "QEMU had concluded it with the error: No medium",
        ),
        (
            INNER,
            Evidence(verdict=Verdict.ERROR, verdict_error=CANCELED, graph=graph(*NODES)),
            State.CANCELED,
            f"QEMU had concluded it with the error: {CANCELED}",
        ),
        (
            ACTIVE,
            Evidence(verdict=Verdict.VANISHED, graph=graph("n0")),
            State.LOST,
            "QEMU did not list it any more; QEMU's block graph showed the merged layers gone",
        ),
        (
            INNER,
            header(FILES[3]),
            State.COMPLETED,
            "its QEMU had ended; the overlay's header showed the merged layers gone",
        ),
        (INNER, header(None), State.LOST, "its QEMU had ended; neither its block graph nor a header could be read"),
        (ACTIVE, GONE, State.FAILED, "its QEMU had ended, and had not said until then that the job was at its end"),
        (ACTIVE, Evidence(), State.LOST, "nothing was known of it"),
    ],
)
def test_a_judgement_says_what_it_was_read_from(spec: CommitSpec, evidence: Evidence, state: State, words: str) -> None:
    """QEMU's last word and where the chain was read, in words."""
    judgement = commit.judge(spec, evidence)
    assert (judgement.state, judgement.because) == (state, words)


DONE = Evidence(verdict=Verdict.FINE, graph=graph("n3", "n0"), header=HeaderReading(file=FILES[3]), flushed=True)
"""A merge below the active layer of which everything is known."""


@pytest.mark.parametrize(
    "short",
    [
        replace(DONE, flushed=False),
        replace(DONE, verdict=Verdict.VANISHED),
        replace(DONE, verdict=Verdict.GONE, ended=True, graph=None),
        replace(DONE, header=None),
    ],
)
def test_nothing_is_deleted_that_may_be_the_only_copy(short: Evidence) -> None:
    """The base is on the disk, QEMU has said fine to us, and the header leads elsewhere; else the images stay."""
    spec = replace(commit_spec(intermediate_job("delete")), header_seen=False)
    tidy = commit.cleanup(spec, commit.judge(spec, DONE))
    assert (tuple(tidy.to_delete), tidy.not_deleted, tidy.invalidated) == (spec.deletes, (), spec.invalidates)
    assert (tidy.release, tidy.chain) == (("n2", "n1"), (FILES[0], FILES[3]))
    tidy = commit.cleanup(spec, commit.judge(spec, short))
    assert ([*tidy.to_delete], [left.file for left in tidy.not_deleted]) == ([], [*spec.deletes])
    assert (tidy.release, tidy.chain) == (("n2", "n1"), (FILES[0], FILES[3]))


@pytest.mark.parametrize("asked", [True, False])
def test_nothing_is_deleted_after_a_pivot_that_others_have_asked_for(*, asked: bool) -> None:
    """Another client's gentle cancel, and a move of the device, look the same."""
    spec = commit_spec(active_job("delete"))
    evidence = Evidence(verdict=Verdict.FINE, graph=graph("n0"), flushed=True, pivot_asked=asked)
    judgement = commit.judge(spec, evidence)
    assert judgement.state is State.COMPLETED
    assert bool(commit.cleanup(spec, judgement).to_delete) is asked


def test_images_that_were_known_to_stay_are_in_the_result() -> None:
    """What the plan could not delete is named once the merge is proven, and not where nothing was merged."""
    early = NotDeleted(file=FILES[1], reason="a block device")
    spec = replace(commit_spec(intermediate_job("delete")), deletes=FILES[2:3], undeletable=(early,))
    tidy = commit.cleanup(spec, commit.judge(spec, DONE))
    assert ([*tidy.to_delete], tidy.not_deleted) == ([FILES[2]], (early,))
    tidy = commit.cleanup(spec, commit.judge(spec, replace(DONE, verdict=Verdict.ERROR, verdict_error="no")))
    assert ([*tidy.to_delete], tidy.not_deleted, tidy.invalidated, tidy.chain) == ([], (), (), FILES)


def test_a_kept_overlay_keeps_its_chain() -> None:
    """After `keep` nothing is released: the base is a copy, and the chain is as before."""
    kept = Evidence(verdict=Verdict.FINE, graph=graph(*NODES), intent=Intent.KEEP, flushed=True)
    tidy = commit.cleanup(ACTIVE, commit.judge(ACTIVE, kept))
    assert (tidy.release, tidy.chain) == ((), FILES)


def test_a_header_that_can_not_be_read_back_leaves_all_files() -> None:
    """What it names today may be what it will name tomorrow."""
    made = plan(request(top="vda[1]", flags=["delete"]), facts=Facts())
    assert made.deletes == ()
    assert [left.file for left in made.spec.undeletable] == [*FILES[1:3]]
    assert plan(request(flags=["active", "delete"]), facts=Facts()).deletes == FILES[:3]
