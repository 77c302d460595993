"""Streams over HTTP: their framing, their beginnings and their ends."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import httpx
import pytest
from httpx_sse import ServerSentEvent, connect_sse

from app.engine.ports.tokens import Role
from app.journal.tokens import Tokens
from app.settings import load
from app.wiring import SystemClock
from tests.api.conftest import Api, served

STREAMS = 20


def register(api: Api, domain: str) -> None:
    """Have events of a domain told."""
    assert api.admin.put(f"/domains/{domain}", json={"qmp": {"unix": f"/nowhere/{domain}"}}).status_code == 201


def until(events: Iterator[ServerSentEvent], type_: str) -> list[ServerSentEvent]:
    """The events up to the first of that type."""
    got: list[ServerSentEvent] = []
    for event in events:
        got.append(event)
        if event.event == type_:
            return got
    raise AssertionError(f"the stream ended after {got}")


def last_id(api: Api) -> int:
    """The id of the last event that there is."""
    with connect_sse(api.reader, "GET", "/events", params={"types": "domain.added"}) as source:
        register(api, f"mark-{time.monotonic_ns()}")
        return int(next(source.iter_sse()).id)


def test_an_event_is_a_cloud_event_under_its_id(api: Api) -> None:
    """The id of the line, of the document, and the type are the same in both."""
    with connect_sse(api.reader, "GET", "/domains/none/events") as source:
        assert source.response.status_code == 404
    with connect_sse(api.reader, "GET", "/events", params={"types": "domain.added"}) as source:
        assert source.response.headers["content-type"].startswith("text/event-stream")
        assert source.response.headers["cache-control"] == "no-cache"
        register(api, "framed")
        event = next(source.iter_sse())
    document: dict[str, Any] = json.loads(event.data)
    assert (event.event, document["type"], document["id"]) == ("domain.added", "domain.added", event.id)
    assert (document["source"], document["subject"]) == ("/domains/framed", "domains/framed")
    assert document["data"]["id"] == "framed"


@pytest.mark.parametrize("how", ["header", "parameter", "both"])
def test_a_client_gets_what_it_missed(api: Api, how: str) -> None:
    """From its last id on it gets everything once, and then what happens; the header goes before the parameter."""
    before = last_id(api)
    for name in ("one", "two"):
        register(api, f"missed-{how}-{name}")
    headers = {"Last-Event-ID": str(before)} if how in {"header", "both"} else {}
    params = {"after": {"parameter": before, "both": 0}.get(how, before)} if how != "header" else {}
    with connect_sse(api.reader, "GET", "/events", headers=headers, params=params) as source:
        events = source.iter_sse()
        added: list[ServerSentEvent] = []
        while len(added) < 2:
            added += [event for event in until(events, "domain.added") if event.event == "domain.added"]
        register(api, f"missed-{how}-three")
        added.append(until(events, "domain.added")[-1])
    assert [json.loads(event.data)["data"]["id"] for event in added] == [
        f"missed-{how}-{name}" for name in ("one", "two", "three")
    ]


def test_an_id_from_the_future_is_reset(api: Api) -> None:
    """Whoever knows an id that does not exist is told from where on nothing is missing."""
    with connect_sse(api.reader, "GET", "/events", params={"after": 10**12}) as source:
        event = next(source.iter_sse())
    assert event.event == "stream.reset"
    assert int(event.id) < 10**12


def test_a_subscriber_that_leaves_is_forgotten(api: Api) -> None:
    """Closed connections do not pile up."""
    with connect_sse(api.reader, "GET", "/events"):
        assert "blockjobd_event_subscribers 1.0" in api.reader.get("/metrics").text
    deadline = time.monotonic() + 10
    while "blockjobd_event_subscribers 0.0" not in api.reader.get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_shutdown_ends_streams_cleanly(tmp_path: Path) -> None:
    """Every stream ends as a whole answer, and the service within 5 s, also while somebody waits."""
    socket = tmp_path / "api.sock"
    environ = {"BLOCKJOBD_STATE_DIR": str(tmp_path / "state"), "BLOCKJOBD_LISTEN": f"unix:{socket}"}
    with served(load(None, environ)) as background, ThreadPoolExecutor(STREAMS) as threads:
        assert background.url == f"unix:{socket}"
        assert socket.stat().st_mode & 0o777 == 0o660
        with Tokens.open(tmp_path / "state", SystemClock()) as tokens:
            text = tokens.create(Role.READ, "reader")

        connected = Barrier(STREAMS + 1)

        def follow() -> list[str]:
            transport = httpx.HTTPTransport(uds=str(socket))
            headers = {"Authorization": f"Bearer {text}"}
            client = httpx.Client(transport=transport, base_url="http://x", headers=headers, timeout=20)
            with client, connect_sse(client, "GET", "/events") as source:
                assert source.response.status_code == 200
                connected.wait(10)
                return [event.event for event in source.iter_sse()]

        streams = [threads.submit(follow) for _ in range(STREAMS)]
        connected.wait(10)
        begin = time.monotonic()
        background.stop()
        assert [stream.result(10) for stream in streams] == [[]] * STREAMS
        assert background.ended.wait(10)
        assert time.monotonic() - begin < 5
    assert not socket.exists()
