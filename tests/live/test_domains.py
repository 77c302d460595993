"""Which domains there are, and how they are: found, registered, forgotten, stopped, killed and held by others."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.chains import blockdev, build_chain
from tests.support.qemu import Qemu, QmpError
from tests.support.service import JSON, Service, sse

pytestmark = pytest.mark.live

LIBVIRT = ["-object", "secret,id=masterKey0,data=c2VjcmV0"]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service for the tests that share one; each uses domains of its own."""
    with Service(tmp_path_factory.mktemp("host")) as running:
        yield running


def until(condition: Callable[[], Any], seconds: float = 5) -> float:
    """Wait until the condition holds; how many seconds that took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() < begin + seconds, f"not within {seconds} s"
        time.sleep(0.01)
    return time.monotonic() - begin


def known(service: Service) -> list[str]:
    """The ids of all domains."""
    items = service.client.get("/domains").json()["items"]
    return [item["id"] for item in items]


def put(service: Service, domain: str, status: int, **body: object) -> JSON:
    """Register a domain, which has to be answered with this status."""
    answer = service.client.put(f"/domains/{domain}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def at(path: Path | str) -> JSON:
    """A monitor's unix socket in a registration."""
    return {"unix": str(path)}


def domain_of(service: Service, domain: str) -> JSON:
    answer = service.client.get(f"/domains/{domain}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def pid_of(service: Service, domain: str) -> int | None:
    """The pid of the QEMU that answers."""
    qemu = domain_of(service, domain)["qemu"]
    return qemu["pid"] if qemu else None


def refused(answer: httpx.Response, status: int, code: str) -> JSON:
    """The problem document of an answer that has to be one."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    assert answer.json()["code"] == code
    return answer.json()


# Discovery -----------------------------------------------------------------------------------------------------------


def test_sockets_come_and_go(host: Service) -> None:
    """A monitor's socket in the watched folder is a domain about a second later, and none once it is gone."""
    with sse(host.client, "/events?types=domain.added,domain.removed,domain.connected") as events:
        with Qemu(host.qmp_dir / "found.qmp", [], name="shop"):
            assert until(lambda: "found" in known(host), 3) < 2
            found = host.wait_for_domain("found", "paused")
            assert (found["id"], found["name"], found["driver"], found["error"]) == ("found", "shop", "qmp", None)
            told = [next(events), next(events)]
            assert [event["event"] for event in told] == ["domain.added", "domain.connected"]
            assert told[1]["data"]["data"]["state"] == "paused"
        until(lambda: "found" not in known(host), 3)
        gone = next(events)
        assert (gone["event"], gone["data"]["source"]) == ("domain.removed", "/domains/found")
    refused(host.client.get("/domains/found"), 404, "domain-not-found")


def test_gone_once_its_job_is_over(host: Service, tmp_path: Path) -> None:
    """A found domain whose socket goes during a job stays until that has ended, and while its image is there."""
    with Qemu(host.qmp_dir / "leaving.qmp", blockdev(build_chain(tmp_path, 2))) as qemu:
        host.wait_for_domain("leaving")
        job = host.started("leaving", flags=["active"])
        host.wait_for_job(job["id"], "ready")
        qemu.monitor.unlink()
        (host.qmp_dir / "later.qmp").symlink_to(host.socket)
        # Once it has seen the newer one, it has seen that the other is gone.
        until(lambda: "later" in known(host))
        assert "leaving" in known(host)
        qemu.kill()
        assert host.wait_for_job(job["id"])["state"] == "failed"
        assert host.wait_for_domain("leaving", "shutoff")["since"]
    (tmp_path / "l1.qcow2").unlink()
    until(lambda: "leaving" not in known(host), 10)
    (host.qmp_dir / "later.qmp").unlink()
    until(lambda: "later" not in known(host))


def test_what_is_no_domain(host: Service) -> None:
    """Other names, names that are no ids, and what is no socket are left alone; a broken one hides no good one."""
    odd = [
        "-dash.qmp",
        ".hidden.qmp",
        ".qmp",
        "ünicode.qmp",
        "two words.qmp",
        "x" * 129 + ".qmp",
        "plain.sock",
        "a.QMP",
    ]
    good = ["a.b-c_d.qmp", "1.qmp", "Z" * 40 + ".qmp", "twice.qmp.qmp"]
    sockets: list[socket.socket] = []
    (host.qmp_dir / "file.qmp").write_text("")
    (host.qmp_dir / "folder.qmp").mkdir()
    (host.qmp_dir / "dangling.qmp").symlink_to("nothing")
    try:
        for name in [*odd, *good]:
            sockets.append(socket.socket(socket.AF_UNIX))
            # A name that does not fit into a socket's address is moved to where it belongs.
            sockets[-1].bind(str(host.qmp_dir / "binding"))
            (host.qmp_dir / "binding").rename(host.qmp_dir / name)
        wanted = {name.removesuffix(".qmp") for name in good}
        until(lambda: wanted <= set(known(host)))
        assert set(known(host)) == wanted
    finally:
        for each in sockets:
            each.close()
        for name in [*odd, *good, "file.qmp", "dangling.qmp"]:
            (host.qmp_dir / name).unlink()
        (host.qmp_dir / "folder.qmp").rmdir()
    until(lambda: not known(host))


def test_a_linked_socket(host: Service, tmp_path: Path) -> None:
    """A link to a socket elsewhere serves as well."""
    with Qemu(tmp_path / "vm.qmp", []):
        link = host.qmp_dir / "linked.qmp"
        link.symlink_to(tmp_path / "vm.qmp")
        try:
            host.wait_for_domain("linked", "paused")
        finally:
            link.unlink()
    until(lambda: "linked" not in known(host))


def test_a_watched_folder_that_comes_later(tmp_path: Path) -> None:
    """The folder may be missing at the start, come, go and come again; the service serves all the while."""
    late = tmp_path / "late"
    with Service(tmp_path / "service", {"BLOCKJOBD_QMP_DIR": str(late)}) as service:
        assert known(service) == []
        for _ in range(2):
            late.mkdir()
            with Qemu(late / "vm.qmp", []):
                service.wait_for_domain("vm", "paused")
            (late / "vm.qmp").unlink(missing_ok=True)
            late.rmdir()
            until(lambda: known(service) == [])


def test_forgotten_until_it_comes_back(host: Service) -> None:
    """A found domain that is forgotten stays so as long as its socket stays; a new one is a new domain."""
    for _ in range(2):
        with Qemu(host.qmp_dir / "again.qmp", []) as qemu:
            host.wait_for_domain("again", "paused")
            assert host.client.delete("/domains/again").status_code == 204
            assert "again" not in known(host)
            # Two looks of the service at the folder, as another domain's coming and going shows.
            for name in ("mark1", "mark2"):
                with socket.socket(socket.AF_UNIX) as mark:
                    mark.bind(str(host.qmp_dir / f"{name}.qmp"))
                    until(lambda name=name: name in known(host))
                (host.qmp_dir / f"{name}.qmp").unlink()
            assert "again" not in known(host)
            assert qemu.qmp("query-status")["status"] == "prelaunch"
        until(lambda: "mark2" not in known(host))


# Registration --------------------------------------------------------------------------------------------------------


def test_put_registers_and_replaces(host: Service, tmp_path: Path) -> None:
    """PUT answers 201 with the domain's state for a new domain, 200 for one that it replaces; DELETE forgets it."""
    with Qemu(tmp_path / "one.qmp", []) as one, Qemu(tmp_path / "two.qmp", [], run=True) as two:
        answer = host.client.put("/domains/reg", json={"qmp": at(one.monitor)})
        assert (answer.status_code, answer.headers["location"]) == (201, "/domains/reg")
        assert (answer.json()["state"], answer.json()["qemu"]["pid"]) == ("paused", one.pid)
        replaced = put(host, "reg", 200, qmp=at(two.monitor))
        assert (replaced["state"], replaced["qemu"]["pid"]) == ("running", two.pid)
        # The first one's monitor is free for others again.
        assert put(host, "other", 201, qmp=at(one.monitor))["qemu"]["pid"] == one.pid
        with sse(host.client, "/events?types=domain.removed") as events:
            answer = host.client.delete("/domains/reg")
            assert (answer.status_code, answer.content) == (204, b"")
            assert next(events)["data"]["data"]["id"] == "reg"
        refused(host.client.get("/domains/reg"), 404, "domain-not-found")
        refused(host.client.delete("/domains/reg"), 404, "domain-not-found")
        assert two.qmp("query-status")["running"]
        assert two.process.poll() is None
        assert host.client.delete("/domains/other").status_code == 204


def test_a_monitor_over_tcp(host: Service, tmp_path: Path) -> None:
    """A monitor may be a TCP address; its disks are served like any other's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    chain = build_chain(tmp_path, 3)
    arguments = [*blockdev(chain), "-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off"]
    with Qemu(tmp_path / "vm.qmp", arguments):
        found = put(host, "net", 201, qmp={"tcp": f"127.0.0.1:{port}"})
        assert (found["state"], found["disks"], found["qemu"]["pid"]) == ("paused", ["vda"], None)
        job = host.started("net", base="vda[2]", top="vda[1]")
        assert host.wait_for_job(job["id"])["state"] == "completed"
        assert [layer["file"] for layer in host.disk("net")["chain"]] == [chain.at(0), chain.at(2)]
    host.wait_for_domain("net", "shutoff")
    assert host.client.delete("/domains/net").status_code == 204


def test_registrations_outlive_the_service(tmp_path: Path) -> None:
    """Monitors, images and permissions are kept over a restart and over a crash; what was forgotten stays forgotten."""
    chain = build_chain(tmp_path, 2)
    with Service(tmp_path / "service") as service, Qemu(tmp_path / "vm.qmp", LIBVIRT) as qemu:
        put(service, "kept", 201, qmp=at(qemu.monitor), allow_managed=True)
        put(service, "net", 201, qmp={"tcp": "[::1]:1"})
        put(service, "off", 201, disks={"vda": {"image": chain.at(0)}})
        put(service, "gone", 201, qmp=at(tmp_path / "none.qmp"))
        put(service, "off2", 201, disks={"vda": {"image": chain.at(0)}})
        put(service, "off2", 200, disks={"vdb": {"image": chain.at(1)}})
        assert service.client.delete("/domains/gone").status_code == 204
        for end in (service.stop, service.kill):
            end()
            service.start()
            assert known(service) == ["kept", "net", "off", "off2"]
            found = service.wait_for_domain("kept", "paused")
            assert (found["qemu"]["pid"], found["managed_by"]) == (qemu.pid, "libvirt")
            assert service.wait_for_domain("net", "unreachable")["state"] == "unreachable"
            assert service.wait_for_domain("off", "shutoff")["disks"] == ["vda"]
            assert service.wait_for_domain("off2", "shutoff")["disks"] == ["vdb"]


def test_found_and_registered(host: Service, tmp_path: Path) -> None:
    """A found domain can be registered under its own id, and then outlives its socket."""
    with Qemu(host.qmp_dir / "both.qmp", []) as qemu:
        host.wait_for_domain("both", "paused")
        assert put(host, "both", 200, allow_managed=True)["qemu"]["pid"] == qemu.pid
    assert host.wait_for_domain("both", "unreachable")["error"]["code"] == "monitor-unreachable"
    assert host.client.delete("/domains/both").status_code == 204
    assert "both" not in known(host)


@pytest.mark.parametrize(
    ("body", "pointers"),
    [
        ({"qmp": {}}, ["/qmp"]),
        ({"qmp": {"unix": "/a", "tcp": "h:1"}}, ["/qmp"]),
        ({"qmp": {"unix": "relative"}}, ["/qmp/unix"]),
        ({"qmp": {"unix": "/" + "a" * 107}}, ["/qmp/unix"]),
        ({"qmp": {"unix": "/a\0b"}}, ["/qmp/unix"]),
        ({"qmp": {"tcp": "host"}}, ["/qmp/tcp"]),
        ({"qmp": {"tcp": "host:70000"}}, ["/qmp/tcp"]),
        ({"qmp": "unix:/a"}, ["/qmp"]),
        ({"disks": {"vda": "/a"}}, ["/disks/vda"]),
        ({"disks": {"vda": {}}}, ["/disks/vda/image"]),
        ({"disks": {"vda": {"image": "a"}}}, ["/disks/vda/image"]),
        ({"disks": {"a/b": {"image": "/a"}}}, ["/disks/a~1b"]),
        ({"disks": []}, ["/disks"]),
        ({"allow_managed": "yes"}, ["/allow_managed"]),
        ({"nonsense": 1, "qmp": {"unix": 7}}, ["/nonsense", "/qmp/unix"]),
        ([], [""]),
    ],
    ids=str,
)
def test_bad_registrations(host: Service, body: object, pointers: list[str]) -> None:
    """What is wrong in a registration is pointed at, all of it at once, and nothing is registered."""
    problem = refused(host.client.put("/domains/bad", json=body), 422, "invalid-request")
    assert sorted(error["pointer"] for error in problem["errors"]) == pointers
    assert all(error["detail"] for error in problem["errors"])
    assert "bad" not in known(host)


@pytest.mark.parametrize("name", ["-dash", ".dot", "two%20words", "%C3%BC", "x" * 129])
def test_bad_ids(host: Service, name: str) -> None:
    """An id is one that a socket's name could have."""
    problem = refused(host.client.put(f"/domains/{name}", json={}), 422, "invalid-request")
    assert [error["parameter"] for error in problem["errors"]] == ["domain"]


def test_pages(tmp_path: Path) -> None:
    """A list comes in pages of the size that is asked for, in order, each item once, also if some come meanwhile."""
    with Service(tmp_path / "service") as service:
        names = [f"d{number}" for number in range(7)]
        for name in reversed(names):
            put(service, name, 201, disks={})
        seen: list[str] = []
        cursor: str | None = None
        sizes: list[int] = []
        while True:
            params = {"limit": "3"} | ({"cursor": cursor} if cursor else {})
            page = service.client.get("/domains", params=params).json()
            seen += [item["id"] for item in page["items"]]
            sizes.append(len(page["items"]))
            cursor = page["next"]
            if cursor is None:
                break
            service.client.delete("/domains/d0")
            put(service, "a-late-one", 200 if len(sizes) > 1 else 201, disks={})
        assert (seen, sizes) == (names, [3, 3, 1])
        assert service.client.get("/domains", params={"limit": 6}).json()["next"] is not None
        assert service.client.get("/domains", params={"limit": 7}).json()["next"] is None
        for limit in ("0", "1001", "-1", "many"):
            problem = refused(service.client.get("/domains", params={"limit": limit}), 422, "invalid-request")
            assert [error["parameter"] for error in problem["errors"]] == ["limit"]


# States --------------------------------------------------------------------------------------------------------------


def test_running_and_paused(host: Service, tmp_path: Path) -> None:
    """A domain is `running` while its guest is, `paused` while that is stopped, and changes are seen soon."""
    with Qemu(tmp_path / "vm.qmp", [], run=True) as qemu:
        found = put(host, "states", 201, qmp=at(qemu.monitor))
        version = qemu.qmp("query-version")["qemu"]
        assert found == {
            "id": "states",
            "name": "states",
            "uuid": None,
            "state": "running",
            "driver": "qmp",
            "qemu": {
                "version": f"{version['major']}.{version['minor']}.{version['micro']}",
                "pid": qemu.pid,
            },
            "managed_by": None,
            "error": None,
            "disks": [],
        }
        qemu.qmp("stop")
        host.wait_for_domain("states", "paused", seconds=5)
    assert host.client.delete("/domains/states").status_code == 204


def test_unreachable(host: Service, tmp_path: Path) -> None:
    """A domain without a socket is `unreachable`; one that a killed QEMU left is off, with the images that it had."""
    missing = put(host, "gone", 201, qmp=at(tmp_path / "none.qmp"))
    assert (missing["state"], missing["error"]["code"], missing["qemu"]) == ("unreachable", "monitor-unreachable", None)
    assert str(tmp_path / "none.qmp") in missing["error"]["detail"]
    chain = build_chain(tmp_path, 2)
    with Qemu(tmp_path / "vm.qmp", blockdev(chain)) as qemu:
        assert put(host, "stale", 201, qmp=at(qemu.monitor))["state"] == "paused"
        with sse(host.client, "/domains/stale/events?types=domain.disconnected") as events:
            qemu.kill()
            told = next(events)
            # A process that is ending lets go of its socket before it has ended, and only the end makes it `shutoff`.
            assert told["event"] == "domain.disconnected"
            assert told["data"]["data"]["state"] in {"unreachable", "shutoff"}
        assert qemu.monitor.is_socket()
        stale = host.wait_for_domain("stale", "shutoff", seconds=3)
        assert (stale["error"], stale["qemu"]) == (None, None)
        assert [layer["file"] for layer in host.disk("stale")["chain"]] == chain.files
        refused(host.client.get("/domains/gone/disks"), 503, "monitor-unreachable")
        refused(host.commit("gone", flags=["active"]), 503, "monitor-unreachable")
    with Qemu(tmp_path / "none.qmp", []) as qemu:
        assert host.wait_for_domain("gone", "paused", seconds=5)["qemu"]["pid"] == qemu.pid
    for name in ("gone", "stale"):
        assert host.client.delete(f"/domains/{name}").status_code == 204


@contextmanager
def held(monitor: Path) -> Generator[None]:
    """Another client holds the monitor, greeting and all."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(monitor))
        client.settimeout(10)
        assert b"QMP" in client.recv(4096)
        yield


def test_busy(tmp_path: Path) -> None:
    """A monitor that another client holds makes the domain `busy`, and usable as soon as that client leaves."""
    chain = build_chain(tmp_path, 2)
    settings = {"BLOCKJOBD_QMP_TIMEOUT": "0.5"}
    with Service(tmp_path / "service", settings) as service, Qemu(tmp_path / "vm.qmp", blockdev(chain)) as qemu:
        with held(qemu.monitor):
            found = put(service, "held", 201, qmp=at(qemu.monitor))
            assert (found["state"], found["error"]["code"]) == ("busy", "monitor-busy")
            assert "another client" in found["error"]["detail"]
            refused(service.commit("held", flags=["active"]), 503, "monitor-busy")
            refused(service.client.get("/domains/held/disks/vda"), 503, "monitor-busy")
        service.wait_for_domain("held", "paused", seconds=5)
        job = service.started("held", flags=["active"], on_ready="pivot")
        assert service.wait_for_job(job["id"])["state"] == "completed"


def test_shutoff(host: Service, tmp_path: Path) -> None:
    """A domain with images and no QEMU is `shutoff`, and its disks' chains are read from the headers."""
    chain = build_chain(tmp_path, 3, absolute=True)
    data = build_chain(tmp_path, 1, prefix="data", base_format="raw")
    images = {"vda": {"image": chain.at(0)}, "vdb": {"image": data.at(0)}}
    found = put(host, "off", 201, disks=images)
    assert (found["state"], found["error"], found["qemu"]) == ("shutoff", None, None)
    assert host.wait_for_domain("off", "shutoff")["state"] == "shutoff"
    until(lambda: domain_of(host, "off")["disks"] == ["vda", "vdb"])
    disk = host.disk("off")
    assert [layer["file"] for layer in disk["chain"]] == chain.files
    assert [layer["backing"] for layer in disk["chain"]] == [chain.at(1), chain.at(2), None]
    assert [layer["valid"] for layer in disk["chain"]] == [True] * 3
    assert disk["job"] is None
    raw = host.disk("off", "vdb")["chain"]
    assert [(layer["format"], layer["virtual_size"]) for layer in raw] == [("raw", 4 << 20)]
    # The same disk, read from QEMU, has the same chain and the same digest.
    with Qemu(tmp_path / "vm.qmp", blockdev(chain)) as qemu:
        put(host, "off", 200, qmp=at(qemu.monitor), disks={"vda": {"image": chain.at(0)}})
        assert host.wait_for_domain("off")["state"] == "paused"
        assert host.disk("off")["digest"] == disk["digest"]
    # QEMU has ended, so the domain is off again.
    host.wait_for_domain("off", "shutoff", seconds=5)
    until(lambda: domain_of(host, "off")["error"] is None)
    assert host.disk("off")["digest"] == disk["digest"]
    assert host.client.delete("/domains/off").status_code == 204


def test_shutoff_with_a_broken_chain(host: Service, tmp_path: Path) -> None:
    """An image that can't be read is told with the domain, names the file, and hides no other disk."""
    chain = build_chain(tmp_path, 3)
    good = build_chain(tmp_path, 1, prefix="good")
    chain.images[0].unlink()
    images = {"vda": {"image": chain.at(0)}, "vdb": {"image": good.at(0)}}
    put(host, "broken", 201, disks=images)
    until(lambda: domain_of(host, "broken")["error"] is not None)
    found = domain_of(host, "broken")
    assert (found["state"], found["error"]["file"]) == ("shutoff", chain.at(2))
    assert host.disk("broken", "vdb")["chain"][0]["file"] == good.at(0)
    refused(host.client.get("/domains/broken/disks/vda"), 404, "disk-not-found")
    assert host.client.delete("/domains/broken").status_code == 204


def test_another_qemu_under_the_same_name(host: Service) -> None:
    """A QEMU that is started anew at the same socket is noticed for what it is: another process, with its own disks."""
    folder = host.folder / "renewed"
    chain = build_chain(folder, 2)
    monitor = host.qmp_dir / "renewed.qmp"
    with Qemu(monitor, []) as first:
        assert host.wait_for_domain("renewed", "paused")["qemu"]["pid"] == first.pid
        first.kill()
        with Qemu(monitor, blockdev(chain), run=True) as second:
            until(lambda: pid_of(host, "renewed") == second.pid)
            found = host.wait_for_domain("renewed", "running")
            assert (found["qemu"]["pid"], found["disks"]) == (second.pid, ["vda"])
    host.wait_for_domain("renewed", "shutoff")
    assert host.client.delete("/domains/renewed").status_code == 204


def test_a_stopped_qemu_disturbs_nobody(tmp_path: Path) -> None:
    """A QEMU that answers no more is `unreachable` within 15 s, and the others are served as fast as before.

    After SIGCONT it is as it was, with the job that it had.
    """
    with Service(tmp_path / "service") as service:
        chains = [build_chain(tmp_path / name, 3) for name in ("hung", "fine")]
        with (
            Qemu(service.qmp_dir / "hung.qmp", blockdev(chains[0]), run=True) as hung,
            Qemu(service.qmp_dir / "fine.qmp", blockdev(chains[1])),
        ):
            for name in ("hung", "fine"):
                service.wait_for_domain(name)
            job = service.started("hung", flags=["active"])
            service.wait_for_job(job["id"], "ready")

            def seconds_to_read() -> float:
                begin = time.monotonic()
                assert service.client.get("/domains").status_code == 200
                service.disk("fine")
                assert domain_of(service, "hung")["id"] == "hung"
                return time.monotonic() - begin

            before = sorted(seconds_to_read() for _ in range(20))
            hung.pause()
            stopped = time.monotonic()
            slowest = 0.0
            while domain_of(service, "hung")["state"] != "unreachable":
                assert time.monotonic() < stopped + 15, "a hang of 15 s went unseen"
                slowest = max(slowest, seconds_to_read())
                time.sleep(0.05)
            assert domain_of(service, "hung")["error"]["code"] == "monitor-unreachable"
            # Far below the seconds that the other one hangs.
            assert slowest < max(0.5, 10 * before[-1]), (before, slowest)
            begin = time.monotonic()
            refused(service.commit("hung", top="vda[1]"), 503, "monitor-unreachable")
            assert time.monotonic() - begin < 1
            begin = time.monotonic()
            other = service.started("fine", flags=["active"], on_ready="pivot")
            assert service.wait_for_job(other["id"], seconds=10)["state"] == "completed"
            assert time.monotonic() - begin < 5
            assert service.job(job["id"])["state"] == "ready"
            with sse(service.client, "/domains/hung/events?types=domain.connected") as events:
                hung.wake()
                assert next(events)["event"] == "domain.connected"
            awake = service.wait_for_domain("hung", "running", seconds=10)
            assert (awake["error"], awake["qemu"]["pid"]) == (None, hung.pid)
            assert service.client.post(f"/jobs/{job['id']}/pivot").status_code == 202
            assert service.wait_for_job(job["id"])["state"] == "completed"


# Libvirt's, and forgetting -------------------------------------------------------------------------------------------


def test_libvirts_domains(host: Service, tmp_path: Path) -> None:
    """A domain of libvirt's is shown, changed only where its registration allows it, and never forgets that."""
    chain = build_chain(tmp_path, 3)
    with Qemu(tmp_path / "vm.qmp", [*blockdev(chain), *LIBVIRT]) as qemu:
        found = put(host, "virt", 201, qmp=at(qemu.monitor))
        assert (found["managed_by"], found["state"], found["disks"]) == ("libvirt", "paused", ["vda"])
        assert [layer["file"] for layer in host.disk("virt")["chain"]] == chain.files
        for params in ({}, {"dry_run": "true"}):
            answer = host.client.post("/domains/virt/disks/vda/commit", json={"flags": ["active"]}, params=params)
            assert "libvirt" in refused(answer, 409, "domain-managed-elsewhere")["detail"]
        assert qemu.qmp("query-jobs") == []
        assert put(host, "virt", 200, qmp=at(qemu.monitor), allow_managed=True)["managed_by"] == "libvirt"
        job = host.started("virt", flags=["active"], on_ready="pivot")
        assert host.wait_for_job(job["id"])["state"] == "completed"
        put(host, "virt", 200, qmp=at(qemu.monitor))
        refused(host.commit("virt", top="vda[0]"), 409, "domain-managed-elsewhere")
    assert host.client.delete("/domains/virt").status_code == 204


def test_forgetting_waits_for_jobs(host: Service, tmp_path: Path) -> None:
    """A domain with an unfinished job can't be forgotten, but registered anew: the job goes on."""
    chain = build_chain(tmp_path, 3)
    with Qemu(tmp_path / "vm.qmp", blockdev(chain)) as qemu:
        put(host, "working", 201, qmp=at(qemu.monitor))
        job = host.started("working", flags=["active"])
        host.wait_for_job(job["id"], "ready")
        problem = refused(host.client.delete("/domains/working"), 409, "job-conflict")
        assert problem["job"] == job["id"]
        put(host, "working", 200, qmp=at(qemu.monitor), allow_managed=True)
        assert host.job(job["id"])["state"] == "ready"
        assert [found["id"] for found in qemu.qmp("query-jobs")] == [job["id"]]
        assert host.client.post(f"/jobs/{job['id']}/pivot").status_code == 202
        assert host.wait_for_job(job["id"])["state"] == "completed"
        until(lambda: host.client.delete("/domains/working").status_code == 204)
        # The job is remembered, and QEMU is as the merge left it.
        assert host.job(job["id"])["state"] == "completed"
        assert qemu.qmp("query-jobs") == []
        with pytest.raises(QmpError):
            qemu.qmp("job-dismiss", id=job["id"])
    refused(host.client.get("/domains/working/events"), 404, "domain-not-found")
