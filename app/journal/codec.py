"""Jobs and registrations as JSON text, and back without loss."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

from pydantic import TypeAdapter

from app.core.errors import Code
from app.core.job import Job
from app.engine.ports.journal import JournalError, Registration

_JOB: Final = TypeAdapter(Job)
_REGISTRATION: Final = TypeAdapter(Registration)

FLAT: Final = "work"
"""A member that only the first layout has, in which a job was one flat record of a commit (release 0.1)."""

CONTROL: Final = {
    "intent": "intent",
    "pivot_asked": "pivot_asked",
    "pause_wanted": "pause_wanted",
    "unconfirmed": "unconfirmed",
    "start_again": "start_again",
    "rejection": "rejection",
    "process": "process",
    "complete_taken": "pivot_taken",
    "complete_attempts": "pivot_attempts",
    "verdict": "verdict",
    "verdict_error": "verdict_error",
}
"""What stands in `Job.control` by now, by its name in the first layout."""


def encode_job(job: Job) -> str:
    """The JSON text of a job, with every field."""
    return _JOB.dump_json(job).decode()


def decode_job(text: str) -> Job:
    """The job of which `text` tells; fields that an older release did not write get their defaults.

    Raises `JournalError` where it tells of none.
    """
    with _telling(f"a job: {text[:200]}"):
        return _job(text)


def _job(text: str) -> Job:
    # The text of a job of today is not parsed twice: a member of that name can't stand in it as a key.
    if f'"{FLAT}":' not in text:
        return _JOB.validate_json(text)
    body: dict[str, Any] = json.loads(text)
    return _JOB.validate_python(_from_flat(body), strict=False) if FLAT in body else _JOB.validate_json(text)


def _from_flat(old: dict[str, Any]) -> dict[str, Any]:
    """A job of the first layout in today's: envelope, spec of a commit, control."""
    work = old.pop(FLAT)
    for name in ("type", "top", "base", "overlay"):
        # They follow from the spec.
        del old[name]
    files, nodes = work["chain"], work["nodes"]
    # Jobs of the first months have no identities.
    identities = work.get("identities") or [None] * len(files)
    spec = {
        "kind": "commit",
        "layout": 1,
        "disk": {
            "node": work["disk_node"],
            "qdev": work["qdev"],
            "backend": work["backend"],
            "digest": work["digest"],
            "layers": [
                {"file": file, "node": node, "identity": identity}
                for file, node, identity in zip(files, nodes, identities, strict=True)
            ],
        },
        "top_index": work["top"],
        "base_index": work["base"],
        "flags": old.pop("flags"),
        **{name: work[name] for name in ("backing_file", "release", "invalidates", "deletes")},
        "undeletable": work.get("undeletable", ()),
    }
    control = {new: old.pop(name) for name, new in CONTROL.items() if name in old}
    ending = old.pop("ending", None)
    if ending is not None:
        merged = ending == "completed" and control.get("intent") != "keep"
        # Where the merge was not known to be on the disk, the deletions had been taken out of the work already.
        control["judgement"] = {
            "state": ending,
            "error": old.get("error"),
            "data_state": old.get("data_state"),
            "merged": merged,
            "durable": True,
            "because": f"a release before this one judged it by QEMU's last word: {control.get('verdict')}",
        }
    return {**old, "spec": spec, "control": control}


def encode_registration(registration: Registration) -> str:
    """The JSON text of a registration."""
    return _REGISTRATION.dump_json(registration).decode()


def decode_registration(text: str) -> Registration:
    """The registration of which `text` tells; raises `JournalError` where it tells of none."""
    with _telling(f"a registration: {text[:200]}"):
        return _REGISTRATION.validate_json(text)


@contextmanager
def _telling(what: str) -> Generator[None]:
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        detail = f"the journal holds what can't be read as {what}"
        raise JournalError(Code.JOURNAL_DAMAGED, detail) from error
