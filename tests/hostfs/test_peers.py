"""Who listens at a socket, and who does not vouch for it any more."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from app.hostfs import peers
from app.hostfs.peers import listener

LISTEN = """
import os, socket, sys, time
sock = socket.socket(socket.AF_UNIX)
sock.bind(sys.argv[1])
sock.listen()
if os.fork():
    # The child keeps the socket, and this process ends.
    sys.stdin.read()
    os._exit(0)
print("listens", flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize("by_descriptor", [True, False])
def test_only_a_process_that_is_there_vouches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, by_descriptor: bool
) -> None:
    """Once the one that made the socket has ended, its number says nothing, whoever keeps the socket open."""
    if not by_descriptor:
        # As on a kernel that has no descriptor for it.
        monkeypatch.setattr(peers, "SO_PEERPIDFD", 999)
    path = str(tmp_path / "s")
    with subprocess.Popen(
        [sys.executable, "-c", LISTEN, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as maker:
        assert maker.stdin
        assert maker.stdout
        maker.stdout.readline()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            assert listener(client, path) == maker.pid
        maker.stdin.close()
        maker.wait(10)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            assert listener(client, path) is None
        os.killpg(maker.pid, 15)


def in_the_future(_pid: int) -> int:
    """When nobody has started yet, in clock ticks since boot."""
    return 10**12


def test_a_process_that_is_younger_than_the_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that was given again belongs to a process that did not make the socket."""
    monkeypatch.setattr(peers, "SO_PEERPIDFD", 999)
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(path))
        server.listen()
        client.connect(str(path))
        assert listener(client, str(path)) == os.getpid()
        monkeypatch.setattr(peers, "start_time", in_the_future)
        assert listener(client, str(path)) is None
