"""Who may do what: every route asks for a token and its role."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

from tests.support.service import Service


def test_every_route_needs_a_token_and_its_role(service: Service) -> None:
    """Without a token each route is a 401, and a reader may change nothing; two are free."""
    document = service.client.get("/openapi.json").json()
    nobody, reader, operator = (service.as_role(role) for role in ("read", "read", "operate"))
    del nobody.headers["Authorization"]
    try:
        for path, methods in document["paths"].items():
            url = path.replace("{domain}", "web1").replace("{disk}", "vda").replace("{job_id}", "bj-x")
            for method in methods:
                answer = nobody.request(method, url)
                if path in ("/livez", "/readyz"):
                    assert answer.status_code == 200
                    continue
                assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), (method, url)
                if method != "get":
                    denied = reader.request(method, url)
                    assert (denied.status_code, denied.json()["code"]) == (403, "operation-denied"), (method, url)
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
