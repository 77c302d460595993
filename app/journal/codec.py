"""Jobs and registrations as JSON text, and back without loss."""

from __future__ import annotations

from typing import Final

from pydantic import TypeAdapter

from app.core.job import Job
from app.engine.ports.journal import Registration

_JOB: Final = TypeAdapter(Job)
_REGISTRATION: Final = TypeAdapter(Registration)


def encode_job(job: Job) -> str:
    """The JSON text of a job, with every field."""
    return _JOB.dump_json(job).decode()


def decode_job(text: str) -> Job:
    """The job of which `text` tells; fields that an older release did not write get their defaults.

    Raises `pydantic.ValidationError` where it tells of none.
    """
    return _JOB.validate_json(text)


def encode_registration(registration: Registration) -> str:
    """The JSON text of a registration."""
    return _REGISTRATION.dump_json(registration).decode()


def decode_registration(text: str) -> Registration:
    """The registration of which `text` tells; raises `pydantic.ValidationError` where it tells of none."""
    return _REGISTRATION.validate_json(text)
