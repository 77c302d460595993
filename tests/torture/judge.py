"""Says what in a round's record is not as it has to be. Pure: it looks at nothing but the record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Final

from tests.support.service import ENDED
from tests.torture.records import DomainEnd, Record, Reply, Request

JSON = dict[str, Any]
Chain = tuple[str, ...]

ENDINGS: Final = frozenset(f"job.{state}" for state in ENDED)
_OUT: Final = ENDINGS | {"job.aborting"}
NEXT: Final = {
    "": {"job.queued"},
    "job.queued": {"job.started", "job.failed", "job.canceled", "job.lost"},
    "job.started": {"job.paused", "job.ready"} | _OUT,
    "job.paused": {"job.resumed", "job.paused", "job.ready"} | _OUT,
    "job.resumed": {"job.paused", "job.ready"} | _OUT,
    "job.ready": {"job.pivoting", "job.paused"} | _OUT,
    "job.pivoting": {"job.ready"} | ENDINGS,
    "job.aborting": ENDINGS,
}
"""What may follow each event of a job."""

REFUSALS: Final = frozenset(
    {
        "job-conflict",  # two requests for one disk
        "monitor-unreachable",
        "monitor-busy",
        "domain-not-found",  # its QEMU has ended, and its socket is gone
        "base-not-found",  # the chain is shorter by then
        "base-not-below-top",
        "no-backing",
        "nothing-to-pull",
        "top-not-found",
        "active-flag-required",
        "image-shared",
        "shutting-down",
        "job-finished",
        "job-not-found",
        "job-not-ready",
        "job-not-pivotable",
        "job-not-pausable",
        "job-not-paused",
        "job-pivoting",
        "chain-changed",
    }
)
"""The codes with which a request may be refused here."""


def judge(record: Record) -> list[str]:
    """The violations, in words; none if all is as it has to be."""
    return [
        *record.troubles,
        *_judge_requests(record.requests, record.jobs, record.histories),
        *_judge_replies([*record.replies]),
        *_judge_stream(record),
        *(found for job in record.jobs for found in _judge_job(job, record)),
        *(found for end in record.ends for found in _judge_domain(end, record)),
    ]


def _of(jobs: Sequence[JSON], ids: Sequence[str]) -> list[JSON]:
    return [job for job in jobs if job["id"] in ids]


def _judge_requests(requests: Sequence[Request], jobs: Sequence[JSON], histories: Any) -> Iterator[str]:
    # The first event has the speed that was asked for; a later one may have changed it.
    asked = {job["id"]: _first(histories, job)["bandwidth"] for job in jobs}
    speeds = {request.speed for request in requests}
    for job_id, speed in asked.items():
        if speed not in speeds:
            yield f"{job_id}: nobody asked for it"
    for request in requests:
        yield from _judge_request(request, [job for job in jobs if asked[job["id"]] == request.speed])


def _judge_request(request: Request, mine: Sequence[JSON]) -> Iterator[str]:
    """`mine` are the request's jobs: one if it was accepted, and none or one if nobody knows."""
    if len(mine) > 1:
        yield f"the request {request.body} has several jobs: {[job['id'] for job in mine]}"
    if request.status == 202:
        if [job["id"] for job in mine] != [request.answer["id"]]:
            yield f"the job {request.answer['id']} of an accepted request is not in the journal"
    elif request.status is not None:
        if request.answer.get("code") not in REFUSALS:
            yield f"{request.domain}: {request.body} was answered {request.status} {request.answer}"
        for job in mine:
            if job["state"] != "failed" or request.answer.get("job") != job["id"]:
                yield f"{job['id']}: its request was refused with {request.status}, and it is {job['state']}"


def _first(histories: Any, job: JSON) -> JSON:
    events = histories.get(job["id"], [])
    return events[0]["data"] if events else job


def _judge_replies(replies: Sequence[Reply]) -> Iterator[str]:
    for reply in replies:
        if reply.status not in (None, 200, 202) and reply.answer.get("code") not in REFUSALS:
            yield f"{reply.domain}: {reply.what} was answered {reply.status} {reply.answer}"


def _judge_stream(record: Record) -> Iterator[str]:
    last = record.after
    for event in record.streamed:
        number = int(event["id"])
        if number <= last:
            yield f"event {number} came after {last}"
        elif number != last + 1:
            yield f"events {last + 1} to {number - 1} did not come"
        last = max(last, number)
    streamed = [(int(event["id"]), event["event"]) for event in record.streamed]
    if streamed != record.journal:
        differing = sorted(set(streamed) ^ set(record.journal))
        yield f"the stream and the journal are not the same: {differing or 'the order'}"
    for job in record.jobs:
        got = [event["data"] for event in record.streamed if event["data"].get("subject") == f"jobs/{job['id']}"]
        if got != record.histories.get(job["id"], []):
            yield f"{job['id']}: the stream and the history are not the same"


def _judge_job(job: JSON, record: Record) -> Iterator[str]:
    history = record.histories.get(job["id"], [])
    meddled = any(end.meddled for end in record.ends if job["id"] in end.jobs)
    types = [event["type"] for event in history]
    for before, after in zip(["", *types], types, strict=False):
        if after not in NEXT.get(before, ()):
            yield f"{job['id']}: {after} after {before or 'nothing'}"
    if job["state"] not in ENDED:
        yield f"{job['id']}: it has not ended, it is {job['state']}"
    if not types or types[-1] != f"job.{job['state']}":
        yield f"{job['id']}: it is {job['state']}, and its events are {types}"
    versions = [event["data"]["version"] for event in history]
    if any(b <= a for a, b in pairwise(versions)):
        yield f"{job['id']}: its versions do not rise: {versions}"
    if history and history[-1]["data"] != job:
        yield f"{job['id']}: its last event does not show what it is"
    if job["state"] == "completed":
        # Another client may complete a job before the service has seen that it is ready.
        ready = ["job.ready"] if job["type"] == "active-commit" and not meddled else []
        needed = ["job.started", *ready]
        if missing := [type_ for type_ in needed if type_ not in types]:
            yield f"{job['id']}: completed without {missing}"
    if job["state"] in ("failed", "lost") and job["error"] is None:
        yield f"{job['id']}: {job['state']} without an error"


def chains_after(chain: Chain, jobs: Sequence[JSON], *, meddled: bool = False) -> list[Chain]:
    """The chains that the ended jobs allow for, given the one before them, and the jobs' order.

    Only a lost job allows for two. A completed one whose layers are not there to be merged allows for none.
    `meddled`: another client may have had a lost job pivot that was to keep its overlay.
    """
    return chains_after_all([chain], jobs, meddled=meddled)


def chains_after_all(chains: Sequence[Chain], jobs: Sequence[JSON], *, meddled: bool = False) -> list[Chain]:
    """As `chains_after`, where several chains are possible before."""
    possible = list(chains)
    for job in jobs:
        following: list[Chain] = []
        may_merge = merges(job) or (meddled and job["state"] == "lost")
        for before in possible:
            if job["state"] != "completed" or not merges(job):
                following.append(before)
            if may_merge and job["state"] in ("completed", "lost") and {job["top"], job["base"]} <= {*before, None}:
                # A pull leaves its topmost layer where it is, and may leave nothing below that.
                top = before.index(job["top"]) + (job["type"] == "pull")
                base = len(before) if job["base"] is None else before.index(job["base"])
                following.append(before[:top] + before[base:])
        possible = following
    return possible


def merges(job: JSON) -> bool:
    """Whether the job, if it completes, takes layers out of the chain."""
    return job["on_ready"] != "keep"


def _judge_domain(end: DomainEnd, record: Record) -> Iterator[str]:
    jobs = _of(record.jobs, end.jobs)
    if end.in_qemu:
        yield f"{end.name}: QEMU still has {end.in_qemu}"
    # Whoever can't see that a QEMU has ended starts on the same images what the one that answers does not have.
    often = {job_id: times for job_id, times in end.runs.items() if times > 1 and not (end.blind and end.qemu_ended)}
    yield from (f"{job_id}: it was run {times} times" for job_id, times in often.items())
    if end.graph != end.headers:
        yield f"{end.name}: QEMU has the chain {end.graph}, the headers {end.headers}"
    allowed = chains_after(end.images, jobs, meddled=end.meddled)
    if end.graph not in allowed:
        yield f"{end.name}: the chain is {end.graph}, the jobs allow for {allowed}"
    before = [end.images]
    for job in jobs:
        after = chains_after_all(before, [job], meddled=end.meddled)
        yield from _judge_result(end, job, before, after)
        if job["state"] == "lost" and not _may_be_lost(job, end):
            yield f"{job['id']}: lost although its outcome can be proven"
        before = after
    gone: set[str] = {file for job in jobs if job["result"] for file in job["result"]["deleted"]}
    if missing := [file for file in end.images if file not in end.there and file not in gone]:
        yield f"{end.name}: deleted without being told: {missing}"
    if left := sorted(gone & end.there):
        yield f"{end.name}: told to be deleted, and there: {left}"
    if lacking := [file for file in end.graph if file not in end.there]:
        yield f"{end.name}: deleted and still in the chain: {lacking}"


def _may_be_lost(job: JSON, end: DomainEnd) -> bool:
    """Whether nothing can tell how the job ended.

    A merge of the active layer writes no header: where QEMU has ended, and nobody has heard it to its end, or another
    client has taken the job away, the images don't tell whether it has pivoted. Below the active layer the header
    tells, unless the service does not see whose it is. After a pull it does not tell whether the data was on the disk.
    """
    unsure = end.qemu_ended or end.meddled
    return unsure and (job["type"] in ("active-commit", "pull") or end.blind)


def _judge_result(end: DomainEnd, job: JSON, before: Sequence[Chain], after: Sequence[Chain]) -> Iterator[str]:
    result = job["result"]
    if result is None:
        if job["state"] == "completed":
            yield f"{job['id']}: completed without a result"
        return
    if tuple(result["chain"]) not in after:
        yield f"{job['id']}: {job['state']}, and its result has the chain {result['chain']} and not {after}"
    deletes: Chain = ()
    if job["state"] == "completed" and "delete" in job["flags"]:
        deletes = next((c[c.index(job["top"]) : c.index(job["base"])] for c in before if job["top"] in c), ())
    kept = result["not_deleted"]
    # Where QEMU has ended or can't be seen, or another client has ended the job, nobody can say whether the base is
    # whole on the disk, or what QEMU may delete.
    left = {each["file"] for each in kept} if end.qemu_ended or end.meddled or end.blind else set[str]()
    if sorted(result["deleted"]) != sorted(file for file in deletes if file not in left):
        yield f"{job['id']}: deleted {result['deleted']} (kept {kept}) where {list(deletes)} were to be"
