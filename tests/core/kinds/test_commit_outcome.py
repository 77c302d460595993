from __future__ import annotations

from dataclasses import replace

import pytest

from app.core.chain import Identity, NotDeleted
from app.core.errors import CANCELED
from app.core.evidence import Evidence, GraphReading, HeaderReading, Proof, Verdict
from app.core.kinds import commit
from app.core.kinds.commit import CommitSpec
from app.core.states import Intent, State
from tests.core.samples import FILES, NODES, active_job, intermediate_job

ACTIVE = active_job().spec
INNER = intermediate_job().spec


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


@pytest.mark.parametrize(
    ("intent", "verdict", "proof"),
    [
        (Intent.RUN, Verdict.GONE, Proof.UNCHANGED),
        (Intent.ABORT, Verdict.GONE, Proof.UNCHANGED),
        (Intent.ABORT, Verdict.FINE, Proof.UNCHANGED),
        (Intent.FORCE, Verdict.GONE, Proof.UNCHANGED),
        (Intent.RUN, Verdict.FINE, Proof.UNKNOWN),
        (Intent.PIVOT, Verdict.GONE, Proof.UNKNOWN),
        (Intent.PIVOT, Verdict.FINE, Proof.UNKNOWN),
        (Intent.KEEP, Verdict.GONE, Proof.UNKNOWN),
    ],
)
def test_no_header_tells_of_a_pivot(intent: Intent, verdict: Verdict, proof: Proof) -> None:
    """With QEMU gone, the images show an active layer as unmerged only if nobody can have pivoted."""
    assert commit.prove(ACTIVE, header(None, intent=intent, verdict=verdict)) is proof
    # A disk that QEMU has no more, or a pivot that was asked for once, leaves nothing proven.
    assert commit.prove(ACTIVE, header(None, intent=intent, verdict=verdict, pivot_asked=True)) is Proof.UNKNOWN
    assert commit.prove(ACTIVE, header(None, intent=intent, verdict=verdict, unplugged=True)) is Proof.UNKNOWN


@pytest.mark.parametrize(
    ("evidence", "state", "words"),
    [
        (
            Evidence(verdict=Verdict.FINE, graph=graph("n0")),
            State.COMPLETED,
            "QEMU had concluded it without error; QEMU's block graph showed the merged layers gone",
        ),
        (
            Evidence(verdict=Verdict.FINE, graph=graph(*NODES), intent=Intent.KEEP),
            State.COMPLETED,
            "QEMU had concluded it without error; QEMU's block graph showed the chain unchanged",
        ),
        (
            Evidence(verdict=Verdict.ERROR, verdict_error="No medium", graph=graph("n0")),
            State.FAILED,
            "QEMU had concluded it with the error: No medium",
        ),
        (
            Evidence(verdict=Verdict.ERROR, verdict_error=CANCELED, graph=graph(*NODES)),
            State.CANCELED,
            f"QEMU had concluded it with the error: {CANCELED}",
        ),
        (
            Evidence(verdict=Verdict.VANISHED, graph=graph(*NODES)),
            State.FAILED,
            "QEMU did not list it any more; QEMU's block graph showed the chain unchanged",
        ),
        (header(FILES[3]), State.COMPLETED, "its QEMU had ended; the images' headers showed the merged layers gone"),
        (header(None), State.LOST, "its QEMU had ended; the images' headers and that together prove no outcome"),
    ],
)
def test_a_judgement_says_what_it_was_read_from(evidence: Evidence, state: State, words: str) -> None:
    """QEMU's last word and where the chain was read, in words."""
    judgement = commit.judge(INNER, evidence)
    assert (judgement.state, judgement.because) == (state, words)


def test_nothing_is_deleted_before_the_base_is_on_the_disk() -> None:
    """Where QEMU may hold back merged data, the merged images stay, and the result says why."""
    spec = intermediate_job("delete").spec
    merged = Evidence(verdict=Verdict.FINE, graph=graph("n3", "n0"))
    tidy = commit.cleanup(spec, commit.judge(spec, replace(merged, flushed=True)))
    assert (tuple(tidy.to_delete), tidy.not_deleted, tidy.invalidated) == (spec.deletes, (), spec.invalidates)
    assert (tidy.release, tidy.chain) == (("n2", "n1"), (FILES[0], FILES[3]))
    tidy = commit.cleanup(spec, commit.judge(spec, merged))
    assert ([*tidy.to_delete], [left.file for left in tidy.not_deleted]) == ([], [*spec.deletes])
    assert (tidy.release, tidy.chain) == (("n2", "n1"), (FILES[0], FILES[3]))


def test_images_that_were_known_to_stay_are_in_the_result() -> None:
    """What the plan could not delete is named once the merge is proven, and not where nothing was merged."""
    early = NotDeleted(file=FILES[1], reason="a block device")
    spec = replace(intermediate_job("delete").spec, deletes=FILES[2:3], undeletable=(early,))
    done = Evidence(verdict=Verdict.FINE, graph=graph("n3", "n0"), flushed=True)
    tidy = commit.cleanup(spec, commit.judge(spec, done))
    assert ([*tidy.to_delete], tidy.not_deleted) == ([FILES[2]], (early,))
    tidy = commit.cleanup(spec, commit.judge(spec, replace(done, verdict=Verdict.ERROR, verdict_error="no")))
    assert ([*tidy.to_delete], tidy.not_deleted, tidy.invalidated, tidy.chain) == ([], (), (), FILES)


def test_a_kept_overlay_keeps_its_chain() -> None:
    """After `keep` nothing is released: the base is a copy, and the chain is as before."""
    kept = Evidence(verdict=Verdict.FINE, graph=graph(*NODES), intent=Intent.KEEP, flushed=True)
    tidy = commit.cleanup(ACTIVE, commit.judge(ACTIVE, kept))
    assert (tidy.release, tidy.chain) == ((), FILES)
