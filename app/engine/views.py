"""Domains and disks as the outside sees them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from app.core.chain import Disk
from app.core.errors import Problem
from app.core.job import Job
from app.engine.ports.events import StoredEvent
from app.engine.ports.outbox import Webhook


class DomainState(StrEnum):
    """Whether and how a domain can be reached."""

    RUNNING = "running"
    PAUSED = "paused"
    MIGRATING = "migrating"
    """An outgoing migration runs, or has ended."""
    INCOMING = "incoming"
    """The guest has not arrived yet, or its images are inactive."""
    SHUTOFF = "shutoff"
    UNREACHABLE = "unreachable"
    BUSY = "busy"


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainView:
    """A domain, with what is known of its QEMU; `driver` is its name in the registration, `disks` are target names.

    `since` is when the service first saw that it is off (ms since 1970); None unless it is.
    """

    id: str
    name: str
    uuid: str | None
    state: DomainState
    driver: str
    version: str | None
    pid: int | None
    managed_by: str | None
    error: Problem | None
    disks: tuple[str, ...]
    since: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskView:
    """A disk, with whether each layer's own contents can be relied on, and the unfinished job on it."""

    disk: Disk
    valid: tuple[bool, ...]
    job: str | None


class Render(Protocol):
    """How a job or a domain is written as the data of an event: the JSON text that the API answers with."""

    def job(self, job: Job) -> str:
        """The JSON of a job."""
        ...

    def domain(self, view: DomainView) -> str:
        """The JSON of a domain."""
        ...


class EventRenderer(Protocol):
    """How what webhooks are sent is written."""

    def event(self, event: StoredEvent) -> str:
        """The JSON of a whole event, as streams have it in `data:` and webhooks as their body."""
        ...

    def webhook(self, webhook: Webhook) -> str:
        """The JSON of a webhook, without its secrets: the data of an event that tells of it."""
        ...
