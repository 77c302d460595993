"""The outcome of a job that changes a chain, from QEMU's verdict and from what the chain shows."""

from __future__ import annotations

from app.core.errors import CANCELED, Code, Problem, qemu_problem
from app.core.evidence import Evidence, Judgement, Proof, Verdict
from app.core.kinds.base import Capabilities
from app.core.states import DataState, Intent, State


def judged(evidence: Evidence, proof: Proof, capabilities: Capabilities) -> Judgement:
    """The judgement of a job of those capabilities."""
    state, error = _outcome(evidence, proof, capabilities)
    merged = state is State.COMPLETED and evidence.intent is not Intent.KEEP
    return Judgement(
        state=state,
        error=error,
        data_state=DataState.MERGED if state is State.COMPLETED else None,
        merged=merged,
        durable=evidence.flushed,
        because=_because(evidence, state, merged=merged),
    )


def _outcome(evidence: Evidence, proof: Proof, capabilities: Capabilities) -> tuple[State, Problem | None]:
    aborted = evidence.intent in (Intent.ABORT, Intent.FORCE)
    match evidence.verdict, proof:
        case Verdict.ERROR, _:
            text = evidence.verdict_error or ""
            if text == CANCELED:
                return State.CANCELED, None
            return State.FAILED, qemu_problem("GenericError", text, doing="the job ended with an error")
        case _, Proof.MERGED:
            return State.COMPLETED, None
        case Verdict.FINE, Proof.UNCHANGED if evidence.intent is Intent.KEEP:
            return State.COMPLETED, None
        case Verdict.FINE, Proof.UNCHANGED if capabilities.pivots:
            # A gentle cancel at ready, ours or another client's, ends without error and without pivot.
            return State.CANCELED, None
        case Verdict.FINE, Proof.UNCHANGED:
            detail = "QEMU concluded the job without error, but the chain still holds the layers to be merged"
            return State.FAILED, Problem(code=Code.NOT_MERGED, detail=detail)
        case Verdict.VANISHED, Proof.UNCHANGED if aborted:
            return State.CANCELED, None
        case Verdict.VANISHED, Proof.UNCHANGED if evidence.intent is not Intent.KEEP:
            detail = "another client of QEMU took the job away; the chain was not merged"
            return State.FAILED, Problem(code=Code.JOB_VANISHED, detail=detail)
        case Verdict.GONE, Proof.UNCHANGED if evidence.intent is not Intent.KEEP:
            return State.FAILED, domain_gone("while the job ran")
        case _:
            detail = (
                f"QEMU's last word on the job: {evidence.verdict}; the chain shows: {proof}. "
                "Neither proves whether the layers were merged; no image was deleted."
            )
            return State.LOST, Problem(code=Code.OUTCOME_UNKNOWN, detail=detail)


def domain_gone(when: str) -> Problem:
    """QEMU has ended before the chain was changed."""
    return Problem(
        code=Code.DOMAIN_GONE,
        detail=f"QEMU ended {when}; the chain was not merged. Start the domain from the same active layer and "
        "send the request again.",
    )


def _because(evidence: Evidence, state: State, *, merged: bool) -> str:
    source = "the images' headers" if evidence.verdict is Verdict.GONE else "QEMU's block graph"
    shown = "showed the merged layers gone" if merged else "showed the chain unchanged"
    chain = f"{source} {'and that together prove no outcome' if state is State.LOST else shown}"
    match evidence.verdict:
        case Verdict.FINE:
            return f"QEMU had concluded it without error; {chain}"
        case Verdict.ERROR:
            return f"QEMU had concluded it with the error: {evidence.verdict_error}"
        case Verdict.GONE:
            return f"its QEMU had ended; {chain}"
        case _:
            return f"QEMU did not list it any more; {chain}"
