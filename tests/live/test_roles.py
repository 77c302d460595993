"""Who may do what: every route asks for a token and its role."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from tests.support.service import Service

pytestmark = pytest.mark.live

ROLES = ("read", "operate", "admin")
FREE = ("/livez", "/readyz", "/hooks/{name}")
"""What takes no token: the probes, and deliveries, which are signed."""


@pytest.fixture(scope="module")
def clients(service: Service) -> Iterator[dict[str, httpx.Client]]:
    """A client with a token of each role, and one without a token."""
    with ExitStack() as stack:
        found = {role: stack.enter_context(service.as_role(role)) for role in ROLES}
        transport = httpx.HTTPTransport(uds=str(service.socket))
        found["none"] = stack.enter_context(httpx.Client(transport=transport, base_url="http://blockjobd", timeout=20))
        yield found


def status(client: httpx.Client, method: str, url: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    """The status and the problem's code of an answer, of which a stream's events are not waited for."""
    with client.stream(method, url, headers=headers) as answer:
        if answer.headers["content-type"] != "application/problem+json":
            return answer.status_code, ""
        answer.read()
        return answer.status_code, answer.json()["code"]


def command(service: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command `blockjobd token`, on the state of the service."""
    environ = os.environ | {"BLOCKJOBD_STATE_DIR": str(service.state_dir)}
    run = [sys.executable, "-m", "app.cli.main", "token", *arguments]
    return subprocess.run(run, env=environ, check=False, capture_output=True, text=True)


def test_each_role_may_do_what_it_may(service: Service, clients: dict[str, httpx.Client]) -> None:
    """Readers get everything, operators steer jobs too, and only admins change what domains and webhooks there are."""
    document = service.client.get("/openapi.json").json()
    operations = [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]
    operations += [("GET", "/openapi.json"), ("GET", "/docs")]
    assert len(operations) > 20
    for method, path in operations:
        url = path.replace("{domain}", "nobody").replace("{disk}", "vda").replace("{job_id}", "bj-nobody")
        if path in FREE:
            continue
        domains = path == "/domains/{domain}" and method in ("PUT", "DELETE")
        admins = domains or path.endswith("/resolve") or path.startswith("/webhooks")
        needed = 0 if method == "GET" else 2 if admins else 1
        assert status(clients["none"], method, url) == (401, "unauthenticated"), (method, path)
        for rank, role in enumerate(ROLES):
            found = status(clients[role], method, url)
            if rank < needed:
                assert found == (403, "operation-denied"), (role, method, path)
            else:
                assert found[0] not in (401, 403, 500), (role, method, path)


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer wrong", "Basic {}", "{}", "Bearer {}x", "Bearer x{}", "Token {}", "Bearer {} {}"],
)
def test_what_is_no_token(service: Service, clients: dict[str, httpx.Client], authorization: str) -> None:
    """Anything but a known token after the word Bearer counts as none, and the answer asks for one."""
    token = (service.state_dir / "token").read_text().strip()
    headers = {"Authorization": authorization.replace("{}", token)}
    answer = clients["none"].get("/jobs", headers=headers)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json()["code"] == "unauthenticated"
    assert token not in answer.text


def test_how_the_word_is_written_does_not_matter(service: Service, clients: dict[str, httpx.Client]) -> None:
    """The scheme's name is the same in any case (RFC 9110, 11.1)."""
    token = (service.state_dir / "token").read_text().strip()
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert status(clients["none"], "GET", "/jobs", {"Authorization": f"{scheme} {token}"}) == (200, "")


def test_the_token_is_judged_first(clients: dict[str, httpx.Client]) -> None:
    """Who has no right learns nothing else: neither what is wrong with the body, nor what there is."""
    for role, expected in (("none", 401), ("read", 403)):
        for url in ("/domains/nobody/disks/vda/commit", "/domains/nobody/disks/vda/commit?nonsense=1"):
            assert clients[role].post(url, content=b"{", headers={"Content-Type": "text/x"}).status_code == expected


def test_tokens_are_a_matter_of_one_line(service: Service) -> None:
    """A token is printed once and kept hashed; a name that is taken or unknown is refused, with one line."""
    made = command(service, "create", "--role", "operate", "--name", "pipeline")
    assert made.returncode == 0
    text = made.stdout.strip()
    assert re.fullmatch(r"\S{20,}", text)
    for entry in service.state_dir.iterdir():
        assert text.encode() not in entry.read_bytes(), entry
    listed = command(service, "list").stdout.splitlines()
    assert [line.split()[1] for line in listed if line.startswith("pipeline ")] == ["operate"]
    wrong = [
        (("create", "--role", "read", "--name", "pipeline"), 1),
        (("revoke", "nobody"), 1),
        (("create", "--role", "root", "--name", "x"), 2),
        (("create", "--role", "read"), 2),
    ]
    for arguments, code in wrong:
        ended = command(service, *arguments)
        assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (code, "", 1), arguments
    assert command(service, "revoke", "pipeline").returncode == 0
    assert "pipeline" not in command(service, "list").stdout


def test_every_route_needs_a_token_and_its_role(service: Service) -> None:
    """Without a token each route is a 401, and a reader may change nothing; three are free."""
    document = service.client.get("/openapi.json").json()
    nobody, reader, operator = (service.as_role(role) for role in ("read", "read", "operate"))
    del nobody.headers["Authorization"]
    try:
        for path, methods in document["paths"].items():
            if path in FREE:
                continue
            url = path.replace("{domain}", "web1").replace("{disk}", "vda").replace("{job_id}", "bj-x")
            for method in methods:
                answer = nobody.request(method, url)
                assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), (method, url)
                if method != "get":
                    denied = reader.request(method, url)
                    assert (denied.status_code, denied.json()["code"]) == (403, "operation-denied"), (method, url)
        assert (nobody.get("/livez").status_code, nobody.get("/readyz").status_code) == (200, 200)
        assert nobody.post("/hooks/none").json()["code"] == "hook-not-found"
        assert operator.put("/domains/web1", json={}).status_code == 403
        assert operator.delete("/jobs/bj-x").json()["code"] == "job-not-found"
        assert reader.get("/jobs").status_code == 200
    finally:
        for client in (nobody, reader, operator):
            client.close()


def test_a_revoked_token_stops_working_at_once(service: Service) -> None:
    """Tokens are made and revoked by the command while the service runs."""
    environ = os.environ | {"BLOCKJOBD_STATE_DIR": str(service.state_dir)}

    def token(*arguments: str) -> str:
        command = [sys.executable, "-m", "app.cli.main", "token", *arguments]
        return subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout

    text = token("create", "--role", "read", "--name", "ci").strip().splitlines()[-1]
    headers = {"Authorization": f"Bearer {text}"}
    assert service.client.get("/jobs", headers=headers).status_code == 200
    assert "ci" in token("list")
    assert text not in token("list")
    token("revoke", "ci")
    assert service.client.get("/jobs", headers=headers).status_code == 401


def test_modes_of_what_lies_on_disk(service: Service) -> None:
    """The first token is for the service's user alone; the socket is for its group too."""
    assert stat.S_IMODE((service.state_dir / "token").stat().st_mode) == 0o600
    assert stat.S_IMODE(service.socket.stat().st_mode) == 0o660
