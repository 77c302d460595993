"""The JSON of jobs, disks, plans and events, as the contract spells it."""

from __future__ import annotations

import json
from dataclasses import replace

from app.api.cloudevents import event_json
from app.api.render import JsonRender
from app.api.schemas.base import timestamp
from app.api.schemas.disks import disk_out
from app.api.schemas.domains import domain_json
from app.api.schemas.jobs import job_json
from app.api.schemas.plans import plan_out
from app.core.chain import Disk, Layer, NotDeleted
from app.core.errors import Code, Problem
from app.core.job import Job, Progress, Result, accept
from app.core.kinds import commit
from app.core.kinds.commit import CommitRequest, CommitSpec
from app.core.plan import Facts, Plan
from app.core.states import DataState, State
from app.engine.ports.events import StoredEvent
from app.engine.views import DiskView, DomainState, DomainView

LAYERS = tuple(
    Layer(
        file=f"/images/{name}.qcow2",
        format="qcow2",
        node=name,
        virtual_size=4 << 30,
        actual_size=1234,
        backing=f"{below}.qcow2" if below else None,
    )
    for name, below in (("s2", "s1"), ("s1", "base"), ("base", None))
)
DISK = Disk(name="vda", aliases=("virtio0",), node="s2", layers=LAYERS)


def planned(**fields: object) -> Plan[CommitSpec]:
    """The plan of a commit on `DISK`."""
    request = commit.request(**fields)  # pyright: ignore[reportArgumentType]
    assert isinstance(request, CommitRequest)
    chosen = commit.select(DISK, request)
    assert not isinstance(chosen, Problem)
    plan = commit.plan(chosen, Facts(free=10**12))
    assert isinstance(plan, Plan)
    return plan


def queued() -> Job:
    """The job of a commit of the active layer."""
    return accept(planned(flags=["active"]), id_="bj-1", domain="web1", requested_by="ci", now=1767225600123)


def test_a_new_job() -> None:
    """A job has every member from its start, null where there is nothing to say yet."""
    assert json.loads(job_json(queued())) == {
        "id": "bj-1",
        "type": "active-commit",
        "state": "queued",
        "pause_reason": None,
        "domain": "web1",
        "disk": "vda",
        "top": "/images/s2.qcow2",
        "base": "/images/base.qcow2",
        "overlay": None,
        "flags": ["active"],
        "on_ready": "wait",
        "on_error": "report",
        "bandwidth": 0,
        "progress": {"current": 0, "end": 0, "percent": 0.0, "rate": 0, "eta": None},
        "data_state": "untouched",
        "error": None,
        "result": None,
        "requested_by": "ci",
        "actions": ["abort", "set-speed"],
        "created_at": "2026-01-01T00:00:00.123Z",
        "started_at": None,
        "ready_at": None,
        "finished_at": None,
        "version": 1,
    }


def test_a_job_that_ended() -> None:
    """The error of a job is a problem document that points to the job; its result names what was left."""
    job = replace(
        queued(),
        state=State.FAILED,
        error=Problem(code=Code.QEMU_ERROR, detail="no", extra={"qmp": {"class": "GenericError", "desc": "no"}}),
        result=Result(chain=("/a",), not_deleted=(NotDeleted(file="/b", reason="in use"),)),
        data_state=DataState.BASE_MODIFIED,
        progress=Progress(current=1, end=3, rate=10, eta=0.2),
    )
    document = json.loads(JsonRender().job(job))
    assert document["error"]["instance"] == "/jobs/bj-1"
    assert document["error"]["type"] == "urn:blockjobd:problem:qemu-error"
    assert document["error"]["qmp"] == {"class": "GenericError", "desc": "no"}
    assert document["result"] == {
        "chain": ["/a"],
        "invalidated": [],
        "deleted": [],
        "not_deleted": [{"file": "/b", "reason": "in use"}],
    }
    assert document["progress"] == {"current": 1, "end": 3, "percent": 33.3, "rate": 10, "eta": 0.2}


def test_a_plan() -> None:
    """A dry run shows what will happen, and the very command, which has no job id yet."""
    plan = planned(top="vda[1]", bandwidth=2, on_error=queued().on_error, flags=["shallow"])
    document = plan_out(plan).model_dump(mode="json")
    assert document.pop("base_growth_max") > 0
    assert document.pop("warnings")[0]["code"] == "base-grows"
    assert document == {
        "type": "commit",
        "disk": "vda",
        "top": "/images/s1.qcow2",
        "base": "/images/base.qcow2",
        "overlay": "/images/s2.qcow2",
        "flags": ["shallow"],
        "chain_before": ["/images/s2.qcow2", "/images/s1.qcow2", "/images/base.qcow2"],
        "chain_after": ["/images/s2.qcow2", "/images/base.qcow2"],
        "invalidates": ["/images/s1.qcow2"],
        "deletes": [],
        "bytes_to_copy": 1234,
        "free": 10**12,
        "resizes_base_to": None,
        "backing_file": "base.qcow2",
        "qmp": [
            {
                "execute": "block-commit",
                "arguments": {
                    "device": "s2",
                    "top-node": "s1",
                    "base-node": "base",
                    "backing-file": "base.qcow2",
                    "speed": 2 << 20,
                    "on-error": "report",
                    "auto-finalize": False,
                    "auto-dismiss": False,
                },
            }
        ],
    }


def test_a_plan_of_the_active_layer_writes_no_header() -> None:
    """QEMU refuses a `backing-file` for the active layer; a speed of 0 is not sent."""
    arguments = plan_out(planned(flags=["active"])).qmp[0].arguments
    assert list(arguments) == ["device", "top-node", "base-node", "on-error", "auto-finalize", "auto-dismiss"]


def test_a_disk() -> None:
    """A disk shows its chain, active layer first."""
    document = disk_out(DiskView(disk=DISK, valid=(True, False, True), job="bj-1")).model_dump(mode="json")
    chain = document.pop("chain")
    assert document == {
        "name": "vda",
        "aliases": ["virtio0"],
        "node": "s2",
        "read_only": False,
        "virtual_size": 4 << 30,
        "digest": DISK.digest,
        "job": "bj-1",
    }
    assert chain[1] == {
        "index": 1,
        "file": "/images/s1.qcow2",
        "format": "qcow2",
        "node": "s1",
        "virtual_size": 4 << 30,
        "actual_size": 1234,
        "backing": "base.qcow2",
        "valid": False,
    }


def test_a_domain() -> None:
    """A domain that can't be reached says why."""
    view = DomainView(
        id="web1",
        name="web1",
        uuid=None,
        state=DomainState.UNREACHABLE,
        driver="qmp",
        version=None,
        pid=None,
        managed_by=None,
        error=Problem(code=Code.MONITOR_UNREACHABLE, detail="gone"),
        disks=("vda",),
    )
    document = json.loads(domain_json(view))
    assert document.pop("error")["instance"] == "/domains/web1"
    assert document == {
        "id": "web1",
        "name": "web1",
        "uuid": None,
        "state": "unreachable",
        "driver": "qmp",
        "qemu": None,
        "managed_by": None,
        "disks": ["vda"],
    }
    running = replace(view, state=DomainState.RUNNING, version="7.2.22", pid=4242, error=None)
    assert json.loads(domain_json(running))["qemu"] == {"version": "7.2.22", "pid": 4242}


def test_an_event() -> None:
    """An event is a CloudEvent whose data is the stored text, word for word."""
    event = StoredEvent(
        id=1042,
        type="job.completed",
        time=1767225600000,
        domain="web 1",
        disk="vda",
        job_id="bj-1",
        data='{"a":  1}',
    )
    text = event_json(event)
    assert text.endswith('"data": {"a":  1}}')
    assert json.loads(text) == {
        "specversion": "1.0",
        "id": "1042",
        "source": "/domains/web%201/disks/vda",
        "type": "job.completed",
        "subject": "jobs/bj-1",
        "time": "2026-01-01T00:00:00.000Z",
        "datacontenttype": "application/json",
        "data": {"a": 1},
    }


def test_progress_has_no_id() -> None:
    """What is not stored can't be asked for again."""
    event = StoredEvent(id=None, type="job.progress", time=1, domain="a", disk="vda", job_id="bj-1", data="{}")
    assert "id" not in json.loads(event_json(event))


def test_times_keep_their_milliseconds() -> None:
    """No rounding by way of floating point."""
    assert timestamp(1767225599999) == "2025-12-31T23:59:59.999Z"
    assert timestamp(0) == "1970-01-01T00:00:00.000Z"
