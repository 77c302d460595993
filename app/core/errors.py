"""What can be wrong with a request or a job, as values.

A `Problem` is what the caller is told: a request that can't be served is answered with one, and a job that failed
carries one. There is no HTTP in here; `app.api.problems` knows the status of each code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import cast


class Code(StrEnum):
    """Every reason that the service gives, by the name that clients match on."""

    UNAUTHENTICATED = "unauthenticated"
    OPERATION_DENIED = "operation-denied"
    NOT_FOUND = "not-found"
    METHOD_NOT_ALLOWED = "method-not-allowed"
    IDEMPOTENCY_KEY_REUSED = "idempotency-key-reused"
    IDEMPOTENCY_IN_PROGRESS = "idempotency-in-progress"
    HOOK_NOT_FOUND = "hook-not-found"
    SIGNATURE_INVALID = "signature-invalid"
    WEBHOOK_NOT_FOUND = "webhook-not-found"
    WEBHOOK_URL_REFUSED = "webhook-url-refused"
    WEBHOOK_DISABLED = "webhook-disabled"
    DELIVERY_NOT_FOUND = "delivery-not-found"
    PAYLOAD_TOO_LARGE = "payload-too-large"
    TOO_MANY_REQUESTS = "too-many-requests"
    INTERNAL_ERROR = "internal-error"
    SHUTTING_DOWN = "shutting-down"
    JOURNAL_FULL = "journal-full"
    JOURNAL_BUSY = "journal-busy"
    JOURNAL_UNCERTAIN = "journal-uncertain"
    JOURNAL_REPLACED = "journal-replaced"
    JOURNAL_DAMAGED = "journal-damaged"
    JOURNAL_UNREADABLE = "journal-unreadable"

    INVALID_REQUEST = "invalid-request"
    SHALLOW_WITH_BASE = "shallow-with-base"
    DOMAIN_NOT_FOUND = "domain-not-found"
    DOMAIN_MANAGED_ELSEWHERE = "domain-managed-elsewhere"
    MONITOR_UNREACHABLE = "monitor-unreachable"
    MONITOR_BUSY = "monitor-busy"
    NOT_SUPPORTED = "not-supported"
    DISK_NOT_FOUND = "disk-not-found"
    DISK_AMBIGUOUS = "disk-ambiguous"
    DISK_EMPTY = "disk-empty"
    JOB_CONFLICT = "job-conflict"
    TOP_NOT_FOUND = "top-not-found"
    BASE_NOT_FOUND = "base-not-found"
    BASE_NOT_BELOW_TOP = "base-not-below-top"
    NO_BACKING = "no-backing"
    NOTHING_TO_PULL = "nothing-to-pull"
    ACTIVE_FLAG_REQUIRED = "active-flag-required"
    TOP_NOT_ACTIVE = "top-not-active"
    DELETE_WITH_KEEP = "delete-with-keep"
    RELATIVE_IMPOSSIBLE = "relative-impossible"
    TEMPORARY_OVERLAY = "temporary-overlay"
    IMAGE_SHARED = "image-shared"
    IMAGE_LOCKED = "image-locked"
    DOMAIN_MIGRATING = "domain-migrating"
    NODE_IN_USE = "node-in-use"
    IMAGE_READ_ONLY = "image-read-only"
    IMAGE_CORRUPT = "image-corrupt"
    SIZES_UNSAFE = "sizes-unsafe"
    BASE_CANNOT_GROW = "base-cannot-grow"
    OVERLAY_NOT_WRITABLE = "overlay-not-writable"
    BACKING_FILE_IMPOSSIBLE = "backing-file-impossible"
    BACKING_FILE_WRONG = "backing-file-wrong"
    INSUFFICIENT_STORAGE = "insufficient-storage"
    QEMU_ERROR = "qemu-error"

    JOB_NOT_FOUND = "job-not-found"
    JOB_FINISHED = "job-finished"
    JOB_PIVOTING = "job-pivoting"
    JOB_NOT_READY = "job-not-ready"
    JOB_NOT_PIVOTABLE = "job-not-pivotable"
    JOB_NOT_PAUSABLE = "job-not-pausable"
    JOB_NOT_PAUSED = "job-not-paused"
    JOB_NOT_LOST = "job-not-lost"

    CHAIN_CHANGED = "chain-changed"
    DOMAIN_GONE = "domain-gone"
    JOB_VANISHED = "job-vanished"
    NOT_MERGED = "not-merged"
    OUTCOME_UNKNOWN = "outcome-unknown"
    VERIFICATION_FAILED = "verification-failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One reason, in words for a person and with what a program needs.

    `extra` holds JSON values only: members that the code adds, such as `qmp: {"class", "desc"}` with QEMU's own words.
    """

    code: Code
    detail: str
    extra: Mapping[str, object] = field(default_factory=dict[str, object])


class Refused(Exception):
    """A request that can't be served; carries the `Problem` that says why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem.code}: {problem.detail}")
        self.problem = problem


def invalid(pointer: str, detail: str) -> Problem:
    """A request with one wrong field; `pointer` is the field's JSON Pointer (RFC 6901) in the body."""
    return Problem(
        code=Code.INVALID_REQUEST,
        detail=f"{pointer}: {detail}",
        extra={"errors": [{"pointer": pointer, "detail": detail}]},
    )


def invalid_together(problems: Sequence[Problem]) -> Problem:
    """A request with several wrong fields, from what `invalid` says of each."""
    errors = [error for problem in problems for error in cast("list[object]", problem.extra["errors"])]
    return Problem(
        code=Code.INVALID_REQUEST,
        detail="; ".join(problem.detail for problem in problems),
        extra={"errors": errors},
    )


OUT_OF_SPACE = "No space left on device"
"""strerror(ENOSPC), which is all that QEMU says of a job that ran out of space."""

LOCKED = re.compile(r'Failed to get (shared )?"[a-z -]+" lock')
"""How QEMU says that another process has an image open (block/file-posix.c: raw_check_lock_bytes)."""

READ_ONLY = re.compile(r"Block node is read-only|Could not reopen file: ")
"""How QEMU says that it can't open an image for writing (block.c, block/file-posix.c)."""

CANCELED = "Operation canceled"
"""strerror(ECANCELED), QEMU's error of a job that was canceled by force."""


def qemu_problem(error_class: str, desc: str, *, doing: str) -> Problem:
    """What QEMU refused, in its own words; where the reason has a code of ours, under that code.

    `doing` says which command it was. QEMU gives no errno, only text (QAPI `QapiErrorClass`), so the text is what
    is matched; the words are those of block.c, block/file-posix.c and strerror(3).
    """
    qmp = {"qmp": {"class": error_class, "desc": desc}}
    if OUT_OF_SPACE in desc:
        return Problem(code=Code.INSUFFICIENT_STORAGE, detail=f"{doing}: the storage is full: {desc}", extra=qmp)
    if LOCKED.search(desc):
        return Problem(
            code=Code.IMAGE_LOCKED,
            detail=f"{doing}: another process has the image open: {desc}. Stop that process, then try again.",
            extra=qmp,
        )
    code = Code.QEMU_ERROR
    if error_class == "CommandNotFound":
        code = Code.NOT_SUPPORTED
    elif READ_ONLY.search(desc):
        code = Code.IMAGE_READ_ONLY
    elif "is in use by block job" in desc:
        code = Code.JOB_CONFLICT
    elif "Permission conflict on node" in desc and "as 'backing' child" in desc:
        code = Code.IMAGE_SHARED
    return Problem(code=code, detail=f"{doing}: QEMU refused: {desc}", extra=qmp)
