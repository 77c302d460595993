"""Every error is a problem document, whoever raised it."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path

import httpx
import pytest
from fastapi import Request, Response
from starlette.exceptions import HTTPException
from structlog.testing import capture_logs

from app.api.app import create_app
from app.api.codes import KINDS, refusals
from app.api.problems import problem_document
from app.api.render import JsonRender
from app.api.server import Server
from app.core.errors import Code, Problem
from app.engine.hub import Hub
from app.engine.ports.tokens import Role, Token
from app.journal.journal import SqliteJournal
from app.settings import Listen
from app.wiring import SystemClock
from tests.api.conftest import Api, problem


def test_every_code_has_its_row() -> None:
    """No code is without a status."""
    assert set(KINDS) == set(Code)
    assert all(400 <= kind.status < 600 for kind in KINDS.values())


def test_what_a_code_adds_stands_beside_the_rest() -> None:
    """A code's own members are members of the document, and can't replace the standard ones."""
    extra = {"job": "bj-1", "status": 200, "qmp": {"class": "GenericError", "desc": "no"}}
    document = problem_document(Problem(code=Code.JOB_CONFLICT, detail="wait", extra=extra), "/x").model_dump()
    assert document == {
        "type": "urn:blockjobd:problem:job-conflict",
        "title": "Another job is on the disk",
        "status": 409,
        "detail": "wait",
        "code": "job-conflict",
        "instance": "/x",
        "libvirt": "VIR_ERR_BLOCK_COPY_ACTIVE",
        "job": "bj-1",
        "qmp": {"class": "GenericError", "desc": "no"},
    }


def test_libvirt_is_left_out_where_it_has_no_such_error() -> None:
    """A member that says nothing is not there."""
    assert "libvirt" not in problem_document(Problem(code=Code.JOURNAL_FULL, detail="full"), "/x").model_dump()


def test_documented_refusals_are_grouped_by_status() -> None:
    """The OpenAPI document lists codes, not only statuses."""
    responses = refusals(Code.TOP_NOT_FOUND, Code.JOB_CONFLICT, Code.BASE_NOT_FOUND)
    assert {status: response["description"] for status, response in responses.items()} == {
        409: "`job-conflict`",
        422: "`top-not-found`, `base-not-found`",
    }


@pytest.mark.parametrize("path", ["/", "/nonsense", "/domains/", "/jobs/", "/jobs/x/nonsense", "/domains/a%2Fb"])
def test_unknown_routes(api: Api, path: str) -> None:
    """A path that is no route is a 404, with and without a token, and redirects nowhere."""
    problem(api.reader.get(path), 404, "not-found")
    problem(api.anonymous.get(path), 404, "not-found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/domains", "GET"),
        ("PATCH", "/domains/x", "DELETE, GET, PUT"),
        ("HEAD", "/jobs/x", "DELETE, GET, PATCH"),
        ("GET", "/jobs/x/pivot", "POST"),
        ("OPTIONS", "/livez", "GET"),
    ],
)
def test_wrong_methods(api: Api, method: str, path: str, allowed: str) -> None:
    """A wrong method is a 405 that names all right ones."""
    response = api.admin.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/domains/x", "domain-not-found"),
        ("/domains/x/disks", "domain-not-found"),
        ("/domains/x/disks/vda", "domain-not-found"),
        ("/domains/x/disks/%2Fimages%2Fs3.qcow2", "domain-not-found"),
        ("/domains/x/events", "domain-not-found"),
        ("/jobs/x", "job-not-found"),
        ("/jobs/x/history", "job-not-found"),
        ("/jobs/x/events", "job-not-found"),
    ],
)
def test_what_is_not_there(api: Api, path: str, code: str) -> None:
    """What does not exist is a 404 that says what; of a stream too, before it begins."""
    problem(api.reader.get(path), 404, code)


def test_waiting_for_no_job(api: Api) -> None:
    """A job that does not exist is not waited for."""
    problem(api.reader.get("/jobs/x", headers={"Prefer": "wait=30"}), 404, "job-not-found")


def test_every_answer_has_a_request_id(api: Api) -> None:
    """An id ties an answer to the log; one that the caller gives is kept if it is harmless."""
    ids = [api.anonymous.get(path).headers["x-request-id"] for path in ("/livez", "/jobs", "/nonsense")]
    assert len(set(ids)) == 3
    assert api.anonymous.get("/livez", headers={"X-Request-Id": "ci-42"}).headers["x-request-id"] == "ci-42"
    assert api.anonymous.get("/livez", headers={"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"


def test_bytes_that_are_no_http(api: Api) -> None:
    """Even to what is no request the answer is a problem document."""
    url = httpx.URL(api.background.url)
    with socket.create_connection((url.host, url.port or 0), timeout=10) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/problem+json" in answer
    assert b'"code":"invalid-request"' in answer


@pytest.mark.parametrize("status", [418, 502])
def test_a_status_that_nothing_answers_with(status: int) -> None:
    """An error of the framework that has no code is a fault of ours, not an answer without a code of its own."""
    app = create_app(None, lambda _text: None, version="1")

    async def fails(_request: Request) -> Response:
        raise HTTPException(status, "unheard of")

    app.router.add_route("/fails", fails)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return await client.get("/fails")

    with capture_logs() as logs:
        response = asyncio.run(ask())
    document = problem(response, 500, "internal-error")
    assert document["request_id"] == response.headers["x-request-id"]
    assert "unheard of" not in response.text
    assert [entry["exc_info"] for entry in logs if entry["log_level"] == "error"] == [True]


def test_a_fault_of_ours(tmp_path: Path) -> None:
    """A fault is a 500 with a request id; what happened stands in the log under that id, and nowhere else."""
    journal = SqliteJournal.open(tmp_path, JsonRender(), SystemClock())
    # Without a service every use case is a fault.
    app = create_app(None, lambda _text: Token(name="t", role=Role.ADMIN, created_at=0), version="1")
    server = Server(app, Hub(journal, SystemClock()), Listen(port=0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    with capture_logs() as logs:
        thread.start()
        with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer x"}, timeout=10) as client:
            response = client.get("/jobs", headers={"X-Request-Id": "the-id"})
        server.should_exit = True
        thread.join(10)
    journal.close()
    document = problem(response, 500, "internal-error")
    assert document["request_id"] == response.headers["x-request-id"] == "the-id"
    assert "NoneType" not in response.text
    assert [entry["exc_info"] for entry in logs if entry["log_level"] == "error"] == [True]
