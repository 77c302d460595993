"""Events of real jobs over server-sent events: complete, in order, once, and ended cleanly."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.conftest import Boot
from tests.support.chains import CLUSTER, MIB, Chain, blockdev, build_chain, drive
from tests.support.qemu import Qemu
from tests.support.service import JSON, Service, sse

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=5)]

INTERMEDIATE = ["job.queued", "job.started", "job.completed"]
ACTIVE = ["job.queued", "job.started", "job.ready", "job.pivoting", "job.completed"]


def stored(events: list[JSON]) -> list[JSON]:
    """Those that have an id."""
    return [event for event in events if event["event"] != "job.progress"]


def test_the_story_of_each_kind_of_job(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """A job's stream starts with its first event, tells all of it in order, and is ended by the server."""
    boot(blockdev(chain))
    active: dict[str, Any] = {"flags": ["active"], "on_ready": "pivot"}
    bodies: list[tuple[dict[str, Any], list[str]]] = [({"top": chain.at(1)}, INTERMEDIATE), (active, ACTIVE)]
    for body, story in bodies:
        job = service.started(domain, **body)
        with sse(service.client, f"/jobs/{job['id']}/events") as stream:
            events = stored(list(stream))
        assert [event["event"] for event in events] == story
        ids = [int(event["id"]) for event in events]
        assert ids == sorted(set(ids))
        assert [event["data"] for event in events] == service.history(job["id"])
        with sse(service.client, f"/jobs/{job['id']}/events?types=job.started") as stream:
            assert [event["event"] for event in stream] == ["job.started"]


def test_an_event_is_a_cloudevent_that_carries_the_job(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """The data line has the members that CloudEvents names, and in `data` the job as GET shows it."""
    boot(drive(chain))
    job = service.started(domain, top=chain.at(1))
    service.wait_for_job(job["id"])
    with sse(service.client, f"/jobs/{job['id']}/events") as stream:
        last = list(stream)[-1]
    data = last["data"]
    assert data == {
        "specversion": "1.0",
        "id": last["id"],
        "source": f"/domains/{domain}/disks/vda",
        "type": "job.completed",
        "subject": f"jobs/{job['id']}",
        "time": data["time"],
        "datacontenttype": "application/json",
        "data": service.job(job["id"]),
    }
    assert data["time"].endswith("Z")


def test_one_who_was_away_gets_exactly_what_it_missed(service: Service, boot: Boot, domain: str, chain: Chain) -> None:
    """With its last id, by header or parameter, a subscriber gets all that came after, once, in order."""
    boot(drive(chain))
    first = service.started(domain, top=chain.at(3), flags=["shallow"])
    service.wait_for_job(first["id"])
    last_seen = service.history(first["id"])[0]["id"]
    second = service.started(domain, top=chain.at(2), flags=["shallow"])
    service.wait_for_job(second["id"])
    missed = service.history(first["id"])[1:] + service.history(second["id"])
    for url, headers in ((f"?after={last_seen}", {}), ("", {"Last-Event-ID": last_seen})):
        with sse(service.client, f"/domains/{domain}/events{url}", headers) as stream:
            got = [next(stream) for _ in missed]
        assert [event["data"] for event in got] == missed


def test_progress_is_told_and_not_stored(service: Service, boot: Boot, domain: str, folder: Path) -> None:
    """While a job runs, its progress comes at most twice a second, without an id, and leaves no trace."""
    chain = build_chain(folder / "large", size=16 * MIB, data=128 * CLUSTER)
    boot(drive(chain))
    job = service.started(domain, top=chain.at(1), bandwidth=MIB, flags=["bandwidth_bytes"])
    times: list[float] = []
    with sse(service.client, f"/jobs/{job['id']}/events") as stream:
        for event in stream:
            if event["event"] == "job.progress":
                assert "id" not in event
                progress = event["data"]["data"]["progress"]
                assert progress["current"] <= progress["end"]
                assert progress["percent"] < 100
                times.append(time.monotonic())
                if len(times) == 4:
                    service.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0})
    assert len(times) >= 4
    assert times[3] - times[0] > 1.0
    assert [event["type"] for event in service.history(job["id"])] == INTERMEDIATE


@pytest.mark.parametrize(
    ("url", "headers", "status", "code"),
    [
        ("/events?types=job.finished", {}, 422, "invalid-request"),
        ("/events?after=-1", {}, 422, "invalid-request"),
        ("/events", {"Last-Event-ID": "abc"}, 422, "invalid-request"),
        ("/domains/nobody/events", {}, 404, "domain-not-found"),
        ("/jobs/bj-none/events", {}, 404, "job-not-found"),
    ],
)
def test_what_can_be_refused_is_refused_first(
    service: Service, url: str, headers: dict[str, str], status: int, code: str
) -> None:
    """A stream that can't be served is refused with a problem, and not with a 200 that ends."""
    answer = service.client.get(url, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_a_quiet_stream_shows_that_it_lives(service: Service) -> None:
    """On a stream without events a comment line comes at least every 15 s."""
    begin = time.monotonic()
    with service.client.stream("GET", "/events?types=job.lost", timeout=20) as response:
        line = next(line for line in response.iter_lines() if line)
    assert line.startswith(":")
    assert time.monotonic() - begin < 15


def test_at_shutdown_the_streams_end_and_the_service_is_gone_within_5_s(tmp_path: Path, chain: Chain) -> None:
    """SIGTERM with open streams, also on an unfinished job: each ends cleanly, the exit status is 0."""
    with Service(tmp_path / "own") as own, Qemu(own.qmp_dir / "web1.qmp", drive(chain)):
        own.wait_for_domain("web1")
        job = own.started("web1", flags=["active"])
        own.wait_for_job(job["id"], "ready")
        ends: list[str] = []

        def follow(url: str) -> None:
            with (
                httpx.Client(
                    transport=httpx.HTTPTransport(uds=str(own.socket)), base_url="http://x", headers=own.client.headers
                ) as client,
                sse(client, url) as stream,
            ):
                for _event in stream:
                    pass
            ends.append(url)

        urls = ["/events", "/domains/web1/events", f"/jobs/{job['id']}/events"]
        followers = [threading.Thread(target=follow, args=(url,)) for url in urls]
        for follower in followers:
            follower.start()
        deadline = time.monotonic() + 10
        while "blockjobd_event_subscribers 3.0" not in own.client.get("/metrics").text:
            assert time.monotonic() < deadline
        begin = time.monotonic()
        assert own.stop() == 0
        assert time.monotonic() - begin < 5
        for follower in followers:
            follower.join(5)
        assert sorted(ends) == sorted(urls)
