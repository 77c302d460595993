"""What each code of a problem means over HTTP, as one table, and what is generated from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from app.core.errors import Code

MEDIA_TYPE: Final = "application/problem+json"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a code means: its status, its title, libvirt's error for the same thing, and what the caller can do."""

    status: int
    title: str
    libvirt: str | None
    remedy: str


KINDS: Final[Mapping[Code, Kind]] = {
    Code.UNAUTHENTICATED: Kind(
        401,
        "Not authenticated",
        "VIR_ERR_AUTH_FAILED",
        "Send `Authorization: Bearer TOKEN` with a token that `blockjobd token list` shows.",
    ),
    Code.OPERATION_DENIED: Kind(
        403, "Operation denied", "VIR_ERR_OPERATION_DENIED", "Use a token of the role that `detail` names."
    ),
    Code.NOT_FOUND: Kind(404, "No such route", None, "Compare the path with `/openapi.json`."),
    Code.METHOD_NOT_ALLOWED: Kind(405, "Method not allowed", None, "Use a method of the `Allow` header."),
    Code.IDEMPOTENCY_KEY_REUSED: Kind(
        422, "Idempotency key reused", None, "Choose a new key for each new request, and the old one to repeat it."
    ),
    Code.IDEMPOTENCY_IN_PROGRESS: Kind(
        409, "Request is still being answered", None, "Send the same request again after `Retry-After` seconds."
    ),
    Code.HOOK_NOT_FOUND: Kind(404, "No such hook", None, "Compare the name with `[hooks.NAME]` in the configuration."),
    Code.SIGNATURE_INVALID: Kind(
        401, "Signature invalid", None, "Give sender and service the same secret, and let their clocks agree."
    ),
    Code.WEBHOOK_NOT_FOUND: Kind(404, "No such webhook", None, "Compare the id with `GET /webhooks`."),
    Code.WEBHOOK_URL_REFUSED: Kind(
        422, "Webhook URL refused", None, "Choose a public address, or have its network listed in `webhook_allow`."
    ),
    Code.WEBHOOK_DISABLED: Kind(
        409, "Webhook disabled", None, "See to its receiver, then `POST /webhooks/{id}/enable`."
    ),
    Code.DELIVERY_NOT_FOUND: Kind(
        404, "No such delivery", None, "Compare the id with `GET /webhooks/{id}/deliveries`."
    ),
    Code.PAYLOAD_TOO_LARGE: Kind(413, "Payload too large", None, "Send a body of at most 1 MiB."),
    Code.TOO_MANY_REQUESTS: Kind(
        429, "Too many requests", None, "Close streams that are not needed, or come back later."
    ),
    Code.INTERNAL_ERROR: Kind(
        500,
        "Internal error",
        "VIR_ERR_INTERNAL_ERROR",
        "Look for the `request_id` in the service's log, and report it.",
    ),
    Code.SHUTTING_DOWN: Kind(503, "Shutting down", None, "Try again once the service is back."),
    Code.JOURNAL_FULL: Kind(
        507, "Journal full", None, "Make space on the file system of `state_dir`. Nothing was started or changed."
    ),
    Code.JOURNAL_BUSY: Kind(
        503,
        "Journal is locked",
        None,
        "Find the other program that has `state_dir/journal.sqlite3` locked, and end it. Nothing was changed.",
    ),
    Code.JOURNAL_UNCERTAIN: Kind(
        503,
        "Journal failed in between",
        None,
        "Repeat the request under the same `Idempotency-Key`: after a power failure it may turn out to be stored.",
    ),
    Code.JOURNAL_REPLACED: Kind(
        503,
        "Journal was taken away",
        None,
        "Put the files of `state_dir` back, or stop the service and use `blockjobd journal restore`.",
    ),
    Code.JOURNAL_DAMAGED: Kind(
        503, "Journal is damaged", None, "Stop the service, keep the files, and use `blockjobd journal restore`."
    ),
    Code.JOURNAL_UNREADABLE: Kind(503, "Journal can't be read", None, "Look at the file system of `state_dir`."),
    Code.INVALID_REQUEST: Kind(
        422,
        "Invalid request",
        "VIR_ERR_INVALID_ARG",
        "`errors` names each wrong field by JSON Pointer, or each wrong parameter.",
    ),
    Code.SHALLOW_WITH_BASE: Kind(
        422, "Shallow and base exclude each other", "VIR_ERR_INVALID_ARG", "Leave out `base` or the flag `shallow`."
    ),
    Code.DOMAIN_NOT_FOUND: Kind(
        404, "No such domain", "VIR_ERR_NO_DOMAIN", "Choose one of `GET /domains`, or register it with `PUT`."
    ),
    Code.DOMAIN_MANAGED_ELSEWHERE: Kind(
        409,
        "Domain managed elsewhere",
        None,
        "Use its own manager, or register the domain with `allow_managed: true`.",
    ),
    Code.MONITOR_UNREACHABLE: Kind(
        503, "Monitor unreachable", "VIR_ERR_OPERATION_INVALID", "Check that QEMU runs and that its socket is there."
    ),
    Code.MONITOR_BUSY: Kind(
        503,
        "Monitor busy",
        "VIR_ERR_OPERATION_TIMEOUT",
        "Disconnect the other client, or give QEMU a second monitor for the service.",
    ),
    Code.NOT_SUPPORTED: Kind(
        501, "Not supported", "VIR_ERR_OPERATION_UNSUPPORTED", "Connect to a QEMU that has the commands."
    ),
    Code.DISK_NOT_FOUND: Kind(
        404, "No such disk", "VIR_ERR_INVALID_ARG", "Choose one of `GET /domains/{domain}/disks`."
    ),
    Code.DISK_AMBIGUOUS: Kind(
        409, "Disk ambiguous", "VIR_ERR_INVALID_ARG", "Name the disk by its target name, which only one has."
    ),
    Code.DISK_EMPTY: Kind(
        409, "Disk without medium", "VIR_ERR_CONFIG_UNSUPPORTED", "Insert a medium, or choose another disk."
    ),
    Code.JOB_CONFLICT: Kind(
        409, "Another job is on the disk", "VIR_ERR_BLOCK_COPY_ACTIVE", "Wait for the end of `job`, or abort it."
    ),
    Code.TOP_NOT_FOUND: Kind(422, "Top not in the chain", "VIR_ERR_INVALID_ARG", "Name a layer of the disk's `chain`."),
    Code.BASE_NOT_FOUND: Kind(
        422, "Base not in the chain", "VIR_ERR_INVALID_ARG", "Name a layer of the disk's `chain`."
    ),
    Code.BASE_NOT_BELOW_TOP: Kind(
        422, "Base not below top", "VIR_ERR_INVALID_ARG", "Name a layer with a higher `index` than `top` has."
    ),
    Code.NOTHING_TO_PULL: Kind(
        422, "Nothing to pull", "VIR_ERR_INVALID_ARG", "Choose a `top` and a `base` with other layers between them."
    ),
    Code.NO_BACKING: Kind(422, "Nothing below top", "VIR_ERR_INVALID_ARG", "Choose a `top` that has a layer below it."),
    Code.ACTIVE_FLAG_REQUIRED: Kind(
        422,
        "Flag active required",
        "VIR_ERR_INVALID_ARG",
        "Add the flag `active`; the job then waits at `ready` for a pivot.",
    ),
    Code.TOP_NOT_ACTIVE: Kind(
        422,
        "Top is not the active layer",
        "VIR_ERR_INVALID_ARG",
        "Leave out `active` and `on_ready`, or let `top` be null.",
    ),
    Code.DELETE_WITH_KEEP: Kind(
        422,
        "Delete and keep exclude each other",
        "VIR_ERR_INVALID_ARG",
        "Leave out the flag `delete` or `on_ready: keep`.",
    ),
    Code.RELATIVE_IMPOSSIBLE: Kind(
        422,
        "Names can't be kept relative",
        "VIR_ERR_OPERATION_INVALID",
        "Leave out the flag `relative`, or give `backing_file`.",
    ),
    Code.TEMPORARY_OVERLAY: Kind(
        409,
        "Active layer is temporary",
        "VIR_ERR_OPERATION_UNSUPPORTED",
        "Restart the domain without `-snapshot` to merge its layers.",
    ),
    Code.IMAGE_SHARED: Kind(
        409, "Base is shared", None, "Merge into a layer that nobody else has, or give up the other overlay first."
    ),
    Code.IMAGE_LOCKED: Kind(409, "Image is locked", None, "Stop the process that has the image open."),
    Code.DOMAIN_MIGRATING: Kind(
        409,
        "Domain is being migrated",
        "VIR_ERR_OPERATION_INVALID",
        "Wait until the migration is over, and send the request to the QEMU that runs the guest then.",
    ),
    Code.NODE_IN_USE: Kind(
        409, "Node is in use", "VIR_ERR_OPERATION_INVALID", "End the export, backup or filter that `detail` names."
    ),
    Code.IMAGE_READ_ONLY: Kind(
        409,
        "Image is read-only",
        "VIR_ERR_OPERATION_INVALID",
        "Let QEMU open the image for writing, then try again.",
    ),
    Code.IMAGE_CORRUPT: Kind(
        409, "Image is corrupt", "VIR_ERR_OPERATION_INVALID", "Repair the image with `qemu-img check -r`, offline."
    ),
    Code.SIZES_UNSAFE: Kind(
        409,
        "Sizes are unsafe",
        "VIR_ERR_OPERATION_INVALID",
        "Choose other layers, or grow the short image first: QEMU would change what the guest reads.",
    ),
    Code.BASE_CANNOT_GROW: Kind(
        409,
        "Base can't grow",
        "VIR_ERR_OPERATION_INVALID",
        "Grow the base yourself to the size that `detail` names, then try again.",
    ),
    Code.OVERLAY_NOT_WRITABLE: Kind(
        409,
        "Overlay is not writable",
        "VIR_ERR_OPERATION_INVALID",
        "Give QEMU the right to write to the overlay, whose header has to change.",
    ),
    Code.BACKING_FILE_IMPOSSIBLE: Kind(
        422,
        "No name for the base",
        "VIR_ERR_OPERATION_INVALID",
        "Give `backing_file`, or attach the disk again under names that a header can hold.",
    ),
    Code.BACKING_FILE_WRONG: Kind(
        422,
        "Name does not lead to the base",
        "VIR_ERR_INVALID_ARG",
        "Give a name that leads from the overlay's folder to the base, or leave `backing_file` out.",
    ),
    Code.INSUFFICIENT_STORAGE: Kind(
        507, "Insufficient storage", None, "Make `needed` bytes free, or merge fewer layers."
    ),
    Code.QEMU_ERROR: Kind(502, "QEMU refused", "VIR_ERR_INTERNAL_ERROR", "`qmp` has QEMU's own words."),
    Code.JOB_NOT_FOUND: Kind(404, "No such job", "VIR_ERR_INVALID_ARG", "Choose one of `GET /jobs`."),
    Code.JOB_FINISHED: Kind(409, "Job has ended", "VIR_ERR_INVALID_ARG", "Read its outcome with `GET /jobs/{id}`."),
    Code.JOB_PIVOTING: Kind(
        409, "Job is pivoting", "VIR_ERR_OPERATION_INVALID", "Wait for its end; it can't be aborted now."
    ),
    Code.JOB_NOT_READY: Kind(409, "Job is not ready", "VIR_ERR_BLOCK_COPY_ACTIVE", "Wait for the event `job.ready`."),
    Code.JOB_NOT_PIVOTABLE: Kind(
        409, "Job has no pivot", "VIR_ERR_OPERATION_INVALID", "Wait for its end; only merges of the active layer pivot."
    ),
    Code.JOB_NOT_PAUSABLE: Kind(409, "Job can't be paused", None, "Look at the job's `actions`."),
    Code.JOB_NOT_PAUSED: Kind(409, "Job is not paused", None, "Look at the job's `actions`."),
    Code.JOB_NOT_LOST: Kind(
        409,
        "Job is not lost",
        "VIR_ERR_OPERATION_INVALID",
        "Read its outcome with `GET /jobs/{id}`.",
    ),
    Code.CHAIN_CHANGED: Kind(412, "Chain has changed", None, "Read the disk again, and decide anew."),
    Code.DOMAIN_GONE: Kind(
        502,
        "Domain is gone",
        "VIR_ERR_OPERATION_FAILED",
        "Start the domain from the same active layer and send the request again.",
    ),
    Code.JOB_VANISHED: Kind(
        409, "Job was taken away", None, "Find the other client of the monitor; then send the request again."
    ),
    Code.NOT_MERGED: Kind(
        502, "Chain was not merged", "VIR_ERR_OPERATION_FAILED", "Read the disk's chain, and send the request again."
    ),
    Code.OUTCOME_UNKNOWN: Kind(
        502, "Outcome unknown", None, "Compare the disk's chain with the job's; `detail` says what is known."
    ),
    Code.VERIFICATION_FAILED: Kind(
        502,
        "Verification failed",
        None,
        "Keep every image: the base does not show what the merged layers do. `detail` says where.",
    ),
}
"""The meaning of every code. The last five codes only occur as the `error` of a job."""

NOT_READY: Final = "not-ready"
"""The code of a failing `/readyz`. No request is refused with it, so `KINDS` has no row for it."""


def refusals(*codes: Code) -> dict[int | str, dict[str, Any]]:
    """The `codes` an operation may answer with, as OpenAPI responses, one response for each status."""
    responses: dict[int | str, dict[str, Any]] = {}
    for status in sorted({KINDS[code].status for code in codes}):
        names = [code.value for code in dict.fromkeys(codes) if KINDS[code].status == status]
        schema = {
            "allOf": [{"$ref": "#/components/schemas/ProblemOut"}, {"properties": {"code": {"enum": names}}}],
        }
        responses[status] = {
            "description": ", ".join(f"`{name}`" for name in names),
            "content": {MEDIA_TYPE: {"schema": schema}},
        }
    return responses


def problems_page() -> str:
    """The text of `openapi/problems.md`: every code, its status, libvirt's name for it, and what to do."""
    lines = [
        "# Problems",
        "",
        "Every error is `application/problem+json` with `type`, `title`, `status`, `detail`, `code` and `instance`,",
        "with `libvirt` where libvirt has an error for the same thing, and with what the code adds. `detail` is for",
        "people, `code` for programs. This page is made by `python -m app.api.document`.",
        "",
        "| code | status | means | libvirt | what to do |",
        "|---|---|---|---|---|",
    ]
    for code, kind in KINDS.items():
        libvirt = f"`{kind.libvirt}`" if kind.libvirt else ""
        lines.append(f"| `{code.value}` | {kind.status} | {kind.title} | {libvirt} | {kind.remedy} |")
    lines += [
        f"| `{NOT_READY}` | 503 | Not ready | | Only from `/readyz`: `checks` names what fails, and why. |",
        "",
        "`domain-gone`, `job-vanished`, `not-merged`, `outcome-unknown` and `verification-failed` are found as `error`",
        "of a job; the request for such a job is answered with 200, as the request itself did not fail.",
    ]
    return "\n".join(lines) + "\n"
