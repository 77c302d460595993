"""Whether the service lives, whether it can serve, and its figures."""

from __future__ import annotations

from typing import Any, Final, cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from app.api.auth import Guarded, Reader
from app.api.codes import MEDIA_TYPE, NOT_READY, refusals
from app.api.metrics import Metrics
from app.api.problems import path_of
from app.api.requests import READS, UseCases
from app.api.schemas.health import HealthOut
from app.api.schemas.recovery import RecoveryOut, recovery_out

free = APIRouter(tags=["health"])
"""Routes that need no token."""

router = APIRouter(route_class=Guarded, tags=["health"])

UNREADY: Final[dict[int | str, dict[str, Any]]] = {
    503: {
        "description": f"`{NOT_READY}`, with the failing `checks`",
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemOut"}}},
    }
}


@free.get("/livez", operation_id="getLiveness")
async def get_liveness() -> HealthOut:
    """Whether the service lives."""
    return HealthOut()


@free.get("/readyz", operation_id="getReadiness", response_model=HealthOut, responses=UNREADY)
async def get_readiness(request: Request, use: UseCases) -> HealthOut | Response:
    """Whether the service can serve requests."""
    checks = await use.readiness()
    failing = {name: why for name, why in checks.items() if why is not None}
    if not failing:
        return HealthOut(checks=dict.fromkeys(checks, "ok"))
    document = {
        "type": f"urn:blockjobd:problem:{NOT_READY}",
        "title": "Not ready",
        "status": 503,
        "detail": "; ".join(f"{name}: {why}" for name, why in failing.items()),
        "code": NOT_READY,
        "instance": path_of(request.scope),
        "checks": failing,
    }
    return JSONResponse(document, status_code=503, media_type=MEDIA_TYPE, headers={"Retry-After": "1"})


@router.get("/recovery", operation_id="getRecovery", responses=refusals(*READS))
async def get_recovery(_who: Reader, use: UseCases) -> RecoveryOut:
    """What was found after the service's start: the jobs that were unfinished, and those that nobody knew."""
    return recovery_out(use.recovery())


@router.get(
    "/metrics",
    operation_id="getMetrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **refusals(*READS)},
)
async def get_metrics(request: Request, _who: Reader) -> Response:
    """Figures for Prometheus, in its text format."""
    metrics = cast(Metrics, request.app.state.metrics)
    return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})
