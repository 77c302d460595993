"""A long life: a journal with a million jobs that have ended, and what it takes to live with them."""

from __future__ import annotations

import socket
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from app.journal.database import FILE
from bench.figures import Goal, Picture, Section, Series, Table, mib, ms
from bench.past import DOMAINS, FAILED, job_id, service_with_past
from bench.stage import Stage, memory, settle
from tests.support.service import Service

REPLAYED = 10_000
PAUSE = 0.05
"""The most seconds that a request may take while old jobs are pruned."""

KEEP_ALL = {"BLOCKJOBD_RETENTION_DAYS": "60"}


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _replay(running: Service, after: int, count: int) -> float:
    """Seconds until a new subscriber has had `count` events after that id."""
    token = (running.state_dir / "token").read_text().strip()
    request = (
        f"GET /events?after={after} HTTP/1.1\r\nHost: blockjobd\r\nAuthorization: Bearer {token}\r\n"
        "Accept: text/event-stream\r\n\r\n"
    )
    with socket.socket(socket.AF_UNIX) as stream:
        stream.settimeout(60)
        stream.connect(str(running.socket))
        begin = time.perf_counter()
        stream.sendall(request.encode())
        left, tail, mark = count, b"", b"\ndata: "
        while left > 0:
            data = stream.recv(1 << 20)
            assert data, "the stream ended too early"
            # A mark may come in two pieces.
            data = tail + data
            left -= data.count(mark)
            tail = data[-len(mark) + 1 :]
        return time.perf_counter() - begin


def _questions(running: Service, count: int, times: int) -> dict[str, Series]:
    asked: dict[str, tuple[str, dict[str, str]]] = {
        "GET /jobs": ("/jobs", {}),
        "GET /jobs?cursor=, half-way": ("/jobs", {"cursor": str(count // 2)}),
        "GET /jobs?cursor=, the oldest": ("/jobs", {"cursor": "100"}),
        "GET /jobs?limit=1000": ("/jobs", {"limit": "1000"}),
        "GET /jobs?domain=": ("/jobs", {"domain": "m7"}),
        "GET /jobs?domain=&state=failed": ("/jobs", {"domain": f"m{FAILED}", "state": "failed"}),
        "GET /jobs?state=failed": ("/jobs", {"state": "failed"}),
        "GET /jobs?state=lost": ("/jobs", {"state": "lost"}),
        "GET /jobs?active=true": ("/jobs", {"active": "true"}),
        "GET /jobs/{id}": (f"/jobs/{job_id(count // 2)}", {}),
        "GET /jobs/{id}/history": (f"/jobs/{job_id(count // 2)}/history", {}),
    }
    found: dict[str, list[float]] = {}
    for _ in range(times):
        for name, (path, parameters) in asked.items():
            begin = time.perf_counter()
            answer = running.client.get(path, params=parameters)
            found.setdefault(name, []).append(time.perf_counter() - begin)
            assert answer.status_code == 200, answer.text
    return {name: Series(tuple(values)) for name, values in found.items()}


def _pauses(running: Service, old: int) -> tuple[Series, float]:
    """What requests take while jobs are pruned, and how many seconds that goes on."""
    begin = time.perf_counter()
    taken: list[float] = []
    while True:
        asked = time.perf_counter()
        running.client.get("/readyz")
        ready = time.perf_counter()
        gone = running.client.get(f"/jobs/{job_id(old)}").status_code == 404
        taken += [ready - asked, time.perf_counter() - ready]
        if gone:
            return Series(tuple(taken)), time.perf_counter() - begin


def _size(running: Service) -> int:
    return (running.state_dir / FILE).stat().st_size


def _starts(folder: Path, times: int) -> tuple[Series, int]:
    taken: list[float] = []
    used = 0
    for _ in range(times):
        running = Service(folder, KEEP_ALL)
        taken.append(_seconds(running.start))
        assert running.process is not None
        used = memory(running.process.pid)
        running.stop()
        running.client.close()
    return Series(tuple(taken)), used


def _events_in(folder: Path) -> int:
    with closing(sqlite3.connect(folder / FILE)) as connection:
        return int(connection.execute("SELECT count(*) FROM events").fetchone()[0])


def run(stage: Stage) -> Section:
    """A journal with a long past next to one without."""
    count, old = stage.times(1_000_000, 1_000), stage.times(100_000, 200)
    past = service_with_past(stage.new("long"), count, old=old)
    past.client.close()
    events = _events_in(past.state_dir)
    settle()
    start = {
        "empty": _starts(stage.new("empty"), stage.times(5, 1)),
        f"{count:,} jobs": _starts(past.folder, stage.times(5, 1)),
    }
    with Service(past.folder, KEEP_ALL) as running:
        size = _size(running)
        questions = _questions(running, count, stage.times(50, 2))
        replayed = min(REPLAYED, events // 2)
        begin = _first_event(running, count // 2)
        replay = Series(tuple(_replay(running, begin, replayed) for _ in range(stage.times(5, 1))))
    # This one prunes, beginning at its start.
    with Service(past.folder) as running:
        pauses, lasted = _pauses(running, old)
    return _section(
        count=count,
        old=old,
        events=events,
        size=size,
        start=start,
        questions=questions,
        replay=(replayed, replay),
        pruning=(pauses, lasted),
    )


def _first_event(running: Service, number: int) -> int:
    page = running.client.get(f"/jobs/{job_id(number)}/history").json()["items"]
    return int(page[0]["id"]) - 1


def _section(
    *,
    count: int,
    old: int,
    events: int,
    size: int,
    start: dict[str, tuple[Series, int]],
    questions: dict[str, Series],
    replay: tuple[int, Series],
    pruning: tuple[Series, float],
) -> Section:
    replayed, replays = replay
    pauses, lasted = pruning
    starts = [[name, ms(of.median), ms(of.worst), mib(used)] for name, (of, used) in start.items()]
    asked = [[name, ms(of.median), ms(of.p95), ms(of.worst)] for name, of in questions.items()]
    asked.append([f"replay of {replayed:,} events", ms(replays.median), ms(replays.p95), ms(replays.worst)])
    asked.append([f"while {old:,} jobs are pruned", ms(pauses.median), ms(pauses.p95), ms(pauses.worst)])
    return Section(
        name="journal",
        title="A long life: the journal",
        tables=[
            Table(
                ["journal", "start", "worst", "memory"],
                starts,
                "From starting the process until /readyz answers with 200; memory (PSS) then.",
            ),
            Table(
                ["request", "median", "p95", "worst"],
                asked,
                f"{count:,} jobs of {DOMAINS} domains that have ended, one in {FAILED} of them failed, with {events:,} "
                f"events: a file of {mib(size)}. Pruned {old / lasted:.0f} jobs a second, for {lasted:.0f} s, asking "
                "for /readyz and for a job all the while.",
            ),
        ],
        goals=[
            Goal(
                f"pruning: no request over {ms(PAUSE)}",
                f"{ms(pauses.worst)}, of {len(pauses.values):,} requests",
                pauses.worst < PAUSE,
            )
        ],
        pictures=[
            Picture(
                "bench-journal.svg",
                f"Requests to a journal with {count:,} jobs (median)",
                "ms",
                {name: {"": of.median * 1000} for name, of in questions.items()},
            )
        ],
        figures={
            "start": {name: of.json() for name, (of, _) in start.items()},
            "bytes": size,
            "questions": {name: of.json() for name, of in questions.items()},
            "replay": replays.json(),
            "pruning": {
                "median": pauses.median,
                "p99": pauses.p99,
                "worst": pauses.worst,
                "n": len(pauses.values),
                "seconds": lasted,
            },
        },
    )
