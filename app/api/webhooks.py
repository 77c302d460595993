"""Webhooks that are sent: where events go, and what became of each delivery."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from pydantic import AfterValidator

from app.api.auth import Admin, Guarded, Reader
from app.api.bodies import RotateIn, WebhookIn
from app.api.codes import refusals
from app.api.pages import Limit, NumberCursor, page_response
from app.api.requests import CHANGES, READS, UseCases, no_nul
from app.api.schemas.webhooks import (
    Deliveries,
    DeliveryOut,
    NewWebhookOut,
    WebhookOut,
    Webhooks,
    delivery_json,
    delivery_out,
    new_webhook_out,
    webhook_json,
    webhook_out,
)
from app.core.errors import Code

router = APIRouter(route_class=Guarded, tags=["webhooks"])

WebhookId = Annotated[str, Path(description="the webhook's id"), AfterValidator(no_nul)]
DeliveryId = Annotated[str, Path(description="the delivery's id"), AfterValidator(no_nul)]


@router.post(
    "/webhooks",
    operation_id="createWebhook",
    status_code=201,
    responses=refusals(*CHANGES, Code.WEBHOOK_URL_REFUSED, Code.TOO_MANY_REQUESTS),
)
async def create_webhook(body: WebhookIn, who: Admin, use: UseCases, response: Response) -> NewWebhookOut:
    """Have events sent to a URL from now on. The answer alone shows the secret."""
    webhook = await use.webhooks.made(body.url, body.types, body.secret, who=who.name, pointer="/url")
    await use.webhooks.add(webhook)
    response.headers["Location"] = f"/webhooks/{webhook.id}"
    return new_webhook_out(webhook)


@router.get("/webhooks", operation_id="listWebhooks", response_model=Webhooks, responses=refusals(*READS))
async def list_webhooks(
    _who: Reader,
    use: UseCases,
    job: Annotated[str | None, Query(description="the callbacks of this job instead")] = None,
    limit: Limit = 100,
    cursor: NumberCursor = None,
) -> Response:
    """The webhooks that are sent the events of all jobs, oldest first."""
    found, following = await use.webhooks.webhooks(job_id=job, after=cursor, limit=limit)
    return page_response(map(webhook_json, found), following)


@router.get("/webhooks/{webhook_id}", operation_id="getWebhook", responses=refusals(*READS, Code.WEBHOOK_NOT_FOUND))
async def get_webhook(webhook_id: WebhookId, _who: Reader, use: UseCases) -> WebhookOut:
    """One webhook."""
    return webhook_out(await use.webhooks.webhook(webhook_id))


@router.delete(
    "/webhooks/{webhook_id}",
    operation_id="deleteWebhook",
    status_code=204,
    responses=refusals(*CHANGES, Code.WEBHOOK_NOT_FOUND),
)
async def delete_webhook(webhook_id: WebhookId, _who: Admin, use: UseCases) -> None:
    """Send nothing more to it, and forget what was to be sent."""
    await use.webhooks.remove(webhook_id)


@router.post(
    "/webhooks/{webhook_id}/rotate",
    operation_id="rotateWebhookSecret",
    responses=refusals(*CHANGES, Code.WEBHOOK_NOT_FOUND),
)
async def rotate_secret(
    webhook_id: WebhookId, _who: Admin, use: UseCases, body: RotateIn | None = None
) -> NewWebhookOut:
    """Sign with a new secret from now on, and for 24 h with the old one beside it."""
    return new_webhook_out(await use.webhooks.rotate(webhook_id, body.secret if body else None))


@router.post(
    "/webhooks/{webhook_id}/enable",
    operation_id="enableWebhook",
    responses=refusals(*CHANGES, Code.WEBHOOK_NOT_FOUND),
)
async def enable_webhook(webhook_id: WebhookId, _who: Admin, use: UseCases) -> WebhookOut:
    """Enable a webhook, and send all deliveries that wait for it in order. The delivery that disabled it goes first."""
    return webhook_out(await use.webhooks.enable(webhook_id))


@router.get(
    "/webhooks/{webhook_id}/deliveries",
    operation_id="listDeliveries",
    response_model=Deliveries,
    responses=refusals(*READS, Code.WEBHOOK_NOT_FOUND),
)
async def list_deliveries(
    webhook_id: WebhookId, _who: Reader, use: UseCases, limit: Limit = 100, cursor: NumberCursor = None
) -> Response:
    """The deliveries of a webhook, made or still to be made, newest first."""
    found, following = await use.webhooks.deliveries(webhook_id, before=cursor, limit=limit)
    return page_response(map(delivery_json, found), following)


@router.post(
    "/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver",
    operation_id="redeliver",
    status_code=202,
    responses=refusals(*CHANGES, Code.WEBHOOK_NOT_FOUND, Code.DELIVERY_NOT_FOUND, Code.WEBHOOK_DISABLED),
)
async def redeliver(webhook_id: WebhookId, delivery_id: DeliveryId, _who: Admin, use: UseCases) -> DeliveryOut:
    """Send it once more under the same id, before all that is newer."""
    return delivery_out(await use.webhooks.redeliver(webhook_id, delivery_id))
