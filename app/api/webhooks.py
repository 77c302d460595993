"""Webhooks that are sent: where events go, and what became of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response
from pydantic import AfterValidator, Field

from app.api.auth import Admin, Guarded, Reader
from app.api.bodies import RotateIn, WebhookIn
from app.api.codes import refusals
from app.api.requests import CHANGES, READS, Limit, NumberCursor, UseCases, no_nul
from app.api.schemas import Out, time_or_none, timestamp
from app.core.errors import Code
from app.core.outgoing import DeliveryState
from app.engine.ports.outbox import Delivery, Webhook

router = APIRouter(route_class=Guarded, tags=["webhooks"])

WebhookId = Annotated[str, Path(description="the webhook's id"), AfterValidator(no_nul)]
DeliveryId = Annotated[str, Path(description="the delivery's id"), AfterValidator(no_nul)]


class WebhookOut(Out):
    """Where events are sent to."""

    id: str
    url: str
    types: Sequence[str] = Field(description="the types of events that are sent; none: all")
    job: str | None = Field(description="the job whose callback this is")
    enabled: bool
    disabled_at: str | None
    disabled_because: str | None
    pending: int = Field(description="deliveries that are still to be made")
    created_at: str
    created_by: str = Field(description="the name of the token, or `hook:` and the hook's")


class NewWebhookOut(WebhookOut):
    """A webhook with the secret that signs from now on, which is shown this once."""

    secret: str


class Webhooks(Out):
    """A page of webhooks, oldest first."""

    items: Sequence[WebhookOut]
    next: str | None


class AnswerOut(Out):
    """What a receiver answered."""

    status: int
    body: str = Field(description="its first 1024 bytes")


class DeliveryOut(Out):
    """An event that a webhook is sent."""

    id: str = Field(description="the header `webhook-id`, the same in each attempt")
    webhook: str
    event: str = Field(description="the event's id")
    type: str
    status: DeliveryState = Field(description="`failed`: its webhook was disabled by it")
    attempts: int
    created_at: str
    last_attempt_at: str | None
    next_attempt_at: str | None
    answer: AnswerOut | None = Field(description="to the last attempt")
    error: str | None = Field(description="why the last attempt got no answer")


class Deliveries(Out):
    """A page of deliveries, newest first."""

    items: Sequence[DeliveryOut]
    next: str | None


def webhook_out(webhook: Webhook) -> WebhookOut:
    """The JSON of a webhook."""
    return WebhookOut(**_webhook_members(webhook))


def new_webhook_out(webhook: Webhook) -> NewWebhookOut:
    """The JSON of a webhook with its secret."""
    return NewWebhookOut(**_webhook_members(webhook), secret=webhook.secret)


def _webhook_members(webhook: Webhook) -> dict[str, Any]:
    return {
        "id": webhook.id,
        "url": webhook.url,
        "types": sorted(webhook.types),
        "job": webhook.job_id,
        "enabled": webhook.disabled_at is None,
        "disabled_at": time_or_none(webhook.disabled_at),
        "disabled_because": webhook.disabled_because,
        "pending": webhook.pending,
        "created_at": timestamp(webhook.created_at),
        "created_by": webhook.created_by,
    }


def delivery_out(delivery: Delivery) -> DeliveryOut:
    """The JSON of a delivery."""
    answer = delivery.answer
    waits = delivery.state is DeliveryState.PENDING
    return DeliveryOut(
        id=delivery.id,
        webhook=delivery.webhook_id,
        event=str(delivery.event_id),
        type=delivery.event_type,
        status=delivery.state,
        attempts=delivery.attempts,
        created_at=timestamp(delivery.created_at),
        last_attempt_at=time_or_none(delivery.attempted_at),
        next_attempt_at=timestamp(delivery.due_at) if waits else None,
        answer=AnswerOut(status=answer.status, body=answer.body) if answer and answer.status is not None else None,
        error=answer.error if answer else None,
    )


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


@router.get("/webhooks", operation_id="listWebhooks", responses=refusals(*READS))
async def list_webhooks(
    _who: Reader,
    use: UseCases,
    job: Annotated[str | None, Query(description="the callbacks of this job instead")] = None,
    limit: Limit = 100,
    cursor: NumberCursor = None,
) -> Webhooks:
    """The webhooks that are sent the events of all jobs, oldest first."""
    found, following = await use.webhooks.webhooks(job_id=job, after=cursor, limit=limit)
    return Webhooks(items=[webhook_out(each) for each in found], next=None if following is None else str(following))


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
    """Send it, in order, all that was stored for it meanwhile, the delivery that disabled it first."""
    return webhook_out(await use.webhooks.enable(webhook_id))


@router.get(
    "/webhooks/{webhook_id}/deliveries",
    operation_id="listDeliveries",
    responses=refusals(*READS, Code.WEBHOOK_NOT_FOUND),
)
async def list_deliveries(
    webhook_id: WebhookId, _who: Reader, use: UseCases, limit: Limit = 100, cursor: NumberCursor = None
) -> Deliveries:
    """What it was sent and is to be sent, newest first."""
    found, following = await use.webhooks.deliveries(webhook_id, before=cursor, limit=limit)
    return Deliveries(items=[delivery_out(each) for each in found], next=None if following is None else str(following))


@router.post(
    "/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver",
    operation_id="redeliver",
    status_code=202,
    responses=refusals(*CHANGES, Code.WEBHOOK_NOT_FOUND, Code.DELIVERY_NOT_FOUND, Code.WEBHOOK_DISABLED),
)
async def redeliver(webhook_id: WebhookId, delivery_id: DeliveryId, _who: Admin, use: UseCases) -> DeliveryOut:
    """Send it once more under the same id, before all that is newer."""
    return delivery_out(await use.webhooks.redeliver(webhook_id, delivery_id))
