"""What subscribers are told of a real job on a real QEMU, when, and how often."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.live.conftest import NewChain, chain_spec
from tests.support.chains import MIB, Chain, Templates, blockdev, build_chain
from tests.support.qemu import Qemu
from tests.support.service import ENDED, JSON, Service, sse

pytestmark = [pytest.mark.live, pytest.mark.chain(layers=5)]

INTERMEDIATE = ["job.queued", "job.started", "job.completed"]
ACTIVE = ["job.queued", "job.started", "job.ready", "job.pivoting", "job.completed"]
LAST = tuple(f"job.{state}" for state in ENDED)
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service for the tests that share one."""
    with Service(tmp_path_factory.mktemp("host")) as running:
        yield running


@contextmanager
def machine(service: Service, chain: Chain, name: str) -> Generator[Qemu]:
    """A QEMU with the chain, which the service has found; at the end all has been told of it."""
    before = last_id(service)
    with Qemu(service.qmp_dir / f"{name}.qmp", blockdev(chain)) as qemu:
        wait_until_told(service, "domain.connected", name, before)
        yield qemu
    forget(service, name, before)


def forget(service: Service, name: str, before: int) -> None:
    """A machine that was found stays, as off, until somebody has it forgotten."""
    service.wait_for_domain(name, "shutoff")
    assert service.client.delete(f"/domains/{name}").status_code == 204
    wait_until_told(service, "domain.removed", name, before)


def wait_until_told(service: Service, type_: str, domain: str, after: int) -> None:
    """Wait for an event of a domain. What GET shows of a domain may show a moment before it is told."""
    with sse(service.client, f"/events?after={after}&types={type_}") as events:
        assert any(event["data"]["data"]["id"] == domain for event in events)


@pytest.fixture
def vm(host: Service, chain: Chain, request: pytest.FixtureRequest) -> Iterator[str]:
    """A domain with five layers; its name."""
    name = f"vm{abs(hash(request.node.nodeid)) % 10**9}"
    with machine(host, chain, name):
        yield name


def merged(service: Service, domain: str, **body: Any) -> JSON:
    """A commit that has ended well."""
    job = service.wait_for_job(service.started(domain, **body)["id"])
    assert job["state"] == "completed", job
    return job


def stored(events: Iterator[JSON]) -> Iterator[JSON]:
    """The events that have an id."""
    return (event for event in events if "id" in event)


def until(events: Iterator[JSON], type_: str, job: str | None = None) -> list[JSON]:
    """The stored events up to the first of that type (and of that job)."""
    got: list[JSON] = []
    for event in stored(events):
        got.append(event)
        if event["event"] == type_ and job in (None, event["data"]["data"]["id"]):
            return got
    raise AssertionError(f"the stream ended after {[event['event'] for event in got]}")


def types(events: list[JSON]) -> list[str]:
    return [event["event"] for event in events]


def ids(events: list[JSON]) -> list[int]:
    return [int(event["id"]) for event in events]


def last_id(service: Service) -> int:
    """The id of the last event that there is: an id from the future is answered with it."""
    with sse(service.client, f"/events?after={10**15}") as events:
        return int(next(events)["id"])


# What a job tells ----------------------------------------------------------------------------------------------------


def test_aborted_and_refused_jobs_tell_their_end(host: Service, vm: str) -> None:
    """A job that is aborted tells that it is, then that it was canceled."""
    job = host.started(vm, flags=["active"])
    host.wait_for_job(job["id"], "ready")
    assert host.client.delete(f"/jobs/{job['id']}").status_code == 202
    with sse(host.client, f"/jobs/{job['id']}/events") as stream:
        assert types(list(stored(stream))) == [*ACTIVE[:3], "job.aborting", "job.canceled"]


def test_streams_by_what_they_are_of(host: Service, new_chain: NewChain, tmp_path: Path) -> None:
    """/events tells of everything, a domain's stream of the domain and its jobs, a job's of the job alone."""
    one_chain, other_chain = new_chain(tmp_path / "left"), new_chain(tmp_path / "right")
    with machine(host, one_chain, "left"), machine(host, other_chain, "right"):
        with (
            sse(host.client, "/events") as everything,
            sse(host.client, "/domains/left/events") as left,
            sse(host.client, "/domains/right/events") as right,
        ):
            one = merged(host, "left", top="vda[3]")
            two = merged(host, "right", top="vda[3]")
            three = merged(host, "left", flags=["active"], on_ready="pivot")
            seen = until(everything, "job.completed", three["id"])
            of_left = until(left, "job.completed", three["id"])
            of_right = until(right, "job.completed", two["id"])
        assert types(of_left) == INTERMEDIATE + ACTIVE
        assert types(of_right) == INTERMEDIATE
        assert sorted(ids(of_left) + ids(of_right)) == ids(seen)
        for job in (one, two, three):
            with sse(host.client, f"/jobs/{job['id']}/events") as stream:
                own = list(stored(stream))
            assert own == [event for event in seen if event["data"]["data"]["id"] == job["id"]]


def test_what_a_domain_tells(host: Service, chain: Chain) -> None:
    """A domain tells that it came, that it can be reached, that it can't any more, and that it went."""
    after = last_id(host)
    with machine(host, chain, "teller") as qemu:
        qemu.kill()
        host.wait_for_domain("teller", "shutoff")
    with sse(host.client, f"/events?after={after}") as stream:
        events = until(stream, "domain.removed")
    assert types(events) == ["domain.added", "domain.connected", "domain.disconnected", "domain.removed"]
    for event in events:
        told = event["data"]
        assert (told["source"], told["subject"], told["data"]["id"]) == ("/domains/teller", "domains/teller", "teller")
    connected, disconnected = (event["data"]["data"]["state"] for event in events[1:3])
    # A process that is ending lets go of its socket before it has ended, and only the end makes it `shutoff`.
    assert (connected, disconnected in {"unreachable", "shutoff"}) == ("paused", True)
    assert events[1]["data"]["data"]["disks"] == ["vda"]


# What was missed -----------------------------------------------------------------------------------------------------


def test_what_was_missed(host: Service, vm: str) -> None:
    """From any id on, exactly the later events come, once and in order, then what happens next, without a seam."""
    after = last_id(host)
    job = merged(host, vm, flags=["active"], on_ready="pivot", base="vda[2]")
    history = [event["id"] for event in host.history(job["id"])]

    def stream(id_: str) -> tuple[str, dict[str, str]]:
        return ("/events", {"Last-Event-ID": id_}) if int(id_) % 2 else (f"/events?after={id_}", {})

    for position, id_ in enumerate([str(after), *history]):
        url, headers = stream(id_)
        with sse(host.client, url, headers) as events:
            missed = stored(events)
            assert [next(missed)["id"] for _ in history[position:]] == history[position:]
    url, headers = stream(str(after))
    with sse(host.client, url, headers) as events:
        second = host.started(vm, flags=["active"], on_ready="pivot")
        got = until(events, "job.completed", second["id"])
    assert [event["id"] for event in got] == history + [event["id"] for event in host.history(second["id"])]
    # A client that leaves in the middle and comes back with its last id has each event once.
    together: list[str] = []
    resumed = str(after)
    while len(together) < len(got):
        url, headers = stream(resumed)
        with sse(host.client, url, headers) as events:
            missed = stored(events)
            together += [next(missed)["id"] for _ in range(min(2, len(got) - len(together)))]
        resumed = together[-1]
    assert together == [event["id"] for event in got]


def test_the_stream_of_a_job_begins_and_ends_with_it(host: Service, vm: str) -> None:
    """It starts with the job's first event, whenever it is opened, and the server ends it after the last."""
    job = host.started(vm, flags=["active"])
    host.wait_for_job(job["id"], "ready")
    url = f"/jobs/{job['id']}/events"
    with ExitStack() as stack:
        late = stack.enter_context(sse(host.client, url))
        only_first = stack.enter_context(sse(host.client, url + "?types=job.queued"))
        only_last = stack.enter_context(sse(host.client, url + "?types=job.completed,job.failed"))
        after_ready = stack.enter_context(sse(host.client, url + f"?after={host.history(job['id'])[-1]['id']}"))
        assert host.client.post(f"/jobs/{job['id']}/pivot").status_code == 202
        assert types(list(stored(late))) == ACTIVE
        assert types(list(stored(only_first))) == ["job.queued"]
        assert types(list(stored(only_last))) == ["job.completed"]
        assert types(list(stored(after_ready))) == ["job.pivoting", "job.completed"]
    # After the job's end the same streams end by themselves too.
    host.wait_for_job(job["id"])
    last = host.history(job["id"])[-1]["id"]
    for query, expected in (("", ACTIVE), ("?types=job.ready", ["job.ready"]), (f"?after={last}", [])):
        with sse(host.client, url + query) as events:
            assert types(list(events)) == expected


def test_filters_by_type(host: Service, vm: str) -> None:
    """A stream with `types` tells of these alone, and misses none of them."""
    after = last_id(host)
    with sse(host.client, f"/domains/{vm}/events?types=job.queued,job.completed") as events:
        jobs = [merged(host, vm, top=f"vda[{top}]", base=f"vda[{top + 1}]") for top in (3, 2)]
        got = [next(events) for _ in range(4)]
    assert types(got) == ["job.queued", "job.completed"] * 2
    with sse(host.client, f"/events?after={after}&types=job.completed") as events:
        assert [next(events)["data"]["data"]["id"] for _ in jobs] == [job["id"] for job in jobs]


@pytest.fixture(scope="module")
def known(
    host: Service, templates: Templates, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[str, str]]:
    """A domain, and a job of it that has ended."""
    chain = templates.copy(chain_spec(request.node), tmp_path_factory.mktemp("known"))
    with machine(host, chain, "known"):
        yield "known", merged(host, "known", top="vda[3]")["id"]


# Progress -------------------------------------------------------------------------------------------------------------


def test_progress(host: Service, tmp_path: Path) -> None:
    """Progress is told live: without an id, at most twice a second whatever else happens to the job, never stored."""
    chain = build_chain(tmp_path, 3, size=64 * MIB)
    write = ["-f", "qcow2", "-c", f"write -q -P 7 0 {48 * MIB}", str(chain.images[1])]
    subprocess.run(["qemu-io", *write], check=True)
    before = last_id(host)
    with Qemu(host.qmp_dir / "progress.qmp", blockdev(chain)):
        host.wait_for_domain("progress")
        job = host.started("progress", top="vda[1]", bandwidth=1)
        told: list[JSON] = []
        with sse(host.client, f"/jobs/{job['id']}/events?types=job.progress,job.completed") as events:
            for event in events:
                told.append(event)
                # Each change of the speed makes the service look at the job at once.
                for step in range(4 if len(told) < 6 else 0):
                    body = {"bandwidth": MIB + step, "flags": ["bandwidth_bytes"]}
                    assert host.client.patch(f"/jobs/{job['id']}", json=body).status_code == 200
                if len(told) == 6:
                    assert host.client.patch(f"/jobs/{job['id']}", json={"bandwidth": 0}).status_code == 200
    forget(host, "progress", before)
    *progress, last = told
    assert last["event"] == "job.completed"
    assert len(progress) >= 6
    for event in progress:
        assert "id" not in event
        assert "id" not in event["data"]
        assert event["data"]["type"] == "job.progress"
        assert event["data"]["data"]["state"] == "running"
        assert event["data"]["data"]["progress"]["percent"] < 100
    currents = [event["data"]["data"]["progress"]["current"] for event in progress]
    assert currents == sorted(currents)
    assert [event["type"] for event in host.history(job["id"])] == INTERMEDIATE
    times = [milliseconds(event["data"]["time"]) for event in progress]
    # Of any three in a row, the last is a second later than the first; the clock is read a moment after the look.
    for first, third in zip(times, times[2:], strict=False):
        assert third - first >= 900, times


def milliseconds(time_: str) -> int:
    """The milliseconds of an event's time within its day."""
    hours, minutes, seconds = time_[11:-1].split(":")
    return (int(hours) * 60 + int(minutes)) * 60_000 + int(float(seconds) * 1000)


# Those who don't read, and the end -----------------------------------------------------------------------------------


@contextmanager
def deaf(service: Service, path: str) -> Generator[socket.socket]:
    """A subscriber that has asked and never reads."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(service.socket))
        token = (service.state_dir / "token").read_text().strip()
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
        # The head tells that the stream is open; not a byte more is taken.
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.recv(1)
        assert b" 200 " in head.partition(b"\r\n")[0]
        yield client


def flood(service: Service, times: int) -> float:
    """Cause two events a time, 2 KB both; the seconds that the slowest request took."""
    name, slowest = "f" * 120, 0.0
    body = {"qmp": {"unix": "/" + "n" * 100}}
    for _ in range(times):
        begin = time.monotonic()
        assert service.client.put(f"/domains/{name}", json=body).status_code == 201
        assert service.client.delete(f"/domains/{name}").status_code == 204
        slowest = max(slowest, time.monotonic() - begin)
    return slowest


def test_one_that_does_not_read(host: Service) -> None:
    """Who stops reading disturbs nobody, and finds all that was told once he reads again."""
    after = last_id(host)
    times = 250
    with deaf(host, f"/events?after={after}") as client, sse(host.client, "/events") as events:
        slowest = flood(host, times)
        got = [next(events) for _ in range(2 * times)]
        assert slowest < 20
        assert types(got) == ["domain.added", "domain.removed"] * times
        assert ids(got) == list(range(after + 1, after + 2 * times + 1))
        seen: list[int] = []
        file = client.makefile("r", encoding="utf-8", newline="\n")
        while len(seen) < 2 * times:
            line = file.readline()
            assert line, "the stream ended"
            if line.startswith("id: "):
                seen.append(int(line.removeprefix("id: ")))
        assert seen == ids(got)
        file.close()


def test_shutdown_ends_every_stream(chain: Chain, tmp_path: Path) -> None:
    """At SIGTERM all streams end as whole answers, and the service exits with 0 soon, whoever does not read."""
    with Service(tmp_path / "service") as service, ExitStack() as stack:
        stack.enter_context(machine_that_stays(service, chain))
        job = service.started("vm", flags=["active"])
        service.wait_for_job(job["id"], "ready")
        stack.enter_context(deaf(service, "/events"))
        flood(service, 100)
        urls = ["/events", "/events?types=job.completed", "/domains/vm/events", f"/jobs/{job['id']}/events"] * 3
        streams = [stack.enter_context(sse(service.client, url)) for url in urls]
        waiting = stack.enter_context(waiting_for(service, job["id"]))
        assert service.stop() == 0
        # A stream that is cut in the middle would raise here.
        for url, events in zip(urls, streams, strict=True):
            assert types(list(stored(events))) == (ACTIVE[:3] if "/jobs/" in url else []), url
        assert waiting["state"] == "ready"
        service.start()
        assert service.wait_for_job(job["id"], "ready")["id"] == job["id"]


@contextmanager
def machine_that_stays(service: Service, chain: Chain) -> Generator[Qemu]:
    """A QEMU that outlives the service."""
    with Qemu(service.qmp_dir / "vm.qmp", blockdev(chain)) as qemu:
        wait_until_told(service, "domain.connected", "vm", 0)
        yield qemu


@contextmanager
def waiting_for(service: Service, job_id: str) -> Generator[JSON]:
    """The job, as one is told who waits for it at `ready`: at once."""
    answer = service.client.get(f"/jobs/{job_id}", headers={"Prefer": "wait=30"})
    assert answer.status_code == 200
    yield answer.json()


def test_past_retention(tmp_path: Path) -> None:
    """Who comes back with an id from before what is kept is told so first, and from where on nothing is missing."""
    with Service(tmp_path / "service") as service:
        flood(service, 3)
        last = last_id(service)
        assert last == 6
        service.stop()
        service.settings["BLOCKJOBD_RETENTION_DAYS"] = "0"
        service.start()
        deadline = time.monotonic() + 60
        while True:
            with sse(service.client, "/events?after=1") as events:
                first = next(events)
            if first["event"] == "stream.reset":
                break
            assert time.monotonic() < deadline, first
        assert first["id"] == str(last)
        with sse(service.client, f"/events?after={last}") as events:
            flood(service, 1)
            assert [next(events)["id"] for _ in range(2)] == [str(last + 1), str(last + 2)]


def test_events_are_json_on_one_line(host: Service, known: tuple[str, str]) -> None:
    """The wire is as the contract has it: id, event, data, each on one line, an empty line after each event."""
    _domain, job = known
    answer = host.client.get(f"/jobs/{job}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    blocks = [block for block in answer.text.split("\n\n") if block and not block.startswith(":")]
    assert len(blocks) == len(INTERMEDIATE)
    for block, type_ in zip(blocks, INTERMEDIATE, strict=True):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        assert set(fields) == {"id", "event", "data"}
        assert (fields["event"], json.loads(fields["data"])["id"]) == (type_, fields["id"])
