"""What QEMU says now and what the journal says: the events that bring them together.

Used after each hint, each reconnect and each start. QEMU is believed; events that were missed don't matter.
"""

from __future__ import annotations

import os.path
from collections.abc import Iterable, Mapping
from dataclasses import replace

from app.core.chain import Disk, Identity, Layer
from app.core.job import DataState, Intent, Job, JobType, Process, Proof, State, Verdict
from app.core.machine.inputs import Absent, Gone, Input, Observed

JOB_PREFIX = "bj-"
"""How the ids of all our jobs begin, here and in QEMU."""


def same_process(one: Process | None, other: Process | None) -> bool:
    """Whether both are the same QEMU, as far as can be told; what is not known on one side does not count."""
    if one is None or other is None:
        return True
    pairs = ((one.pid, other.pid), (one.started, other.started), (one.uuid, other.uuid))
    return all(a is None or b is None or a == b for a, b in pairs)


def reconcile(jobs: Iterable[Job], seen: Mapping[str, Observed], process: Process | None) -> list[tuple[Job, Input]]:
    """For each unfinished job what has happened to it, given what the QEMU `process` lists now."""
    found: list[tuple[Job, Input]] = []
    for job in jobs:
        if job.state is State.QUEUED or job.ended:
            continue
        if not same_process(job.process, process):
            found.append((job, Gone()))
        elif job.id in seen:
            found.append((job, replace(seen[job.id], process=process)))
        else:
            found.append((job, Absent()))
    return found


def leftovers(seen: Mapping[str, Observed], jobs: Mapping[str, Job]) -> list[str]:
    """Ids of concluded jobs in QEMU that are ours and have their outcome in the journal: to be dismissed.

    `jobs` are the journal's records of those ids. Others' jobs, and those the journal does not know, are left alone.
    """
    return [id_ for id_, state in seen.items() if state.status == "concluded" and id_ in jobs and jobs[id_].ended]


def strays(seen: Iterable[str], known: Iterable[str]) -> list[str]:
    """Ids of jobs in QEMU that bear our prefix and have no record: `known` are the ids that have one."""
    return sorted(id_ for id_ in set(seen) - set(known) if id_.startswith(JOB_PREFIX))


def how_proven(job: Job) -> str:
    """In words for a person: what the outcome of an ended job was read from."""
    source = "the images' headers" if job.verdict is Verdict.GONE else "QEMU's block graph"
    if job.state is State.LOST:
        chain = f"{source} and that together prove no outcome"
    elif job.state is State.COMPLETED and job.intent is not Intent.KEEP:
        chain = f"{source} showed the merged layers gone"
    else:
        chain = f"{source} showed the chain unchanged"
    said = {
        Verdict.FINE: f"QEMU had concluded it without error; {chain}",
        Verdict.ERROR: f"QEMU had concluded it with the error: {job.verdict_error}",
        Verdict.VANISHED: f"QEMU did not list it any more; {chain}",
        Verdict.GONE: f"its QEMU had ended; {chain}",
    }
    return said[job.verdict] if job.verdict else "it was not in QEMU, and nothing had been merged"


def prove(job: Job, chain: tuple[str, ...], *, nodes: bool) -> Proof:
    """What the disk's chain, read again from QEMU, says of the job.

    `chain` are node-names if `nodes`, else files, active layer first. Other layers may have come on top meanwhile (a
    snapshot right after the merge), so only the job's own layers count: merged, if those above the base are gone and
    the base is there; unchanged, if all are there in their order.
    """
    work = job.work
    before = work.nodes if nodes else work.chain
    merged, base = before[work.top : work.base], before[work.base]
    if base not in chain:
        return Proof.UNKNOWN
    if not set(merged) & set(chain):
        return Proof.MERGED
    start = chain.index(merged[0]) if merged[0] in chain else 0
    unchanged = chain[start : start + len(merged) + 1] == (*merged, base)
    return Proof.UNCHANGED if unchanged else Proof.UNKNOWN


def prove_by_header(job: Job, below: str | None, identity: Identity | None = None) -> Proof:
    """What the images say of a job whose QEMU has ended.

    `below` is the path to which the header of the layer above `top` leads, or None where it can't be read, `identity`
    the file that is there. A header may name a file in other ways than QEMU does (links, `..`).
    A pivot writes no header: after one was asked for, the images alone prove nothing, even if an abort followed. Nor
    do they where QEMU concluded the job without error and nobody here had asked for an end: another client has pivoted,
    or canceled gently.
    """
    if job.type is JobType.ACTIVE_COMMIT:
        asked = job.pivot_asked or job.intent in (Intent.PIVOT, Intent.KEEP)
        foreign_end = job.intent is Intent.RUN and job.verdict is Verdict.FINE
        return Proof.UNKNOWN if asked or foreign_end else Proof.UNCHANGED
    if below is None:
        return Proof.UNKNOWN

    def leads_to(file: str) -> bool:
        same = identity is not None and identity == job.work.identity(file)
        return same or os.path.normpath(below) == os.path.normpath(file)

    if leads_to(job.base):
        return Proof.MERGED
    return Proof.UNCHANGED if leads_to(job.top) else Proof.UNKNOWN


def valid_layers(disk: Disk, jobs: Iterable[Job]) -> tuple[bool, ...]:
    """For each layer of the disk, whether its own contents are what they were when it became a backing image.

    `jobs` are those that have modified a base and have not merged: unfinished, failed, canceled, or ended by `keep`.
    Images between such a job's base and its top show a mixture from then on (virDomainBlockCommit says so of `top`
    too). The active layer is always right: all that was copied down is in it as well.
    """
    valid = [True] * len(disk.layers)
    files = disk.files
    for job in jobs:
        if job.data_state is DataState.UNTOUCHED or job.base not in files:
            continue
        merged = job.work.chain[job.work.top : job.work.base]
        for position, file in enumerate(files[: files.index(job.base)]):
            if position > 0 and file in merged:
                valid[position] = False
    return tuple(valid)


def uses_base(other: Disk, disk: Disk, base: Layer) -> bool:
    """Whether a merge into `base`, a layer of `disk`, changes what `other` reads.

    A disk with the same active layer is the same disk, seen through another registration or before a restart.
    """
    if not other.layers or not any(_same_image(layer, base) for layer in other.layers):
        return False
    return not _same_image(other.layers[0], disk.layers[0])


def _same_image(one: Layer, other: Layer) -> bool:
    if one.identity is not None and other.identity is not None:
        return one.identity == other.identity
    return one.file == other.file
