"""The JSON of domains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from app.api.problems import ProblemOut, problem_document
from app.api.schemas.base import Out, time_or_none
from app.engine.views import DomainState, DomainView


class QemuOut(Out):
    """The QEMU behind a monitor."""

    version: str | None
    pid: int | None


class DomainOut(Out):
    """A domain."""

    id: str
    name: str
    uuid: str | None
    state: DomainState
    driver: Literal["qmp"] = "qmp"
    qemu: QemuOut | None
    managed_by: str | None = Field(description="`libvirt`, or null")
    error: ProblemOut | None
    disks: Sequence[str] = Field(description="target names")
    since: str | None = Field(
        default=None, description="only of `shutoff`: since when the service knows that it is off"
    )

    @model_serializer(mode="wrap")
    def _only_where_off(self, write: SerializerFunctionWrapHandler) -> dict[str, object]:
        written: dict[str, object] = write(self)
        if self.since is None:
            del written["since"]
        return written


class Domains(Out):
    """A page of domains."""

    items: Sequence[DomainOut]
    next: str | None


def domain_out(view: DomainView) -> DomainOut:
    """The JSON of a domain."""
    seen = view.version is not None or view.pid is not None
    return DomainOut(
        id=view.id,
        name=view.name,
        uuid=view.uuid,
        state=view.state,
        qemu=QemuOut(version=view.version, pid=view.pid) if seen else None,
        managed_by=view.managed_by,
        error=problem_document(view.error, f"/domains/{view.id}") if view.error else None,
        disks=view.disks,
        since=time_or_none(view.since),
    )


def domain_json(view: DomainView) -> str:
    """The JSON text of a domain, in answers and in events alike."""
    return domain_out(view).model_dump_json()
