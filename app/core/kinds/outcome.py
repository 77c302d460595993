"""The outcome of a job that changes a chain, from what QEMU said and what the chain and the overlay's header show.

A merge below the active layer leaves a header that leads past the merged layers: where it can be read, it has the last
word. A merge of the active layer leaves none. After it the guest writes to the base, and until then to the active
layer: which of the two is the newer one, no image tells. So only QEMU's own verdict on the job, or having heard QEMU to
its end, proves anything. All else is `lost`, and a person is told what to look at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from app.core.errors import CANCELED, Code, Problem, qemu_problem
from app.core.evidence import Evidence, Judgement, Proof, Verdict
from app.core.kinds.base import Capabilities
from app.core.kinds.layers import LayersSpec, proof_of_graph, proof_of_header
from app.core.sameness import Sameness
from app.core.states import DataState, Intent, State

Outcome = tuple[State, Problem | None]

ABORTED: Final = frozenset({Intent.ABORT, Intent.FORCE})
COMPLETED: Final[Outcome] = (State.COMPLETED, None)
CANCELLATION: Final[Outcome] = (State.CANCELED, None)


def chain_proof(spec: LayersSpec, evidence: Evidence, *, header_proves: bool) -> Proof:
    """What graph and header show together of the job's work; one that contradicts the other leaves it open."""
    graph = Proof.UNKNOWN if evidence.graph is None else proof_of_graph(spec, evidence.graph)
    if not header_proves:
        return graph
    header = proof_of_header(spec, evidence.header)
    if header is Proof.UNKNOWN and evidence.header is None and not spec.header_seen:
        # Nobody here has ever been able to read it.
        return graph
    if evidence.graph is None or graph is header:
        return header
    # Others may have changed the chain since, in which the job's layers can't be found any more.
    return Proof.MERGED if graph is Proof.UNKNOWN and header is Proof.MERGED else Proof.UNKNOWN


def judged(
    spec: LayersSpec, evidence: Evidence, capabilities: Capabilities, *, doubt: Callable[[str], str]
) -> Judgement:
    """The judgement of a job of those capabilities.

    `doubt` is what a person is told of an outcome that nothing proves; it gets the beginning of the sentence.
    """
    proof = chain_proof(spec, evidence, header_proves=capabilities.header_proves)
    if evidence.verdict is Verdict.ERROR:
        state, error = _refused_by_qemu(evidence)
    else:
        found = _of_pivot(evidence, proof) if capabilities.pivots else _of_header(evidence, proof)
        if found == COMPLETED and capabilities.only_flushed and not evidence.flushed:
            found = None
        state, error = found or (State.LOST, _unknown(spec, evidence, doubt))
    completed = state is State.COMPLETED
    header = evidence.header is not None and proof_of_header(spec, evidence.header) is Proof.MERGED
    # What another client has ended may have been undone by it since, also before anybody here could look.
    proven = evidence.verdict is Verdict.FINE and (evidence.pivot_asked if capabilities.pivots else header)
    return Judgement(
        state=state,
        error=error,
        data_state=DataState.MERGED if completed else None,
        merged=completed and evidence.intent is not Intent.KEEP,
        durable=evidence.flushed and proven,
        because=_because(evidence, proof),
    )


def _refused_by_qemu(evidence: Evidence) -> Outcome:
    text = evidence.verdict_error or ""
    if text == CANCELED:
        return CANCELLATION
    return State.FAILED, qemu_problem("GenericError", text, doing="the job ended with an error")


def _of_pivot(evidence: Evidence, proof: Proof) -> Outcome | None:
    """Of a job that ends in a pivot; None where nothing is proven."""
    keep, aborted = evidence.intent is Intent.KEEP, evidence.intent in ABORTED
    match evidence.verdict:
        case Verdict.FINE if proof is Proof.MERGED:
            return None if keep else COMPLETED
        case Verdict.FINE if proof is Proof.UNCHANGED:
            # A gentle cancel at ready, ours or another client's, ends without error and without pivot.
            return COMPLETED if keep else CANCELLATION
        case Verdict.FINE if evidence.unplugged and evidence.intent is Intent.PIVOT:
            # There is no guest on the disk whose writes the base could lack.
            return COMPLETED
        case Verdict.VANISHED if proof is Proof.UNCHANGED and evidence.process is Sameness.SAME and not keep:
            return CANCELLATION if aborted else (State.FAILED, _vanished())
        case Verdict.GONE if evidence.ended and evidence.watched and not (keep or evidence.pivot_asked):
            return State.FAILED, domain_gone("while the job ran")
        case _:
            return None


def _of_header(evidence: Evidence, proof: Proof) -> Outcome | None:
    """Of a job that ends by itself and writes a header; None where nothing is proven."""
    match evidence.verdict, proof:
        case Verdict.FINE, Proof.MERGED:
            return COMPLETED
        case Verdict.FINE, Proof.UNCHANGED:
            detail = "QEMU concluded the job without error, but the chain still holds the layers that were to leave it"
            return State.FAILED, Problem(code=Code.NOT_MERGED, detail=detail)
        case _, Proof.MERGED if evidence.header is not None:
            return COMPLETED
        case Verdict.VANISHED, Proof.UNCHANGED if evidence.process is Sameness.SAME:
            # Any other QEMU says nothing of a job that may still be running elsewhere.
            return CANCELLATION if evidence.intent in ABORTED else (State.FAILED, _vanished())
        case Verdict.GONE, Proof.UNCHANGED if evidence.ended:
            return State.FAILED, domain_gone("while the job ran")
        case _:
            return None


def _vanished() -> Problem:
    detail = "another client of QEMU took the job away; the chain was not merged"
    return Problem(code=Code.JOB_VANISHED, detail=detail)


def domain_gone(when: str) -> Problem:
    """QEMU has ended before the chain was changed."""
    return Problem(
        code=Code.DOMAIN_GONE,
        detail=f"QEMU ended {when}; the chain was not merged. Start the domain from the same active layer and "
        "send the request again.",
    )


def _unknown(spec: LayersSpec, evidence: Evidence, doubt: Callable[[str], str]) -> Problem:
    said = SAID[evidence.verdict] if evidence.verdict else "nothing is known of it"
    detail = f"{doubt(said)} Then tell the service by POST /jobs/{{id}}/resolve. No image was deleted."
    extra = {"active": spec.disk.layers[0].file} | ({} if spec.below is None else {"base": spec.below.file})
    return Problem(code=Code.OUTCOME_UNKNOWN, detail=detail, extra=extra)


def header_doubt(spec: LayersSpec, said: str) -> str:
    """How a person finds out what the header of the layer above leads to."""
    assert spec.above is not None
    above, first = spec.above.file, spec.disk.layers[spec.top_index].file
    now = "no image" if spec.below is None else spec.below.file
    names = "names none" if spec.below is None else "names the base"
    return (
        f"{said}, and the header of {above} does not prove whether it leads to {now}. Look with "
        f"`qemu-img info -U --backing-chain {above}`: if it {names}, the merge is complete; if it still names {first}, "
        "nothing was merged and the chain is as it was."
    )


def pivot_doubt(spec: LayersSpec, said: str) -> str:
    """How a person finds out whether a guest was moved onto the base."""
    active, base = spec.top_file, spec.base_file
    return (
        f"{said}, and nothing proves whether the guest was moved from {active} onto {base}: one of the two has "
        "what it wrote last. Don't start the domain from either before that is known. Find out which of them "
        "QEMU had open for writing last (its log, the times of the files), and compare them with "
        f"`qemu-img compare -U {active} {base}`: if they are identical, both will do."
    )


SAID: Final = {
    Verdict.FINE: "QEMU had concluded it without error",
    Verdict.ERROR: "QEMU had concluded it with an error",
    Verdict.VANISHED: "QEMU did not list it any more",
    Verdict.GONE: "its QEMU had ended",
}
"""QEMU's last word on the job, as the beginning of a sentence."""

SHOWED: Final = {
    Proof.MERGED: "showed the merged layers gone",
    Proof.UNCHANGED: "showed the chain unchanged",
    Proof.UNKNOWN: "proved no outcome",
}


def _because(evidence: Evidence, proof: Proof) -> str:
    if evidence.verdict is None:
        return "nothing was known of it"
    if evidence.verdict is Verdict.ERROR:
        return f"QEMU had concluded it with the error: {evidence.verdict_error}"
    sources = [
        name
        for name, read in (("QEMU's block graph", evidence.graph), ("the overlay's header", evidence.header))
        if read is not None
    ]
    if sources:
        return f"{SAID[evidence.verdict]}; {' and '.join(sources)} {SHOWED[proof]}"
    if evidence.watched:
        return f"{SAID[evidence.verdict]}, and had not said until then that the job was at its end"
    return f"{SAID[evidence.verdict]}; neither its block graph nor a header could be read"
