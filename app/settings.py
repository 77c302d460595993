"""The settings: a TOML file, and the environment, which wins."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from app.core.incoming import Provider

PREFIX: Final = "BLOCKJOBD_"

UNIX_PATH_MAX: Final = 107
"""The longest path of a unix socket, in bytes (unix(7), `sun_path` without its NUL)."""


class SettingsError(Exception):
    """Settings that can't be used: a line for each wrong one."""


@dataclass(frozen=True, slots=True)
class Listen:
    """Where the service listens: host and port (0: any free one), or the path of a unix socket."""

    host: str = "127.0.0.1"
    port: int = 8470
    unix: Path | None = None


def host_and_port(value: str) -> tuple[str, int]:
    """`host:port`, or `[ipv6]:port`; raises ValueError."""
    host, _, port = value.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or (":" in bare and bare == host) or not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ValueError("expected host:port")
    return bare, int(port)


def _listen(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value.startswith("unix:"):
        path = Path(value.removeprefix("unix:"))
        if not path.is_absolute() or len(os.fsencode(path)) > UNIX_PATH_MAX:
            raise ValueError(f"expected unix: and an absolute path of at most {UNIX_PATH_MAX} bytes")
        return Listen(unix=path)
    host, port = host_and_port(value)
    return Listen(host=host, port=port)


def _paths(value: object) -> object:
    if isinstance(value, str):
        return json.loads(value) if value.lstrip().startswith("[") else [part for part in value.split(":") if part]
    return value


def _networks(value: object) -> object:
    if isinstance(value, str):
        value = json.loads(value) if value.lstrip().startswith("[") else [part.strip() for part in value.split(",")]
    return value


def _network(value: object) -> IPv4Network | IPv6Network:
    if not isinstance(value, str):
        raise ValueError("expected a network such as 10.0.0.0/8")  # noqa: TRY004 - pydantic's way
    return ip_network(value)


Network = Annotated[IPv4Network | IPv6Network, PlainValidator(_network)]

Folder = Annotated[Path, AfterValidator(Path.absolute)]


def _hooks(value: object) -> object:
    return json.loads(value) if isinstance(value, str) else value


def _pointers(value: dict[str, object]) -> dict[str, object]:
    for pointer, expected in value.items():
        if not pointer.startswith("/"):
            raise ValueError(f"expected JSON Pointers such as /action, not {pointer}")
        if not isinstance(expected, str | int | float | bool):
            raise ValueError(f"{pointer}: expected a string, a number, true or false")  # noqa: TRY004 - pydantic's way
    return value


class Hook(BaseModel):
    """What a webhook of a CI pipeline starts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    provider: Provider
    secret_file: Folder
    event: str
    """The provider's name of the event: `workflow_run`, `Pipeline Hook`, or the `type` in the payload."""
    match: Annotated[dict[str, object], AfterValidator(_pointers)] = Field(default_factory=dict[str, object])
    """JSON Pointers into the payload, and what they have to lead to."""
    domain: str
    disk: str
    verb: Literal["commit", "pull"] = "commit"
    body: dict[str, object] = Field(default_factory=dict[str, object])
    """As in the request that it stands for."""


HookName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Settings(BaseModel):
    """Everything that can be set. A path that is relative is meant from the working directory."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    listen: Annotated[Listen, BeforeValidator(_listen)] = Listen()
    state_dir: Folder
    """Holds the journal, the tokens and the lock."""
    qmp_dir: Folder | None = None
    """Every socket `NAME.qmp` in it is a domain."""
    image_roots: Annotated[tuple[Folder, ...], BeforeValidator(_paths)] = ()
    """Folders outside which the service opens and deletes no image; none: anywhere."""
    max_running_jobs: int = Field(default=8, ge=1)
    max_connections: int = Field(default=1000, ge=1)
    """Connections of clients; one more is answered with 503 and closed."""
    retention_days: int = Field(default=30, ge=0)
    qmp_timeout: float = Field(default=10, gt=0, allow_inf_nan=False)
    """Seconds."""
    log_format: Literal["text", "json"]
    webhook_allow: Annotated[tuple[Network, ...], BeforeValidator(_networks)] = ()
    """Networks that outgoing webhooks may reach besides public ones."""
    hooks: Annotated[dict[HookName, Hook], BeforeValidator(_hooks)] = Field(default_factory=dict[str, Hook])
    """Webhooks that are taken at `/hooks/NAME`; in the environment a JSON object."""


def load(config: Path | None, environ: Mapping[str, str]) -> Settings:
    """The settings of the file `config`, overridden by the variables `BLOCKJOBD_*` of `environ`.

    An empty variable counts as not set. Raises `SettingsError`.
    """
    values, origins = _defaults(environ), dict[str, str]()
    for key, value in (_read(config) if config else {}).items():
        values[key], origins[key] = value, str(config)
    for name, value in environ.items():
        if name.startswith(PREFIX) and value:
            key = name.removeprefix(PREFIX).lower()
            values[key], origins[key] = value, name
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError("\n".join(_line(item, origins) for item in error.errors())) from error


def default_state_dir(environ: Mapping[str, str], *, root: bool) -> Path:
    """Where the state is kept unless it is set: a user's is where the XDG specification says."""
    if root:
        return Path("/var/lib/blockjobd")
    # What the specification says of a relative path: ignore it.
    home = Path(environ.get("HOME") or Path.home())
    base = Path(environ.get("XDG_STATE_HOME") or "")
    return (base if base.is_absolute() else home / ".local" / "state") / "blockjobd"


def _defaults(environ: Mapping[str, str]) -> dict[str, object]:
    state_dir = default_state_dir(environ, root=os.geteuid() == 0)
    return {"state_dir": state_dir, "log_format": "text" if sys.stderr.isatty() else "json"}


def _read(config: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(config.read_text())
    except OSError as error:
        raise SettingsError(f"{config}: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"{config}: not TOML: {error}") from error


def _line(item: Any, origins: Mapping[str, str]) -> str:
    key, *rest = (str(part) for part in item["loc"])
    origin = origins.get(key, "defaults")
    name = ".".join((origin, *rest)) if origin.startswith(PREFIX) else f"{origin}: {'.'.join((key, *rest))}"
    if item["type"] == "extra_forbidden" and rest:
        return f"{name}: there is no such setting"
    if item["type"] == "extra_forbidden":
        return f"{name}: there is no setting {key!r}; there are {', '.join(Settings.model_fields)}"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{name}: {message}, not {item['input']!r}"
