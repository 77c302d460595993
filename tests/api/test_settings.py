"""Settings: where they come from, which one wins, and what is said of wrong ones."""

from __future__ import annotations

import os
from ipaddress import ip_network
from pathlib import Path

import pytest

from app.settings import Listen, Settings, SettingsError, default_state_dir, load


def from_file(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> Settings:
    """The settings of a file with this text."""
    config = tmp_path / "blockjobd.toml"
    config.write_text(text)
    return load(config, environ or {})


def test_defaults() -> None:
    """Nothing has to be set."""
    settings = load(None, {"HOME": "/home/me"})
    expected = "/var/lib/blockjobd" if os.geteuid() == 0 else "/home/me/.local/state/blockjobd"
    assert dict(settings) == {
        "listen": Listen(host="127.0.0.1", port=8470),
        "state_dir": Path(expected),
        "qmp_dir": None,
        "image_roots": (),
        "max_running_jobs": 8,
        "retention_days": 30,
        "qmp_timeout": 10,
        "max_connections": 1000,
        "log_format": "json",
        "webhook_allow": (),
        "hooks": {},
    }


def test_the_users_state_directory() -> None:
    """Users keep their state where the XDG specification says, root keeps it with the system's."""
    home = {"HOME": "/h"}
    assert default_state_dir(home | {"XDG_STATE_HOME": "/state"}, root=False) == Path("/state/blockjobd")
    assert default_state_dir(home | {"XDG_STATE_HOME": "relative"}, root=False) == Path("/h/.local/state/blockjobd")
    assert default_state_dir(home, root=False) == Path("/h/.local/state/blockjobd")
    assert default_state_dir(home, root=True) == Path("/var/lib/blockjobd")


def test_the_environment_wins(tmp_path: Path) -> None:
    """A variable wins over the file; an empty one counts as not set."""
    text = 'listen = "127.0.0.1:1"\nmax_running_jobs = 2\nimage_roots = ["/a", "/b"]\nqmp_dir = "/q"\n'
    environ = {"BLOCKJOBD_MAX_RUNNING_JOBS": "3", "BLOCKJOBD_LISTEN": "", "BLOCKJOB_TOKEN": "x", "PATH": "/bin"}
    settings = from_file(tmp_path, text, environ)
    assert (settings.max_running_jobs, settings.listen.port) == (3, 1)
    assert settings.image_roots == (Path("/a"), Path("/b"))
    assert settings.qmp_dir == Path("/q")


@pytest.mark.parametrize("value", ["/a:/b", '["/a", "/b"]', "/a:/b:"])
def test_lists_in_the_environment(value: str) -> None:
    """A list is JSON, or has colons in between as in PATH."""
    assert load(None, {"BLOCKJOBD_IMAGE_ROOTS": value}).image_roots == (Path("/a"), Path("/b"))


@pytest.mark.parametrize(
    ("value", "listen"),
    [
        ("0.0.0.0:80", Listen(host="0.0.0.0", port=80)),
        ("[::1]:8470", Listen(host="::1", port=8470)),
        ("localhost:0", Listen(host="localhost", port=0)),
        ("unix:/run/blockjobd.sock", Listen(unix=Path("/run/blockjobd.sock"))),
    ],
)
def test_addresses(value: str, listen: Listen) -> None:
    """A host and a port, or a unix socket."""
    assert load(None, {"BLOCKJOBD_LISTEN": value}).listen == listen


@pytest.mark.parametrize(
    "value", ["8470", ":8470", "host:", "host:x", "host:65536", "::1:80", "unix:", "unix:a", "unix:/" + "a" * 107]
)
def test_wrong_addresses(value: str) -> None:
    """An address that can't be listened on is named with its variable."""
    with pytest.raises(SettingsError, match=r"^BLOCKJOBD_LISTEN: expected"):
        load(None, {"BLOCKJOBD_LISTEN": value})


@pytest.mark.parametrize(
    ("text", "environ", "message"),
    [
        ("nonsense = 1", {}, "nonsense: there is no setting 'nonsense'"),
        ("", {"BLOCKJOBD_NONSENSE": "1"}, "BLOCKJOBD_NONSENSE: there is no setting 'nonsense'"),
        ("max_running_jobs = 0", {}, "max_running_jobs: "),
        ("", {"BLOCKJOBD_QMP_TIMEOUT": "soon"}, "BLOCKJOBD_QMP_TIMEOUT: .*'soon'"),
        ('image_roots = "/a"\nimage_roots = "/b"', {}, "not TOML"),
        ("image_roots = [1]", {}, "image_roots.0: "),
        ("", {"BLOCKJOBD_IMAGE_ROOTS": "[1"}, "BLOCKJOBD_IMAGE_ROOTS: "),
        ("", {"BLOCKJOBD_LOG_FORMAT": "xml"}, "BLOCKJOBD_LOG_FORMAT: "),
        ("qmp_timeout = 0", {}, "qmp_timeout: "),
        ("qmp_timeout = inf", {}, "qmp_timeout: "),
        ('webhook_allow = ["10.0.0.0/8", "x"]', {}, "webhook_allow.1: .*'x'"),
        ('webhook_allow = ["10.0.0.1/8"]', {}, "webhook_allow.0: .*host bits"),
        ("webhook_allow = [1]", {}, "webhook_allow.0: "),
        ("", {"BLOCKJOBD_WEBHOOK_ALLOW": "10.0.0.0/8,"}, "BLOCKJOBD_WEBHOOK_ALLOW.1: "),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, text: str, environ: dict[str, str], message: str) -> None:
    """What is wrong is named, with where it stands, on one line."""
    with pytest.raises(SettingsError, match=message) as raised:
        from_file(tmp_path, text, environ)
    assert len(str(raised.value).splitlines()) == 1


def test_all_wrong_settings_are_named_at_once() -> None:
    """Nobody wants to find them one by one."""
    with pytest.raises(SettingsError) as raised:
        load(None, {"BLOCKJOBD_A": "1", "BLOCKJOBD_LISTEN": "x"})
    assert len(str(raised.value).splitlines()) == 2


def test_networks(tmp_path: Path) -> None:
    """A list in the file; in the environment with commas, or as JSON."""
    expected = (ip_network("127.0.0.0/8"), ip_network("::1/128"), ip_network("10.1.2.3/32"))
    assert from_file(tmp_path, 'webhook_allow = ["127.0.0.0/8", "::1", "10.1.2.3"]', {}).webhook_allow == expected
    for text in ("127.0.0.0/8, ::1/128,10.1.2.3", '["127.0.0.0/8", "::1", "10.1.2.3"]'):
        assert load(None, {"BLOCKJOBD_WEBHOOK_ALLOW": text}).webhook_allow == expected


def test_a_missing_file(tmp_path: Path) -> None:
    """A file that was asked for has to be there."""
    with pytest.raises(SettingsError, match="No such file"):
        load(tmp_path / "none.toml", {})


def test_settings_do_not_change() -> None:
    """Settings are a value."""
    with pytest.raises(ValueError, match="frozen"):
        load(None, {}).max_running_jobs = 1  # pyright: ignore[reportAttributeAccessIssue]
