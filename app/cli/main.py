"""The command `blockjobd`.

What a command needs is imported when it runs, so that `--help` is quick. A command that can't be done ends with one
line on standard error: exit code 2 where it was called or configured wrongly, 1 otherwise.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from app.engine.ports.tokens import Role

if TYPE_CHECKING:
    from app.journal.tokens import Tokens
    from app.settings import Settings

USAGE: Final = 2


class Failure(typer.TyperException):
    """A command that can't be done; the message is for a person."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


cli = typer.Typer(
    name="blockjobd",
    help="Merge the disk layers of running QEMU virtual machines over HTTP.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
token = typer.Typer(help="API tokens of the service on this host.", rich_markup_mode=None)
cli.add_typer(token, name="token")

journal = typer.Typer(help="Copies of the journal of the service on this host.", rich_markup_mode=None)
cli.add_typer(journal, name="journal")

hooks = typer.Typer(help="Webhooks that CI pipelines send.", rich_markup_mode=None)
cli.add_typer(hooks, name="hooks")

Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML file with settings; the environment wins over it.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"blockjobd {version('blockjobd')}")
        raise typer.Exit


@cli.callback()
def options(
    *,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Merge the disk layers of running QEMU virtual machines over HTTP."""


@cli.command()
def serve(config: Config = None) -> None:
    """Run the service in the foreground until SIGTERM or SIGINT."""
    settings = _settings(config)

    import structlog  # noqa: PLC0415 - see the module's docstring

    from app.wiring import run  # noqa: PLC0415

    def announce(url: str) -> None:
        log = structlog.get_logger(__name__)
        log.info("serving", url=url, version=version("blockjobd"), token=str(settings.state_dir / "token"))

    listen = settings.listen
    with _plain_errors(str(listen.unix or f"{listen.host}:{listen.port}")):
        run(settings, ready=announce)


@cli.command()
def demo(
    *,
    once: Annotated[bool, typer.Option("--once", help="Exit after the verification; uses no TCP port.")] = False,
    port: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, max=65535, help="Port on 127.0.0.1; 8470 where not given.", show_default=False
        ),
    ] = None,
) -> None:
    """Merge layers of a real QEMU through HTTP, and verify every byte of what its guest sees."""
    from app.cli.demo import run  # noqa: PLC0415
    from app.cli.stage import DemoFailed  # noqa: PLC0415

    try:
        run(once=once, port=port)
    except DemoFailed as error:
        raise Failure(f"demo: {error}") from error


@cli.command()
def openapi() -> None:
    """Print the OpenAPI document."""
    from app.wiring import openapi_document  # noqa: PLC0415

    typer.echo(openapi_document().rstrip("\n"))


@token.command()
def create(
    *,
    role: Annotated[Role, typer.Option(help="What the token may do; each role includes those before it.")],
    name: Annotated[str, typer.Option(metavar="NAME", help="What jobs show as `requested_by`.")],
    config: Config = None,
) -> None:
    """Make a token and print it; its text can't be had again."""
    with _tokens(config) as tokens:
        typer.echo(tokens.create(role, name))


@token.command("list")
def list_tokens(config: Config = None) -> None:
    """Print name, role and time of creation of each token."""
    with _tokens(config) as tokens:
        for found in tokens.list_tokens():
            created = datetime.fromtimestamp(found.created_at / 1000, UTC)
            typer.echo(f"{found.name:<24} {found.role:<8} {created:%Y-%m-%dT%H:%M:%SZ}")


@token.command()
def revoke(name: Annotated[str, typer.Argument(metavar="NAME")], config: Config = None) -> None:
    """Make a token worthless at once."""
    with _tokens(config) as tokens:
        tokens.revoke(name)


@journal.command()
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The copy, a new file.")], config: Config = None
) -> None:
    """Copy the journal to a file, while the service runs or not."""
    from app.journal.backup import backup as copy  # noqa: PLC0415

    settings = _settings(config)
    with _plain_errors():
        size = copy(settings.state_dir, file.absolute())
    typer.echo(f"{file}: {size} bytes")


@journal.command()
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A copy that `blockjobd journal backup` has made.")],
    config: Config = None,
) -> None:
    """Put a copy in the place of the journal; the service must not run. What was there is kept beside it."""
    from app.journal.backup import restore as put_back  # noqa: PLC0415

    settings = _settings(config)
    with _plain_errors():
        kept = put_back(settings.state_dir, file.absolute())
    typer.echo(f"restored from {file}" + ("" if kept is None else f"; the journal before is {kept}"))


@hooks.command("test")
def try_hook(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The hook, as in [hooks.NAME].")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The delivery's body, byte for byte.")],
    *,
    header: Annotated[
        list[str] | None,
        typer.Option("--header", "-H", metavar="'NAME: VALUE'", help="A header of the delivery; may be repeated."),
    ] = None,
    config: Config = None,
) -> None:
    """Say what a stored delivery would do; nothing is started. Exits with 1 where it would start nothing.

    The signature is looked at if its headers are given; the event counts as the right one unless its header is given.
    """
    settings = _settings(config)

    from app.cli.hooks import judge  # noqa: PLC0415
    from app.settings import SettingsError  # noqa: PLC0415

    try:
        lines, starts = judge(settings, name, file.read_bytes(), header or [])
    except SettingsError as error:
        raise Failure(str(error), USAGE) from error
    except OSError as error:
        raise Failure(f"{file}: {error.strerror}", USAGE) from error
    typer.echo("\n".join(lines))
    raise typer.Exit(0 if starts else 1)


def _settings(config: Path | None) -> Settings:
    from app.settings import SettingsError, load  # noqa: PLC0415

    try:
        return load(config, os.environ)
    except SettingsError as error:
        raise Failure(str(error), USAGE) from error


@contextmanager
def _tokens(config: Path | None) -> Generator[Tokens]:
    settings = _settings(config)

    from app.journal.tokens import Tokens  # noqa: PLC0415
    from app.wiring import SystemClock  # noqa: PLC0415

    with _plain_errors(), Tokens.open(settings.state_dir, SystemClock()) as tokens:
        yield tokens


@contextmanager
def _plain_errors(listen: str = "") -> Generator[None]:
    """Turn what a person can put right into a `Failure`; defects keep their traceback."""
    from app.engine.ports.journal import JournalError  # noqa: PLC0415
    from app.journal.backup import BackupError  # noqa: PLC0415
    from app.journal.database import JournalUnusable  # noqa: PLC0415
    from app.journal.lock import StateDirInUse  # noqa: PLC0415
    from app.journal.tokens import TokenError  # noqa: PLC0415
    from app.settings import SettingsError  # noqa: PLC0415

    try:
        yield
    except (BackupError, JournalError, JournalUnusable, StateDirInUse, TokenError) as error:
        raise Failure(str(error)) from error
    except SettingsError as error:
        raise Failure(str(error), USAGE) from error
    except OSError as error:
        # Without a file it is the address that can't be listened on.
        raise Failure(f"{error.filename or listen}: {error.strerror or error}") from error


def main() -> None:
    """Run the command line and end the process."""
    try:
        code: object = cli(prog_name="blockjobd", standalone_mode=False)
    except typer.TyperException as error:
        message = " ".join(error.format_message().split())
        typer.echo(f"blockjobd: {message}", err=True)
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
