"""The documents that are generated, and what they promise."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.api.document import pages
from tests.api.conftest import Api

PAGES = pages()
DOCUMENT: dict[str, Any] = json.loads(next(text for path, text in PAGES.items() if path.suffix == ".json"))
OPERATIONS = {operation["operationId"]: operation for path in DOCUMENT["paths"].values() for operation in path.values()}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_generated_pages_are_fresh(path: Any) -> None:
    """What stands in `openapi/` is what the code says; `python -m app.api.document` writes it anew."""
    assert path.read_text() == PAGES[path]


def test_every_operation_is_described() -> None:
    """Each operation has a description; all but the probes and signed deliveries take a token and can refuse it."""
    for name, operation in OPERATIONS.items():
        assert operation["description"], name
        probe, delivery = name in {"getLiveness", "getReadiness"}, name == "takeDelivery"
        assert ("security" in operation) == (not (probe or delivery)), name
        assert ("401" in operation["responses"]) == (not probe), name


def test_every_reference_resolves() -> None:
    """No schema is referred to that isn't there, and none of the framework's own is left."""
    text = json.dumps(DOCUMENT)
    referred = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert referred <= set(DOCUMENT["components"]["schemas"])
    assert "HTTPValidationError" not in text


def test_errors_are_problem_documents() -> None:
    """Every documented error has the media type that is sent."""
    for name, operation in OPERATIONS.items():
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                assert list(response["content"]) == ["application/problem+json"], (name, status)


def test_the_served_document_is_the_generated_one(api: Api) -> None:
    """`/openapi.json` is the file's text."""
    text = next(text for path, text in PAGES.items() if path.suffix == ".json")
    assert api.reader.get("/openapi.json").text == text


def test_the_page_loads_nothing(api: Api) -> None:
    """`/docs` works on a host without internet access: it names every operation, and no other host."""
    response = api.reader.get("/docs")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert all(f"id={name}>" in response.text for name in OPERATIONS)
    assert "http://" not in response.text
    assert "https://" not in response.text
    assert "<script" not in response.text


def test_metrics(api: Api) -> None:
    """Requests are counted by the template of their route, and every state has a figure."""
    api.reader.get("/jobs/bj-metrics")
    api.reader.get("/nonsense-metrics")
    response = api.reader.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = response.text
    assert 'blockjobd_http_requests_total{method="GET",route="/jobs/{job_id}",status="404"}' in text
    assert 'blockjobd_http_requests_total{method="GET",route="none",status="404"}' in text
    assert "bj-metrics" not in text
    assert 'blockjobd_jobs{state="running"} 0.0' in text
    assert 'blockjobd_domains{state="unreachable"}' in text
    assert "blockjobd_event_subscribers 0.0" in text
