"""Who may do what, and that it is judged before anything else."""

from __future__ import annotations

import httpx
import pytest

from tests.api.conftest import Api, problem

COMMIT = "/domains/nobody/disks/vda/commit"
BROKEN = b'{"base": '
JSON_TYPE = {"Content-Type": "application/json"}

READS = ["/domains", "/domains/x", "/domains/x/disks", "/domains/x/disks/vda", "/jobs", "/jobs/x", "/jobs/x/history"]
STREAMS = ["/events", "/domains/x/events", "/jobs/x/events"]
ABOUT = ["/metrics", "/openapi.json", "/docs"]
STEERS = [
    ("POST", COMMIT),
    ("DELETE", "/jobs/x"),
    ("PATCH", "/jobs/x"),
    ("POST", "/jobs/x/pivot"),
    ("POST", "/jobs/x/pause"),
    ("POST", "/jobs/x/resume"),
]
MANAGES = [("PUT", "/domains/x"), ("DELETE", "/domains/x")]


@pytest.mark.parametrize("path", READS + STREAMS + ABOUT)
def test_reads_take_a_token(api: Api, path: str) -> None:
    """Without a token nothing is shown, not even whether it exists."""
    response = api.anonymous.get(path)
    problem(response, 401, "unauthenticated")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "header",
    ["Bearer", "Bearer nonsense", "Bearer a b", "Basic YTpi", "nonsense", "Bearer \N{LATIN SMALL LETTER E WITH ACUTE}"],
)
def test_unknown_tokens(api: Api, header: str) -> None:
    """A header that holds no known token counts as none."""
    response = api.anonymous.get("/jobs", headers={"Authorization": header.encode("latin-1")})  # pyright: ignore[reportArgumentType]
    problem(response, 401, "unauthenticated")


def test_the_scheme_ignores_case(api: Api) -> None:
    """The name of the scheme is case-insensitive (RFC 9110, 11.1)."""
    text = api.reader.headers["authorization"].partition(" ")[2]
    assert api.anonymous.get("/jobs", headers={"Authorization": f"bearer {text}"}).status_code == 200


@pytest.mark.parametrize(("method", "path"), STEERS + MANAGES)
def test_a_reader_changes_nothing(api: Api, method: str, path: str) -> None:
    """A `read` token is refused as a read-only connection of libvirt is."""
    document = problem(api.reader.request(method, path), 403, "operation-denied")
    assert document["libvirt"] == "VIR_ERR_OPERATION_DENIED"


@pytest.mark.parametrize(("method", "path"), MANAGES)
def test_an_operator_manages_no_domains(api: Api, method: str, path: str) -> None:
    """Registering and forgetting domains is for `admin`."""
    problem(api.operator.request(method, path), 403, "operation-denied")


@pytest.mark.parametrize("role", ["read", "operate", "admin"])
def test_each_role_includes_those_before_it(api: Api, role: str) -> None:
    """Everybody with a token may read."""
    assert api.as_role(role).get("/jobs").json() == {"items": [], "next": None}


@pytest.mark.parametrize("body", [BROKEN, b'{"bandwidth": "x"}', b"\xff", b"", b"x" * (2 << 20)])
def test_the_token_is_judged_before_the_body(api: Api, body: bytes) -> None:
    """What is wrong with a body is told only to those who may send one."""
    problem(api.anonymous.post(COMMIT, content=body, headers=JSON_TYPE), 401, "unauthenticated")
    problem(api.reader.post(COMMIT, content=body, headers=JSON_TYPE), 403, "operation-denied")


def test_the_body_is_judged_before_the_domain(api: Api) -> None:
    """An invalid body is a 422 whether the domain exists or not."""
    problem(api.operator.post(COMMIT, content=BROKEN, headers=JSON_TYPE), 422, "invalid-request")
    problem(api.operator.post(COMMIT, json={"base": "a", "flags": ["shallow"]}), 422, "shallow-with-base")
    problem(api.operator.post(COMMIT, json={}), 404, "domain-not-found")


def test_probes_take_no_token(api: Api) -> None:
    """Whoever watches over the service needs no token."""
    assert api.anonymous.get("/livez").json()["status"] == "ok"
    assert api.anonymous.get("/readyz").json() == {
        "status": "ok",
        "checks": {"journal": "ok", "shutdown": "ok", "tasks": "ok"},
    }


def test_a_token_in_the_address_is_no_token(api: Api) -> None:
    """Addresses end up in logs."""
    text = api.reader.headers["authorization"].partition(" ")[2]
    response: httpx.Response = api.anonymous.get("/jobs", params={"token": text, "access_token": text})
    problem(response, 401, "unauthenticated")
