"""Where the server listens, and the preferences that its answers obey."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from app.api.app import create_app
from app.api.jobs import WAIT
from app.api.render import JsonRender
from app.api.server import Server
from app.engine.hub import Hub
from app.journal.journal import SqliteJournal
from app.settings import Listen
from app.wiring import SystemClock


def bound(tmp_path: Path, listen: Listen) -> Server:
    """A server that has its socket, and does not serve."""
    journal = SqliteJournal.open(tmp_path / "state", JsonRender(), SystemClock())
    try:
        return Server(create_app(None, lambda _text: None, version="1"), Hub(journal, SystemClock()), listen)
    finally:
        journal.close()


def test_a_socket_left_by_a_killed_service(tmp_path: Path) -> None:
    """A socket that nobody listens on is replaced; its mode lets the group in and nobody else."""
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(str(path))
    server = bound(tmp_path, Listen(unix=path))
    assert server.url == f"unix:{path}"
    assert path.stat().st_mode & 0o777 == 0o660
    server.close()


def test_a_socket_in_use_is_not_taken(tmp_path: Path) -> None:
    """A service that runs keeps its socket."""
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(OSError, match="in use"):
            bound(tmp_path, Listen(unix=path))
        assert path.is_socket()


def test_a_file_in_the_way_is_not_removed(tmp_path: Path) -> None:
    """Only sockets are replaced."""
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(OSError, match="in use"):
        bound(tmp_path, Listen(unix=path))
    assert path.read_text() == "data"


def test_a_port_in_use(tmp_path: Path) -> None:
    """Two servers can't have one port."""
    first = bound(tmp_path, Listen(port=0))
    port = int(first.url.rpartition(":")[2])
    with pytest.raises(OSError, match="in use"):
        bound(tmp_path, Listen(port=port))
    first.close()


def test_a_free_port_is_told(tmp_path: Path) -> None:
    """With port 0 the address tells which one it became."""
    server = bound(tmp_path, Listen(host="127.0.0.1", port=0))
    assert server.url.startswith("http://127.0.0.1:")
    assert not server.url.endswith(":0")
    server.close()


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        ("wait=10", "10"),
        ("Wait = 10", "10"),
        ('respond-async, wait="10"', "10"),
        ("wait=10; strict, x=y", "10"),
        ("nowait=10", None),
        ("wait=soon", None),
        ("wait=-1", None),
        ("wait=1.5", None),
        ("", None),
    ],
)
def test_preferences(prefer: str, seconds: str | None) -> None:
    """The seconds are found among other preferences; what makes no sense is ignored (RFC 7240, 2)."""
    found = WAIT.search(prefer)
    assert (found and found["seconds"]) == seconds
