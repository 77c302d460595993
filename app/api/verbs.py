"""What is asked of a disk: the verbs, the bodies of their requests, and how such a request is answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from fastapi import Response

from app.api.bodies import CommitIn, PullIn
from app.api.idempotency import digests, request_key, served_once
from app.api.jobs import job_response
from app.api.requests import CHANGES
from app.api.schemas.plans import plan_out
from app.core.errors import Code, Problem, Refused
from app.core.kinds import KINDS
from app.engine.ports.journal import IdempotencyKey
from app.engine.ports.outbox import Webhook
from app.engine.service import Service

MONITOR: Final = (Code.DOMAIN_NOT_FOUND, Code.MONITOR_UNREACHABLE, Code.MONITOR_BUSY)
"""What any request that needs the domain's monitor may be refused with."""

DISK: Final = (*MONITOR, Code.DISK_NOT_FOUND, Code.DISK_AMBIGUOUS)
"""What any request for one disk may be refused with."""

_JOB: Final = (
    *CHANGES,
    *DISK,
    Code.DOMAIN_MANAGED_ELSEWHERE,
    Code.NOT_SUPPORTED,
    Code.DISK_EMPTY,
    Code.CHAIN_CHANGED,
    Code.IDEMPOTENCY_KEY_REUSED,
    Code.IDEMPOTENCY_IN_PROGRESS,
    Code.WEBHOOK_URL_REFUSED,
    Code.JOB_CONFLICT,
    Code.TOP_NOT_FOUND,
    Code.BASE_NOT_FOUND,
    Code.BASE_NOT_BELOW_TOP,
    Code.RELATIVE_IMPOSSIBLE,
    Code.TEMPORARY_OVERLAY,
    Code.IMAGE_LOCKED,
    Code.DOMAIN_MIGRATING,
    Code.IMAGE_READ_ONLY,
    Code.IMAGE_CORRUPT,
    Code.OVERLAY_NOT_WRITABLE,
    Code.BACKING_FILE_IMPOSSIBLE,
    Code.BACKING_FILE_WRONG,
    Code.INSUFFICIENT_STORAGE,
    Code.QEMU_ERROR,
)

COMMIT: Final = (
    *_JOB,
    Code.SHALLOW_WITH_BASE,
    Code.NO_BACKING,
    Code.ACTIVE_FLAG_REQUIRED,
    Code.TOP_NOT_ACTIVE,
    Code.DELETE_WITH_KEEP,
    Code.IMAGE_SHARED,
    Code.NODE_IN_USE,
    Code.SIZES_UNSAFE,
    Code.BASE_CANNOT_GROW,
)
"""What a commit may be refused with."""

PULL: Final = (*_JOB, Code.NOTHING_TO_PULL)
"""What a pull may be refused with."""

Body = CommitIn | PullIn

BODIES: Final[Mapping[str, type[Body]]] = {"commit": CommitIn, "pull": PullIn}
"""The bodies of requests, by verb; a verb is the name of a kind (`app.core.kinds.KINDS`)."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for a job: the verb, the disk, the body, and the header `If-Match`."""

    verb: str
    domain: str
    disk: str
    body: Body
    if_match: str | None = None

    def request(self) -> Any:
        """The request as the kind takes it; raises `Refused`."""
        made = KINDS[self.verb].request(**self.body.model_dump(exclude={"callback"}))
        if isinstance(made, Problem):
            raise Refused(made)
        return replace(made, digests=digests(self.if_match))


async def answer_job(use: Service, asked: Asked, who: str, *, key: str | None, path: str, dry_run: bool) -> Response:
    """The answer to a request for a job by `who`: the job, or the plan. `key` is the header `Idempotency-Key`."""
    request = asked.request()
    if dry_run:
        await _made_callback(use, asked.body, who)
        plan = plan_out(await use.plan(asked.verb, asked.domain, asked.disk, request))
        return Response(plan.model_dump_json(), media_type="application/json")
    once = None
    if key is not None:
        told = {"domain": asked.domain, "disk": asked.disk, "if_match": asked.if_match}
        verb = {} if asked.verb == "commit" else {"verb": asked.verb}
        once = request_key(key, who=who, request=told | {"body": asked.body.model_dump(mode="json")} | verb)

    async def serve() -> Response:
        return await started(use, asked, who, once)

    return await serve() if once is None else await served_once(use, once, path, serve)


async def started(use: Service, asked: Asked, who: str, key: IdempotencyKey | None) -> Response:
    """Start the job, and answer with it; raises `Refused`."""
    callback = await _made_callback(use, asked.body, who)
    job = await use.start(asked.verb, asked.domain, asked.disk, asked.request(), who=who, key=key, callback=callback)
    return job_response(job, status_code=202, headers={"Location": f"/jobs/{job.id}"})


async def _made_callback(use: Service, body: Body, who: str) -> Webhook | None:
    """The webhook of a job that is still to be made, or None; raises `Refused` if its URL may not be sent to."""
    if body.callback is None:
        return None
    return await use.webhooks.made(body.callback.url, (), body.callback.secret, who=who, pointer="/callback/url")
