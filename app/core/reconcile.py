"""What QEMU says now and what the journal says: the inputs that bring them together.

Used after each hint, each reconnect and each start. QEMU is believed; events that were missed don't matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from app.core.evidence import Process, same_process
from app.core.job import Job
from app.core.machine.inputs import Absent, Gone, Input, Observed
from app.core.sameness import Sameness
from app.core.states import State

JOB_PREFIX: Final = "bj-"
"""How the ids of all our jobs begin, here and in QEMU."""


def reconcile(jobs: Iterable[Job], seen: Mapping[str, Observed], process: Process | None) -> list[tuple[Job, Input]]:
    """For each unfinished job what has happened to it, given what the QEMU `process` lists now."""
    found: list[tuple[Job, Input]] = []
    for job in jobs:
        if job.state is State.QUEUED or job.ended:
            continue
        if same_process(job.control.process, process) is Sameness.OTHER:
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


def orphans(seen: Iterable[str], known: Iterable[str]) -> list[str]:
    """Ids of jobs in QEMU that bear our prefix and have no record: `known` are the ids that have one."""
    return sorted(id_ for id_ in set(seen) - set(known) if id_.startswith(JOB_PREFIX))


def how_proven(job: Job) -> str:
    """In words for a person: what the outcome of an ended job was read from."""
    judgement = job.control.judgement
    return judgement.because if judgement else "it was not in QEMU, and nothing had been merged"
