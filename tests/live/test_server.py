"""The service as a process: where it listens, how it starts, refuses to start and ends, and what any client can ask."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.chains import blockdev, build_chain
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service

pytestmark = pytest.mark.live

SERVE = [sys.executable, "-m", "app.cli.main", "serve"]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service for the tests that share one."""
    with Service(tmp_path_factory.mktemp("host")) as running:
        yield running


@pytest.fixture
def anybody(host: Service) -> Iterator[httpx.Client]:
    """A client without a token."""
    transport = httpx.HTTPTransport(uds=str(host.socket))
    with httpx.Client(transport=transport, base_url="http://blockjobd", timeout=20) as client:
        yield client


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with these settings and no others."""
    others = {key: value for key, value in os.environ.items() if not key.startswith("BLOCKJOBD_")}
    return others | {f"BLOCKJOBD_{key.upper()}": value for key, value in settings.items()}


def problem(answer: httpx.Response, status: int, code: str) -> JSON:
    """The problem document of an answer, checked for what each must have."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    document = answer.json()
    assert (document["code"], document["status"]) == (code, status)
    assert document["type"] == f"urn:blockjobd:problem:{code}"
    assert document["title"]
    assert document["detail"]
    assert document["instance"] == answer.request.url.raw_path.decode().partition("?")[0]
    assert "Traceback" not in answer.text
    return document


# What any client can ask ---------------------------------------------------------------------------------------------


def test_probes(host: Service, anybody: httpx.Client) -> None:
    """Whether it lives and can serve is told to anybody, and told of each check."""
    assert anybody.get("/livez").json()["status"] == "ok"
    answer = anybody.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")
    assert answer.json()["checks"]["journal"] == "ok"
    assert host.client.get("/livez").status_code == 200


def test_metrics(host: Service, tmp_path: Path) -> None:
    """The figures are Prometheus's text, and count domains, jobs and requests as they are."""
    chain = build_chain(tmp_path, 3)
    with Qemu(host.qmp_dir / "metered.qmp", blockdev(chain)):
        host.wait_for_domain("metered", "paused")
        job = host.started("metered", flags=["active"])
        host.wait_for_job(job["id"], "ready")
        answer = host.client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert 'blockjobd_domains{state="paused"} 1.0' in answer.text
        assert 'blockjobd_jobs{state="ready"} 1.0' in answer.text
        assert re.search(r'blockjobd_http_requests_total\{.*commit.*status="202"\} 1\.0', answer.text)
        for line in answer.text.splitlines():
            assert line.startswith("#") or re.fullmatch(r"[a-z_]+(\{.*\})? [0-9.e+-]+", line), line
        assert host.client.post(f"/jobs/{job['id']}/pivot").status_code == 202
        host.wait_for_job(job["id"])
        assert 'blockjobd_jobs{state="ready"} 0.0' in host.client.get("/metrics").text


def test_documents(host: Service) -> None:
    """The OpenAPI document describes every operation of this service, and /docs shows it to people."""
    document = host.client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.")
    assert {
        "/domains",
        "/domains/{domain}",
        "/domains/{domain}/disks",
        "/domains/{domain}/disks/{disk}",
        "/domains/{domain}/disks/{disk}/commit",
        "/domains/{domain}/events",
        "/events",
        "/jobs",
        "/jobs/{job_id}",
        "/jobs/{job_id}/events",
        "/jobs/{job_id}/history",
        "/jobs/{job_id}/pause",
        "/jobs/{job_id}/pivot",
        "/jobs/{job_id}/resume",
        "/livez",
        "/metrics",
        "/readyz",
    } <= set(document["paths"])
    printed = subprocess.run([*SERVE[:-1], "openapi"], check=True, capture_output=True, text=True)
    assert json.loads(printed.stdout) == document
    page = host.client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "/domains/{domain}/disks/{disk}/commit" in page.text


def test_no_such_route(host: Service) -> None:
    """A path that leads nowhere is a problem document, whatever is in it."""
    for path in ("/", "/nonsense", "/jobs/", "/jobs/x/y/z", "/domains/a/b", "/JOBS", "/%00", "/%F0%9F", "//jobs"):
        problem(host.client.get(path), 404, "not-found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PATCH", "/domains", {"GET"}),
        ("POST", "/domains/web1", {"GET", "PUT", "DELETE"}),
        ("PUT", "/jobs/bj-x", {"GET", "PATCH", "DELETE"}),
        ("GET", "/jobs/bj-x/pivot", {"POST"}),
        ("DELETE", "/events", {"GET"}),
        ("POST", "/livez", {"GET"}),
    ],
)
def test_no_such_method(host: Service, method: str, path: str, allowed: set[str]) -> None:
    """A route that does not take a method names those that it takes."""
    answer = host.client.request(method, path)
    problem(answer, 405, "method-not-allowed")
    assert {name.strip() for name in answer.headers["allow"].split(",")} - {"HEAD"} == allowed


def test_a_large_body(host: Service) -> None:
    """A body of 2 MiB is refused, whether or not its length is announced, and the service goes on."""
    url, body = "/domains/large", b'{"disks": {}, "x": "' + b"x" * (2 << 20) + b'"}'
    headers = {"Content-Type": "application/json"}
    problem(host.client.put(url, content=body, headers=headers), 413, "payload-too-large")
    pieces = (body[at : at + 65536] for at in range(0, len(body), 65536))
    problem(host.client.put(url, content=pieces, headers=headers), 413, "payload-too-large")
    problem(host.client.get(url), 404, "domain-not-found")


@pytest.mark.parametrize(
    "body",
    [b"{", b"", b"nonsense", b"{'a': 1}", b'{"disks": {}}}', b"\xff\xfe", b"[" * 100_000, b'{"a": NaN', b"1" * 10_000],
    ids=lambda body: repr(body[:12]),
)
def test_a_broken_body(host: Service, body: bytes) -> None:
    """What is no JSON is a 422 that says so, whatever it is."""
    answer = host.client.put("/domains/broken", content=body, headers={"Content-Type": "application/json"})
    document = problem(answer, 422, "invalid-request")
    assert [error["pointer"] for error in document["errors"]] == [""]
    problem(host.client.get("/domains/broken"), 404, "domain-not-found")


def test_bytes_that_are_no_http(host: Service) -> None:
    """What is no HTTP is refused as a problem, and the connection ended; the others are served."""
    for said in (b"nonsense\r\n\r\n", b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n", b"GET /\0 HTTP/1.1\r\n\r\n"):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(host.socket))
            client.sendall(said)
            received = b""
            while data := client.recv(65536):
                received += data
        assert received.startswith(b"HTTP/1.1 400 "), said
        assert json.loads(received.partition(b"\r\n\r\n")[2])["status"] == 400
    assert host.client.get("/livez").status_code == 200


def test_each_answer_has_a_request_id(host: Service) -> None:
    """An id that the client gives is used, and stands in the log; a wild one is replaced."""
    given = host.client.get("/jobs", headers={"X-Request-Id": "my-request.1"})
    assert given.headers["x-request-id"] == "my-request.1"
    # The line is written once the answer is out.
    deadline = time.monotonic() + 5
    while "my-request.1" not in host.log():
        assert time.monotonic() < deadline
    made = {host.client.get("/jobs", headers={"X-Request-Id": 'x" y'}).headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    assert 'x" y' not in made


def test_the_log_holds_no_secret(host: Service) -> None:
    """Each line of the log is JSON, and the token stands in none."""
    host.client.get("/jobs")
    token = (host.state_dir / "token").read_text().strip()
    lines = host.log().splitlines()
    assert lines
    for line in lines:
        assert json.loads(line)["event"]
        assert token not in line


# Where it listens ----------------------------------------------------------------------------------------------------


def test_the_unix_socket(host: Service) -> None:
    """The socket is for the service's user and group; so is nothing of the state for anybody else."""
    mode = host.socket.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o660
    assert stat.S_IMODE(host.state_dir.stat().st_mode) & 0o077 == 0
    for entry in host.state_dir.iterdir():
        assert stat.S_IMODE(entry.stat().st_mode) & 0o077 == 0, entry


@contextmanager
def serving(folder: Path, *arguments: str, **settings: str) -> Generator[tuple[subprocess.Popen[str], JSON]]:
    """The command `serve` with these settings and arguments, and the line by which its log says that it serves."""
    folder.mkdir()
    log = folder / "log"
    with log.open("w") as file:
        environ = environment({"state_dir": str(folder / "state"), "log_format": "json"} | settings)
        process = subprocess.Popen([*SERVE, *arguments], env=environ, stdout=file, stderr=file, text=True)
    try:
        deadline = time.monotonic() + 20
        while '"serving"' not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        yield process, next(line for line in lines if line["event"] == "serving")
    finally:
        process.terminate()
        process.wait(10)


def test_over_tcp(tmp_path: Path) -> None:
    """On a TCP port the service asks for tokens as anywhere else, tells where it is, and lets go of it at its end."""
    with serving(tmp_path / "tcp", listen="127.0.0.1:0") as (process, line):
        url = line["url"]
        assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*", url)
        token = Path(line["token"]).read_text().strip()
        with httpx.Client(base_url=url, timeout=20) as client:
            assert client.get("/livez").status_code == 200
            problem(client.get("/jobs"), 401, "unauthenticated")
            assert client.get("/jobs", headers={"Authorization": f"Bearer {token}"}).status_code == 200
        process.terminate()
        assert process.wait(5) == 0
        port = int(url.rpartition(":")[2])
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_settings_file(tmp_path: Path) -> None:
    """Settings come from the file, the environment wins, and SIGINT ends the service as SIGTERM does."""
    config = tmp_path / "blockjobd.toml"
    config.write_text(f'listen = "127.0.0.1:1"\nqmp_dir = "{tmp_path}/qmp"\nmax_running_jobs = 3\n')
    with (
        Qemu(make(tmp_path / "qmp") / "vm.qmp", []),
        serving(tmp_path / "file", "--config", str(config), listen="127.0.0.1:0") as (process, line),
    ):
        token = Path(line["token"]).read_text().strip()
        headers = {"Authorization": f"Bearer {token}"}
        with httpx.Client(base_url=line["url"], headers=headers, timeout=20) as client:
            deadline = time.monotonic() + 5
            while client.get("/domains/vm").status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        process.send_signal(2)
        assert process.wait(5) == 0


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


# What does not start -------------------------------------------------------------------------------------------------


def refused(settings: Mapping[str, str], *arguments: str) -> tuple[int, str]:
    """The exit status of a service that does not start, and the one line that it says."""
    command = [*SERVE, *arguments]
    ended = subprocess.run(command, env=environment(settings), capture_output=True, text=True, check=False, timeout=20)
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    return ended.returncode, lines[0]


@pytest.mark.parametrize(
    ("settings", "text", "named"),
    [
        ({"nonsense": "1"}, "", "BLOCKJOBD_NONSENSE"),
        ({"listen": "nowhere"}, "", "BLOCKJOBD_LISTEN"),
        ({"max_running_jobs": "none"}, "", "BLOCKJOBD_MAX_RUNNING_JOBS"),
        ({"qmp_timeout": "-1"}, "", "BLOCKJOBD_QMP_TIMEOUT"),
        ({}, "qmp_dri = '/x'\n", "qmp_dri"),
        ({}, "retention_days = 'long'\n", "retention_days"),
        ({}, "listen = \n", "TOML"),
        ({}, None, "No such file"),
    ],
)
def test_wrong_settings(tmp_path: Path, settings: dict[str, str], text: str | None, named: str) -> None:
    """A setting that is unknown or can't be used ends the command with 2, and is named."""
    config = tmp_path / "blockjobd.toml"
    if text is not None:
        config.write_text(text)
    wanted = {"state_dir": str(tmp_path / "state")} | settings
    status, said = refused(wanted, *(["--config", str(config)] if text != "" else []))
    assert status == 2
    assert named in said
    assert not (tmp_path / "state").exists()


def test_a_second_service(host: Service, tmp_path: Path) -> None:
    """A second service on the same state says so and does not start; one on the same socket neither."""
    status, said = refused({"state_dir": str(host.state_dir), "listen": "127.0.0.1:0"})
    assert status == 1
    assert str(host.state_dir) in said
    assert "another" in said
    status, said = refused({"state_dir": str(tmp_path / "state"), "listen": f"unix:{host.socket}"})
    assert status == 1
    assert str(host.socket) in said
    assert host.client.get("/jobs").status_code == 200


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """An address that somebody else has is named."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        status, said = refused({"state_dir": str(tmp_path / "state"), "listen": address})
    assert status == 1
    assert address in said


def test_a_state_that_can_not_be_used(tmp_path: Path) -> None:
    """A state directory that is a file, or holds a journal that is none, is named, and left as it is."""
    (tmp_path / "file").write_text("data")
    status, said = refused({"state_dir": str(tmp_path / "file"), "listen": "127.0.0.1:0"})
    assert (status, str(tmp_path / "file") in said) == (1, True)
    with serving(tmp_path / "once", listen="127.0.0.1:0"):
        pass
    state = tmp_path / "once" / "state"
    journal = state / "journal.sqlite3"
    assert journal.exists()
    for each in state.glob("journal.sqlite3*"):
        each.write_bytes(b"no journal " * 1000)
    status, said = refused({"state_dir": str(state), "listen": "127.0.0.1:0"})
    assert (status, str(journal) in said) == (1, True)
    assert journal.read_bytes() == b"no journal " * 1000
