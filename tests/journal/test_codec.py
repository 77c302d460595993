"""A job survives the journal unchanged, whatever is in it."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.errors import Problem
from app.core.evidence import Judgement
from app.core.job import Control, Job, Progress
from app.core.kinds.commit import CommitFlag, CommitSpec
from app.engine.ports.journal import Registration
from app.journal.codec import decode_job, decode_registration, encode_job, encode_registration

from .support import make_job

FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | FINITE | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
PROBLEMS = st.none() | st.builds(Problem, extra=st.dictionaries(st.text(), JSON, max_size=3))
JUDGED = st.none() | st.builds(Judgement, state=..., error=PROBLEMS, merged=..., durable=..., because=...)
SPECS = st.builds(
    CommitSpec, **{each.name: ... for each in fields(CommitSpec)} | {"flags": st.integers(0, 31).map(CommitFlag)}
)
CONTROLS = st.builds(
    Control, **{each.name: ... for each in fields(Control)} | {"rejection": PROBLEMS, "judgement": JUDGED}
)
VARIED: dict[str, Any] = {
    "progress": st.builds(Progress, current=..., end=..., rate=..., eta=st.none() | FINITE),
    "error": PROBLEMS,
    "spec": SPECS,
    "control": CONTROLS,
}
# Fields with defaults are varied only where it is asked for.
EVERY_FIELD: dict[str, Any] = {each.name: ... for each in fields(Job)}
JOBS = st.builds(Job, **EVERY_FIELD | VARIED)


@given(JOBS)
@settings(max_examples=300, deadline=None)
def test_every_job_comes_back_as_it_was(job: Job) -> None:
    """Decoding what was encoded gives an equal job, with the same types all the way down."""
    back = decode_job(encode_job(job))
    assert back == job
    assert repr(back) == repr(job)


@given(st.builds(Registration))
@settings(deadline=None)
def test_every_registration_comes_back_as_it_was(registration: Registration) -> None:
    """Decoding what was encoded gives an equal registration."""
    assert decode_registration(encode_registration(registration)) == registration


def test_a_field_that_an_older_release_did_not_write_gets_its_default() -> None:
    """A body without a field that has a default can still be read."""
    body = json.loads(encode_job(make_job()))
    del body["control"]["verdict_error"], body["parent"]
    assert decode_job(json.dumps(body)) == make_job()


def test_a_field_that_this_release_does_not_know_is_passed_over() -> None:
    """A body with a field of another release can still be read."""
    body = json.loads(encode_job(make_job()))
    assert decode_job(json.dumps(body | {"priority": 3})) == make_job()
