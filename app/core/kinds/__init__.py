"""The kinds of jobs: the one list. A kind is a module; see `app.core.kinds.base.JobKind` for what it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from app.core.kinds import commit, pull
from app.core.kinds.base import Capabilities, JobKind
from app.core.kinds.commit import CommitSpec
from app.core.kinds.pull import PullSpec
from app.core.orphan import OrphanJob
from app.core.plan import Plan

Spec = CommitSpec | PullSpec
"""The spec of any kind; the journal tells them apart by their `kind` and `layout`."""

KINDS: Final[Mapping[str, JobKind]] = {"commit": commit, "pull": pull}


def kind_of(spec: Spec) -> JobKind:
    """The kind to which a spec belongs."""
    return KINDS[spec.kind]


def capabilities_of(spec: Spec) -> Capabilities:
    """What a job with this spec is capable of."""
    return kind_of(spec).capabilities(spec)


def adopt(orphan: OrphanJob) -> Plan[Spec] | None:
    """The plan of a job that QEMU has and the journal does not; None where no kind can tell what it works on."""
    return next((plan for kind in KINDS.values() if (plan := kind.adopt(orphan)) is not None), None)
