"""Safe retries: the headers Idempotency-Key and If-Match (RFC 9110, 13.1.1)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Final

import structlog
from fastapi import Header, Response

from app.api.codes import MEDIA_TYPE
from app.api.jobs import job_response
from app.api.problems import invalid_parameter, problem_response
from app.core.errors import Refused
from app.core.job import Job, refusal_of
from app.engine.ports.journal import IdempotencyKey, JournalError, StoredAnswer
from app.engine.service import Service

KEY: Final = re.compile(r"[\x21-\x7e]{1,255}")
"""A key that is well-formed."""

DIGEST: Final = re.compile(r'\s*(?:(?P<any>\*)|(?P<weak>W/)?"(?P<quoted>[^"]*)"|(?P<bare>[^\s",]+))\s*')
"""One member of an `If-Match` header: `*`, an entity tag, or a digest without quotes."""

REPLAYED: Final = "Idempotency-Replayed"
"""The header of an answer that repeats an earlier answer."""

KeyHeader = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="1 to 255 visible ASCII characters; the same request under the same key is served once in 24 h",
    ),
]
IfMatchHeader = Annotated[
    str | None,
    Header(alias="If-Match", description="the disk's `digest`, bare or as its `ETag`; any other chain is refused"),
]

log = structlog.get_logger(__name__)


def request_key(key: str, *, who: str, request: Mapping[str, object]) -> IdempotencyKey:
    """The key with a fingerprint of its request; raises `Refused` if the key is malformed."""
    if not KEY.fullmatch(key):
        raise Refused(invalid_parameter("Idempotency-Key", "expected 1 to 255 visible ASCII characters"))
    text = json.dumps(request, sort_keys=True)
    return IdempotencyKey(who=who, key=key, fingerprint=hashlib.sha256(text.encode()).hexdigest())


def digests(if_match: str | None) -> frozenset[str] | None:
    """The digests that the chain may have; None if it may have any. Raises `Refused` if the header is malformed."""
    if if_match is None:
        return None
    found = [DIGEST.fullmatch(part) for part in if_match.split(",")]
    if not all(found):
        detail = "expected the digest of a disk's chain, such as the disk's ETag"
        raise Refused(invalid_parameter("If-Match", detail))
    parts = [part for part in found if part is not None]
    if any(part["any"] for part in parts):
        return None
    # A weak tag matches nothing here (RFC 9110, 13.1.1: the strong comparison).
    return frozenset(part["quoted"] or part["bare"] or "" for part in parts if not part["weak"])


async def served_once(
    use: Service, key: IdempotencyKey, path: str, serve: Callable[[], Awaitable[Response]]
) -> Response:
    """The answer of `serve`, or the answer to an earlier request under the key. `path` is the path of the request.

    `serve` stores the key together with the job that it makes. A request that was refused is served anew.
    """
    with use.keys.alone(key):
        kept = await use.keys.kept(key)
        if kept is not None:
            answer = _kept_answer(kept) or _answer_of(await use.job(kept.job_id), path)
            if kept.body is None:
                # The service ended after it had stored the job and before it had stored an answer.
                await _keep(use, key, answer)
            answer.headers[REPLAYED] = "true"
            return answer
        answer = await serve()
        await _keep(use, key, answer)
        return answer


async def _keep(use: Service, key: IdempotencyKey, answer: Response) -> None:
    try:
        await use.keys.keep_answer(key, answer.status_code, bytes(answer.body).decode())
    except JournalError as error:
        # The job is stored with its key, so a repeated request gets the job as it is then.
        log.error("answer not kept", error=str(error))


def _kept_answer(kept: StoredAnswer) -> Response | None:
    if kept.status is None or kept.body is None:
        return None
    if kept.status >= 400:
        return Response(kept.body, status_code=kept.status, media_type=MEDIA_TYPE)
    headers = {"Location": f"/jobs/{kept.job_id}", "ETag": f'"{json.loads(kept.body)["version"]}"'}
    return Response(kept.body, status_code=kept.status, headers=headers, media_type="application/json")


def _answer_of(job: Job, path: str) -> Response:
    """The answer that the request for this job would have got."""
    refused = refusal_of(job)
    if refused is not None:
        return problem_response(refused, path)
    return job_response(job, status_code=202, headers={"Location": f"/jobs/{job.id}"})
