"""The bodies of requests, with all checks that need only the body."""

from __future__ import annotations

from enum import IntFlag
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from app.api.cloudevents import STORED
from app.core.errors import Problem
from app.core.flags import BANDWIDTH_MAX, names_of, parse_flags
from app.core.kinds.commit import CommitFlag
from app.core.kinds.pull import PullFlag
from app.core.outgoing import secret_error, url_error
from app.core.states import OnError, OnReady
from app.engine.ports.driver import Address
from app.engine.ports.journal import Registration
from app.settings import UNIX_PATH_MAX, host_and_port


def _plain(value: str) -> str:
    # JSON can spell both, but file names and the journal can't hold them.
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise PydanticCustomError("characters", "must not hold a NUL character or half a surrogate pair")
    return value


def _absolute(value: str) -> str:
    if not value.startswith("/"):
        raise PydanticCustomError("relative_path", "expected an absolute path")
    return value


Text = Annotated[StrictStr, AfterValidator(_plain)]
AbsolutePath = Annotated[Text, AfterValidator(_absolute)]


def _flag_kind(value: object) -> str | None:
    if isinstance(value, list):
        return "names"
    return "mask" if isinstance(value, int) and not isinstance(value, bool) else None


def _flags(known: type[IntFlag]) -> Any:
    """The type of a field of flags that a kind of request knows."""

    def judge(value: int | str) -> int | str:
        found = parse_flags([value] if isinstance(value, str) else value, known)
        if isinstance(found, Problem):
            raise PydanticCustomError("flag", "{reason}", {"reason": found.detail.partition(": ")[2]})
        return value

    names: list[JsonValue] = [*names_of(known)]
    return Annotated[
        Annotated[StrictInt, AfterValidator(judge), Field(json_schema_extra={"minimum": 0}), Tag("mask")]
        | Annotated[
            list[Annotated[StrictStr, AfterValidator(judge), Field(json_schema_extra={"enum": names})]], Tag("names")
        ],
        Discriminator(
            _flag_kind,
            custom_error_type="flags_type",
            custom_error_message="expected a list of names, or libvirt's bitmask as an integer",
        ),
    ]


if TYPE_CHECKING:
    CommitFlags = PullFlags = int | list[str]
else:
    CommitFlags = _flags(CommitFlag)
    PullFlags = _flags(PullFlag)

Bandwidth = Annotated[StrictInt, Field(ge=0, le=BANDWIDTH_MAX, description="MiB/s, or bytes/s; 0: no limit")]


class In(BaseModel):
    """The body of a request. It refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _secret(value: str) -> str:
    why = secret_error(value)
    if why is not None:
        raise PydanticCustomError("secret", "{reason}", {"reason": why})
    return value


def _url(value: str) -> str:
    why = url_error(value)
    if why is not None:
        raise PydanticCustomError("url", "{reason}", {"reason": why})
    return value


def _stored_type(value: str) -> str:
    if value not in STORED:
        expected = ", ".join(sorted(STORED))
        raise PydanticCustomError("event_type", "expected some of {expected}", {"expected": expected})
    return value


Secret = Annotated[Text, AfterValidator(_secret)]
Url = Annotated[Text, AfterValidator(_url), Field(description="by http or https")]


class CallbackIn(In):
    """A webhook for one job alone: all events of that job are sent to it."""

    url: Url
    secret: Secret | None = Field(default=None, description="signs the deliveries; `whsec_` and base 64")


class WebhookIn(In):
    """Where events are to be sent."""

    url: Url
    types: list[
        Annotated[StrictStr, AfterValidator(_stored_type), Field(json_schema_extra={"enum": [*sorted(STORED)]})]
    ] = Field(default=[], description="the types of events to send; an empty list: all types but `job.progress`")
    secret: Secret | None = Field(default=None, description="signs the deliveries; null: one is made")


class RotateIn(In):
    """Another secret for a webhook."""

    secret: Secret | None = Field(default=None, description="null: one is made")


class CommitIn(In):
    """A commit: which layers are merged, and how."""

    base: Text | None = Field(
        default=None, description="layer to merge into; null: the bottom one, or with `shallow` the one below `top`"
    )
    top: Text | None = Field(default=None, description="topmost layer to merge; null: the active one")
    bandwidth: Bandwidth = 0
    flags: CommitFlags = Field(default=[], description="shallow 1, delete 2, active 4, relative 8, bandwidth_bytes 16")
    on_ready: OnReady = Field(default=OnReady.WAIT, description="what to do once the active layer is mirrored")
    on_error: OnError = Field(default=OnError.REPORT, description="what an I/O error does to the job")
    backing_file: Text | None = Field(
        default=None, description="what the header above `top` is to say; null: chosen by the service"
    )
    verify: bool = Field(
        default=False,
        description="below the active layer: compare the merged layers with the base, byte by byte, before the end",
    )
    callback: CallbackIn | None = Field(default=None, description="a webhook for this job alone")


class PullIn(In):
    """A pull: which layers are copied upwards, and how."""

    top: Text | None = Field(default=None, description="layer to copy into; null: the active one")
    base: Text | None = Field(
        default=None, description="the layer that is below `top` then; null: none, `top` stands alone"
    )
    bandwidth: Bandwidth = 0
    flags: PullFlags = Field(default=[], description="relative 16, bandwidth_bytes 64")
    on_error: OnError = Field(default=OnError.REPORT, description="what an I/O error does to the job")
    backing_file: Text | None = Field(
        default=None, description="what the header of `top` is to say; null: chosen by the service"
    )
    callback: CallbackIn | None = Field(default=None, description="a webhook for this job alone")


class PatchJobIn(In):
    """Another speed for a job."""

    bandwidth: Bandwidth
    flags: CommitFlags = Field(default=[], description="`bandwidth_bytes` 16, or none")


class ResolveIn(In):
    """How a lost job ended, by the verdict of a person who has looked at the images."""

    outcome: Literal["completed", "failed", "canceled"] = Field(alias="as", description="the job's state from now on")


class MonitorIn(In):
    """Where the domain's monitor listens: a unix socket, or host and port."""

    unix: AbsolutePath | None = None
    tcp: Text | None = Field(default=None, description="`host:port`, a numeric IPv6 host in brackets")

    @field_validator("unix")
    @classmethod
    def _fits(cls, value: str | None) -> str | None:
        if value is not None and len(value.encode()) > UNIX_PATH_MAX:
            raise PydanticCustomError("unix_path", "a unix socket's path has at most 107 bytes")
        return value

    @field_validator("tcp")
    @classmethod
    def _has_port(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                host_and_port(value)
            except ValueError as error:
                raise PydanticCustomError("host_port", "{reason}", {"reason": str(error)}) from error
        return value

    @model_validator(mode="after")
    def _only_one(self) -> Self:
        if (self.unix is None) == (self.tcp is None):
            raise PydanticCustomError("monitor", "expected either `unix` or `tcp`")
        return self

    @property
    def address(self) -> Address:
        """The address, as a value of the engine."""
        return Address(unix=self.unix, tcp=host_and_port(self.tcp) if self.tcp else None)


class DiskIn(In):
    """The active layer's image of a disk, for work while the domain is off."""

    image: AbsolutePath


class DomainIn(In):
    """A registration."""

    qmp: MonitorIn | None = None
    disks: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")], DiskIn] | None = Field(
        default=None, description="images by target name, such as `vda`"
    )
    allow_managed: StrictBool = Field(default=False, description="allow changes although libvirt manages the domain")

    def registration(self, domain: str) -> Registration:
        """The registration of the domain, as a value of the engine."""
        return Registration(
            id=domain,
            address=self.qmp.address if self.qmp else None,
            disks={name: disk.image for name, disk in (self.disks or {}).items()},
            allow_managed=self.allow_managed,
        )
