"""What was seen in a round: all that the judge gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

JSON = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Request:
    """A request for a merge; `speed` names it in the journal, too. `status` None: the answer was lost."""

    domain: str
    speed: int
    body: JSON
    status: int | None = None
    answer: JSON = field(default_factory=dict[str, Any])


@dataclass(slots=True, kw_only=True)
class Reply:
    """The answer to another request that changes something."""

    domain: str
    what: str
    status: int | None
    answer: JSON


@dataclass(slots=True, kw_only=True)
class DomainEnd:
    """A domain, after all has settled; chains are files, the active layer first.

    `jobs` are the ids of its jobs by then. `graph` is QEMU's block graph, `headers` what the images say; `there` are
    those of the `images` (the chain at the start) that exist. `runs` is how often each job has begun to run in any
    QEMU. `meddled`: another client of QEMU has had its hands on a job. `blind`: the service could not see QEMU's
    process at some time.
    """

    name: str
    jobs: tuple[str, ...]
    images: tuple[str, ...]
    graph: tuple[str, ...]
    headers: tuple[str, ...]
    there: frozenset[str]
    in_qemu: tuple[str, ...] = ()
    runs: Mapping[str, int] = field(default_factory=dict[str, int])
    qemu_ended: bool = False
    meddled: bool = False
    blind: bool = False


@dataclass(slots=True, kw_only=True)
class Record:
    """A round. `streamed` are the events that the subscriber got, `journal` the ids and types that are stored.

    Both begin after the event `after`. `jobs` are the round's jobs as the API shows them, oldest first in each domain.
    `troubles` are what was found to be wrong while it was there to be seen, such as the data.
    """

    after: int
    requests: list[Request]
    replies: list[Reply]
    jobs: list[JSON]
    histories: Mapping[str, list[JSON]]
    streamed: list[JSON]
    journal: list[tuple[int, str]]
    ends: list[DomainEnd]
    troubles: list[str] = field(default_factory=list[str])
