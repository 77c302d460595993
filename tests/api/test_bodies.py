"""What the bodies and parameters of requests may be, and how clients learn what is wrong with theirs."""

from __future__ import annotations

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.problems import json_pointer
from tests.api.conftest import JSON, Api, problem

COMMIT = "/domains/nobody/disks/vda/commit"
MAX = 2**63 - 1


def pointers(document: JSON) -> list[str]:
    """Where the errors of a problem document point to."""
    return [error["pointer"] for error in document["errors"]]


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"bandwidth": "1"}, ["/bandwidth"]),
        ({"bandwidth": True}, ["/bandwidth"]),
        ({"bandwidth": 1.0}, ["/bandwidth"]),
        ({"bandwidth": None}, ["/bandwidth"]),
        ({"bandwidth": -1}, ["/bandwidth"]),
        ({"bandwidth": 2**63}, ["/bandwidth"]),
        ({"bandwidth": 10**400}, ["/bandwidth"]),
        ({"bandwidth": (MAX >> 20) + 1}, ["/bandwidth"]),
        ({"bandwidth": MAX + 1, "flags": ["bandwidth_bytes"]}, ["/bandwidth"]),
        ({"flags": "active"}, ["/flags"]),
        ({"flags": None}, ["/flags"]),
        ({"flags": True}, ["/flags"]),
        ({"flags": 4.0}, ["/flags"]),
        ({"flags": -1}, ["/flags"]),
        ({"flags": 32}, ["/flags"]),
        ({"flags": ["active", "nonsense"]}, ["/flags/1"]),
        ({"flags": ["active", 4]}, ["/flags/1"]),
        ({"flags": ["ACTIVE"]}, ["/flags/0"]),
        ({"flags": ["nonsense"], "bandwidth": -1}, ["/bandwidth", "/flags/0"]),
        ({"base": 1, "top": []}, ["/base", "/top"]),
        ({"base": "a\0b"}, ["/base"]),
        ({"on_ready": "never"}, ["/on_ready"]),
        ({"on_error": "ignore"}, ["/on_error"]),
        ({"backing_file": ""}, ["/backing_file"]),
        ({"backing_file": "x" * 1024}, ["/backing_file"]),
        ({"callback": "http://example.org"}, ["/callback"]),
        ({"callback": {}}, ["/callback/url"]),
        (
            {"callback": {"url": "example.org", "secret": "short", "x": 1}},
            ["/callback/secret", "/callback/url", "/callback/x"],
        ),
        ({"nonsense": 1}, ["/nonsense"]),
        ({"a/b~c": 1}, ["/a~1b~0c"]),
        ([], [""]),
        ("text", [""]),
        (7, [""]),
    ],
)
def test_wrong_fields_are_pointed_at(api: Api, body: object, where: list[str]) -> None:
    """Each wrong field of a commit is named by a JSON Pointer into the body."""
    document = problem(api.operator.post(COMMIT, json=body), 422, "invalid-request")
    assert sorted(pointers(document)) == where
    assert document["libvirt"] == "VIR_ERR_INVALID_ARG"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"base": None, "top": None, "backing_file": None, "callback": None},
        {"base": "", "top": ""},
        {"base": "", "flags": ["shallow"]},
        {"bandwidth": MAX >> 20},
        {"bandwidth": MAX, "flags": ["bandwidth_bytes"]},
        {"bandwidth": MAX, "flags": 16},
        {"flags": 31},
        {"flags": ["active", "active"]},
        {"on_ready": "keep", "on_error": "enospc"},
    ],
)
def test_right_bodies_get_as_far_as_the_domain(api: Api, body: object) -> None:
    """The limits of what is allowed are allowed."""
    problem(api.operator.post(COMMIT, json=body), 404, "domain-not-found")


def test_a_commit_needs_no_body(api: Api) -> None:
    """Every field has a default, so the body may be left out."""
    problem(api.operator.post(COMMIT), 404, "domain-not-found")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"base": ', "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"bandwidth": ' + b"9" * 5000 + b"}", "application/json"),
        (b'{"base": "\\ud800"}', "application/json"),
        (b'{"\\ud800": 1}', "application/json"),
        (b'{"flags": ["\\ud800"]}', "application/json"),
        (b'{"bandwidth": NaN}', "application/json"),
        (b"base=1", "application/x-www-form-urlencoded"),
        (b"{}", "text/plain"),
    ],
)
def test_what_is_no_json_is_refused(api: Api, body: bytes, kind: str) -> None:
    """A body that can't be read is the caller's fault and never ours."""
    response = api.operator.post(COMMIT, content=body, headers={"Content-Type": kind})
    assert problem(response, 422, "invalid-request")["errors"]


def test_large_bodies_are_refused(api: Api) -> None:
    """A body has at most 1 MiB, whether its length is announced or not."""
    large = b'{"base": "' + b"x" * (1 << 20) + b'"}'
    headers = {"Content-Type": "application/json"}
    problem(api.operator.post(COMMIT, content=large, headers=headers), 413, "payload-too-large")
    problem(api.operator.post(COMMIT, content=iter([large]), headers=headers), 413, "payload-too-large")
    fits = b'{"base": "x"' + b" " * ((1 << 20) - 13) + b"}"
    assert len(fits) == 1 << 20
    problem(api.operator.post(COMMIT, content=fits, headers=headers), 404, "domain-not-found")


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({}, ["/bandwidth"]),
        ({"bandwidth": -1}, ["/bandwidth"]),
        ({"bandwidth": 1, "flags": ["delete"]}, ["/flags/0"]),
        ({"bandwidth": 1, "flags": 4}, ["/flags"]),
        ({"bandwidth": (MAX >> 20) + 1}, ["/bandwidth"]),
        (None, [""]),
    ],
)
def test_wrong_speeds(api: Api, body: object, where: list[str]) -> None:
    """A change of speed is judged by the same rules, and knows one flag."""
    document = problem(api.operator.patch("/jobs/bj-none", json=body), 422, "invalid-request")
    assert pointers(document) == where


@pytest.mark.parametrize("body", [{"bandwidth": 0}, {"bandwidth": MAX, "flags": ["bandwidth_bytes"]}])
def test_right_speeds_get_as_far_as_the_job(api: Api, body: object) -> None:
    """The limits of what is allowed are allowed."""
    problem(api.operator.patch("/jobs/bj-none", json=body), 404, "job-not-found")


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"qmp": {}}, ["/qmp"]),
        ({"qmp": {"unix": "/a", "tcp": "b:1"}}, ["/qmp"]),
        ({"qmp": {"unix": "a"}}, ["/qmp/unix"]),
        ({"qmp": {"unix": "/a\0"}}, ["/qmp/unix"]),
        ({"qmp": {"unix": "/" + "a" * 107}}, ["/qmp/unix"]),
        ({"qmp": {"tcp": "host"}}, ["/qmp/tcp"]),
        ({"qmp": {"tcp": "::1:4444"}}, ["/qmp/tcp"]),
        ({"qmp": {"tcp": "host:65536"}}, ["/qmp/tcp"]),
        ({"qmp": "/a"}, ["/qmp"]),
        ({"disks": {"vda": {}}}, ["/disks/vda/image"]),
        ({"disks": {"vda": {"image": "a.qcow2"}}}, ["/disks/vda/image"]),
        ({"disks": []}, ["/disks"]),
        ({"allow_managed": 1}, ["/allow_managed"]),
        ({"nonsense": None}, ["/nonsense"]),
    ],
)
def test_wrong_registrations(api: Api, body: object, where: list[str]) -> None:
    """Addresses and paths are checked before anything is opened."""
    assert pointers(problem(api.admin.put("/domains/web1", json=body), 422, "invalid-request")) == where


@pytest.mark.parametrize("domain", ["-a", ".a", "a" * 129, "a b", "\N{GREEK SMALL LETTER ALPHA}", "a%0a"])
def test_wrong_domain_ids(api: Api, domain: str) -> None:
    """An id that can be registered is fit for a path, a log and a shell."""
    document = problem(api.admin.put(f"/domains/{domain}", json={}), 422, "invalid-request")
    assert document["errors"][0]["parameter"] == "domain"


@pytest.mark.parametrize(
    ("path", "parameter"),
    [
        ("/jobs?limit=0", "limit"),
        ("/jobs?limit=1001", "limit"),
        ("/jobs?limit=x", "limit"),
        ("/jobs?cursor=x", "cursor"),
        ("/jobs?cursor=9223372036854775808", "cursor"),
        ("/jobs?state=nonsense", "state"),
        ("/jobs?active=maybe", "active"),
        ("/jobs?stat=failed", "stat"),
        ("/jobs?limit=1&limit=2", "limit"),
        ("/domains?limit=0", "limit"),
        ("/domains/x%00", "domain"),
        ("/domains/x/disks/%00", "disk"),
        ("/events?after=-1", "after"),
        ("/events?after=x", "after"),
        ("/events?types=nonsense", "types"),
        ("/events?types=job.ready,", "types"),
        ("/jobs/none/events?after=x", "after"),
    ],
)
def test_wrong_parameters_are_named(api: Api, path: str, parameter: str) -> None:
    """A wrong parameter is named as such; one that is unknown is not ignored."""
    document = problem(api.reader.get(path), 422, "invalid-request")
    assert [error["parameter"] for error in document["errors"]] == [parameter]


def test_a_misspelt_dry_run_is_none(api: Api) -> None:
    """What was meant as a dry run must not start a job."""
    problem(api.operator.post(f"{COMMIT}?dryrun=true"), 422, "invalid-request")
    problem(api.operator.post(f"{COMMIT}?dry_run=perhaps"), 422, "invalid-request")
    problem(api.operator.post(f"{COMMIT}?dry_run=true&dry_run=false"), 422, "invalid-request")
    problem(api.operator.post(f"{COMMIT}?dry_run=true"), 404, "domain-not-found")


def test_wrong_last_event_id(api: Api) -> None:
    """A stream that can't be taken up again is refused before it begins."""
    document = problem(api.reader.get("/events", headers={"Last-Event-ID": "x"}), 422, "invalid-request")
    assert document["errors"][0]["parameter"] == "Last-Event-ID"


@given(
    st.recursive(st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
)
def test_pointers_resolve(body: object) -> None:
    """The pointer of each place in a body leads back to it."""

    def walk(location: tuple[str | int, ...], node: object) -> None:
        found = cast(JSON, body)
        for part in json_pointer(location, body, missing=False).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            found = cast(JSON, found[int(name)] if isinstance(found, list) else found[name])
        assert found == node
        if isinstance(node, dict):
            for key, inner in cast("dict[str, object]", node).items():
                walk((*location, key), inner)
        elif isinstance(node, list):
            for index, inner in enumerate(cast("list[object]", node)):
                walk((*location, index), inner)

    walk((), body)
