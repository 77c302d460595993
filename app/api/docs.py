"""The documentation that the service gives of itself: the OpenAPI document, and a page made of it.

The page is plain HTML without scripts. An interactive page would load scripts and the document. A browser loads them
without a bearer token, so the service would refuse the document. A host without internet access can't load scripts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, Final, cast

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse

from app.api.auth import Guarded, Reader

router = APIRouter(route_class=Guarded, include_in_schema=False)

STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem; border-top: 1px solid #8888; padding-top: 1rem }
code, pre { font: 14px/1.5 ui-monospace, monospace } pre { overflow: auto; background: #8881; padding: 1rem }
table { border-collapse: collapse } td, th { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0 }
:root { color-scheme: light dark }
"""


@router.get("/openapi.json")
async def get_openapi(request: Request, _who: Reader) -> Response:
    """The OpenAPI document."""
    return Response(openapi_json(cast(FastAPI, request.app)), media_type="application/json")


@router.get("/docs")
async def get_docs(request: Request, _who: Reader) -> HTMLResponse:
    """The OpenAPI document as a page to read."""
    headers = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
    return HTMLResponse(docs_page(cast(FastAPI, request.app).openapi()), headers=headers)


def openapi_json(app: FastAPI) -> str:
    """The OpenAPI document as text, which changes only when the API changes."""
    return json.dumps(app.openapi(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def docs_page(document: Mapping[str, Any]) -> str:
    """The OpenAPI `document` as HTML."""
    title = escape(document["info"]["title"])
    schemas = cast("dict[str, Any]", document["components"]["schemas"])
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>",
        f"<h1>{title} {escape(document['info']['version'])}</h1><p>{escape(document['info']['description'])}</p>",
        "<p>For programs: <a href=/openapi.json>/openapi.json</a></p>",
    ]
    for path, operations in cast("dict[str, dict[str, Any]]", document["paths"]).items():
        for method, operation in operations.items():
            parts += _operation(method, path, operation)
    parts.append("<h2>Schemas</h2>")
    for name, schema in schemas.items():
        head = f"<details id={escape(name)}><summary><code>{escape(name)}</code></summary>"
        parts.append(f"{head}<pre>{escape(json.dumps(schema, indent=2))}</pre></details>")
    return "\n".join(parts)


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2 id={escape(operation['operationId'])}><code>{method.upper()} {escape(path)}</code></h2>"
    yield f"<p>{escape(operation['description'])}</p><table>"
    for parameter in operation.get("parameters", []):
        text = escape(parameter.get("description", ""))
        yield f"<tr><th><code>{escape(parameter['name'])}</code><td>{parameter['in']}<td>{text}"
    for name in _schema_names(operation.get("requestBody", {})):
        yield f"<tr><th>body<td><td><a href=#{name}>{name}</a>"
    for status, response in operation["responses"].items():
        links = ", ".join(f"<a href=#{name}>{name}</a>" for name in _schema_names(response))
        yield f"<tr><th>{status}<td>{links}<td>{escape(response['description'])}"
    yield "</table>"


def _schema_names(part: Mapping[str, Any]) -> Iterator[str]:
    for content in part.get("content", {}).values():
        whole = content.get("schema", {})
        for schema in (whole, *whole.get("allOf", [])):
            if "$ref" in schema:
                yield escape(schema["$ref"].rpartition("/")[2])
