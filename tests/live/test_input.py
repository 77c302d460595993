"""Bytes that no client library would send: each is answered or ended, costs little, and leaves no trace of a fault."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.live.test_peers import open_files, status_of
from tests.support.service import JSON, Service

pytestmark = pytest.mark.live

MIB = 1 << 20
TAKERS = [
    ("PUT", "/domains/x"),
    ("POST", "/domains/x/disks/vda/commit"),
    ("PATCH", "/jobs/bj-x"),
]
"""Every route that takes a body."""

FEW = settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose log has no fault in it at the end, and which has no more open than at the beginning."""
    with Service(tmp_path_factory.mktemp("host")) as running:
        running.client.get("/jobs")
        before = open_files(running)
        yield running
        running.client.get("/jobs")
        assert open_files(running) <= before
        for line in running.log().splitlines():
            assert json.loads(line)["level"] in ("info", "warning"), line


@contextmanager
def connected(host: Service) -> Generator[socket.socket]:
    """A connection of bytes."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(host.socket))
        yield client


def head(method: str, path: str, host: Service | None, *headers: bytes) -> bytes:
    """The head of a request, with the admin's token if a `host` is given."""
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: x", b"Content-Type: application/json", *headers]
    if host is not None:
        lines.append(b"Authorization: Bearer " + (host.state_dir / "token").read_bytes().strip())
    return b"\r\n".join(lines) + b"\r\n\r\n"


def answer(client: socket.socket) -> tuple[int, JSON]:
    """The next answer: its status and its JSON."""
    with client.makefile("rb") as file:
        status = int(file.readline().split()[1])
        length = 0
        while (line := file.readline().strip().lower()) != b"":
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        return status, json.loads(file.read(length) or b"{}")


def ended(client: socket.socket) -> bool:
    """Whether the server ends the connection."""
    with suppress(ConnectionError):
        while client.recv(65536):
            pass
    return True


# Too much -------------------------------------------------------------------------------------------------------------


def announced(_client: socket.socket) -> None:
    """Not a byte of it comes."""


def chunked(client: socket.socket) -> None:
    """A bit more than is allowed comes, and no end."""
    for _ in range(17):
        client.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")


@pytest.mark.parametrize(("method", "path"), TAKERS)
@pytest.mark.parametrize(
    ("header", "send"),
    [
        (b"Content-Length: 1048577", announced),
        (b"Content-Length: 9999999999999999", announced),
        (b"Content-Length: 9999999999\r\nExpect: 100-continue", announced),
        (b"Transfer-Encoding: chunked", chunked),
    ],
    ids=["announced", "huge", "asked-first", "chunked"],
)
def test_too_large(
    host: Service, *, method: str, path: str, header: bytes, send: Callable[[socket.socket], None]
) -> None:
    """A body over 1 MiB is refused before it is there; without a good token that is what is told."""
    with connected(host) as client:
        client.sendall(head(method, path, None, header))
        send(client)
        assert (answer(client)[0]) == 401
    with connected(host) as client:
        client.sendall(head(method, path, host, header))
        send(client)
        status, problem = answer(client)
        assert (status, problem["code"], problem["status"]) == (413, "payload-too-large", 413)


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /",
        b"GET /livez?",
        b"GET /livez HTTP/1.1\r\n",
        b"GET /livez HTTP/1.1\r\nX: ",
        b"PUT /domains/x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"PUT /domains/x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ",
        b"GET /livez HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
    ],
    ids=["path", "query", "header", "value", "chunk-size", "trailer", "body-of-a-get"],
)
def test_without_end(host: Service, begin: bytes) -> None:
    """What never ends is ended, with or without a token, and none of it is kept."""
    before = status_of(host, "VmHWM")
    with connected(host) as client:
        client.sendall(begin)
        with suppress(ConnectionError):
            for _ in range(40):
                client.sendall(b"0" * MIB)
        assert ended(client)
    # An endless value used to take as much memory as it had bytes, and minutes in which nobody was served.
    assert status_of(host, "VmHWM") - before < 64 * 1024
    assert host.client.get("/livez").status_code == 200


def test_many_headers(host: Service) -> None:
    """A head that is too large is a problem document, also in many small headers."""
    with connected(host) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\n")
        with suppress(ConnectionError):
            for number in range(20_000):
                client.sendall(b"X-%d: 1\r\n" % number)
        assert answer(client)[0] == 400


# Lies -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), TAKERS)
def test_less_than_announced(host: Service, *, method: str, path: str) -> None:
    """Who hangs up in the middle of a body has done nothing, and is no fault."""
    for how in (socket.SHUT_WR, socket.SHUT_RDWR):
        with connected(host) as client:
            client.sendall(head(method, path, host, b"Content-Length: 100") + b"{}")
            client.shutdown(how)
    assert host.client.get("/domains/x").status_code == 404


@pytest.mark.parametrize(
    "headers",
    [
        [b"Content-Length: -1"],
        [b"Content-Length: 1e3"],
        [b"Content-Length: 99999999999999999999999"],
        [b"Content-Length: 2", b"Content-Length: 3"],
        [b"Content-Length: 2", b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: nonsense"],
        [b"Transfer-Encoding: chunked, chunked"],
        [b": no name"],
        [b"Null: \0"],
        [b" folded: x"],
    ],
    ids=repr,
)
def test_heads_that_lie(host: Service, headers: list[bytes]) -> None:
    """A length that can't be is refused, and the connection ended: what follows may be anything."""
    with connected(host) as client:
        client.sendall(head("PUT", "/domains/x", host, *headers) + b"{}")
        client.shutdown(socket.SHUT_WR)
        status, problem = answer(client)
        assert (400 <= status < 500, problem["status"]) == (True, status)
        assert ended(client)
    assert host.client.get("/domains/x").status_code == 404


def test_more_than_announced(host: Service) -> None:
    """What follows a body is another request, and refused if it is none."""
    with connected(host) as client:
        client.sendall(head("PATCH", "/jobs/bj-x", host, b"Content-Length: 2") + b"{}garbage\r\n\r\n")
        assert answer(client)[0] in (400, 422)
        assert ended(client)


# Anything -------------------------------------------------------------------------------------------------------------

NUMBERS = st.sampled_from([b"NaN", b"Infinity", b"-0", b"1e999", b"9" * 30, b"9223372036854775808", b"1.5", b"-1"])
FIELDS = st.sampled_from(
    [*b"base top bandwidth flags on_ready on_error backing_file callback qmp unix tcp disks image x".split()]
)
VALUES = st.recursive(
    NUMBERS
    | st.sampled_from(
        [b"null", b"true", b"{", b"]", b"", b'"', b'"\\ud800"', b'"\\u0000"', b'"\xff"', b"\xef\xbb\xbf1"]
    )
    | st.binary(max_size=8)
    | st.text(max_size=8).map(lambda text: json.dumps(text).encode()),
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: b"[" + b",".join(items) + b"]")
        # Not a dictionary: a name may be there twice.
        | st.lists(st.tuples(FIELDS, inner), max_size=4).map(
            lambda pairs: b"{" + b",".join(b'"' + name + b'":' + value for name, value in pairs) + b"}"
        )
    ),
    max_leaves=12,
)
KINDS = st.sampled_from(
    [
        "application/json",
        "application/json; charset=utf-16",
        "text/plain",
        "multipart/form-data",
        "a/b+json",
        "",
        "\xff",
    ]
)


@FEW
@given(route=st.sampled_from(TAKERS), body=VALUES, kind=KINDS, chunk=st.integers(0, 7))
def test_any_body(host: Service, route: tuple[str, str], body: bytes, kind: str, chunk: int) -> None:
    """Whatever a body holds and however it comes, it is understood, or refused with what is wrong with it."""
    method, path = route
    pieces = [body[at : at + chunk] for at in range(0, len(body), chunk)] if chunk else []
    answered = host.client.request(
        method,
        path,
        content=iter(pieces) if chunk else body,
        headers=[(b"Content-Type", kind.encode("latin-1"))],  # pyright: ignore[reportArgumentType]
    )
    assert answered.status_code in (201, 200, 404, 422), answered.text
    if answered.status_code >= 400:
        problem = answered.json()
        assert (answered.headers["content-type"], problem["status"]) == (
            "application/problem+json",
            answered.status_code,
        )
        if problem["code"] == "invalid-request":
            assert all("pointer" in error and error["detail"] for error in problem["errors"]), problem
            assert problem["errors"]
    else:
        assert host.client.delete(path).status_code == 204


HEADERS = st.sampled_from(
    ["Prefer", "Last-Event-ID", "Authorization", "If-Match", "X-Request-Id", "Accept", "Cookie", "Content-Type"]
)


@FEW
@given(
    path=st.sampled_from(["/jobs/bj-x", "/jobs", "/events?after=-1", "/domains/x/disks/vda"]),
    name=HEADERS,
    value=st.binary(max_size=40).map(lambda raw: bytes(byte for byte in raw if byte not in b"\r\n\0").strip())
    | st.sampled_from([b"x" * 60_000, b"wait=" + b"9" * 60_000, b"Bearer " + b"x" * 60_000, b"9" * 60_000]),
)
def test_any_header(host: Service, path: str, name: str, value: bytes) -> None:
    """Whatever stands in a header, the answer is one that the route has without it, or says what is wrong."""
    with connected(host) as client:
        own = host if name != "Authorization" else None
        client.sendall(head("GET", path, own, name.encode() + b": " + value))
        status, problem = answer(client)
        assert status in (200, 400, 401, 404, 422), problem
        if status >= 400:
            assert (problem["status"], problem["type"]) == (status, f"urn:blockjobd:problem:{problem['code']}")


@FEW
@given(
    before=st.sampled_from(["/domains/", "/jobs/", "/domains/x/disks/", "/jobs?domain=", "/domains?cursor=", "/"]),
    rest=st.lists(
        st.sampled_from(
            [b"%00", b"%2F", b"%2e%2e", b"%", b"%zz", b"%ff", b"%F0%9F%98%80", b"..", b"/", b"//", b";", b"?"]
        )
        | st.binary(min_size=1, max_size=3).map(lambda raw: bytes(33 + byte % 94 for byte in raw if byte % 94 != 2)),
        max_size=6,
    ).map(b"".join),
)
def test_any_path(host: Service, before: str, rest: bytes) -> None:
    """Whatever stands in a path or a query, percent-encoded or not, leads somewhere, or to a problem document."""
    with connected(host) as client:
        client.sendall(head("GET", before + rest.decode("latin-1"), host))
        status, problem = answer(client)
        assert status in (200, 400, 404, 405, 422), problem
        if status >= 400:
            assert problem["status"] == status
