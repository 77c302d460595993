"""The JSON of webhooks and their deliveries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from app.api.schemas.base import Out, time_or_none, timestamp
from app.core.outgoing import DeliveryState
from app.engine.ports.outbox import Delivery, Webhook


class WebhookOut(Out):
    """Where events are sent to."""

    id: str
    url: str
    types: Sequence[str] = Field(description="the types of events that are sent; an empty list: all types")
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
    status: DeliveryState = Field(description="`failed`: the webhook was disabled because of this delivery")
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


def webhook_json(webhook: Webhook) -> str:
    """The JSON text of a webhook without its secrets, in answers and in events alike."""
    return webhook_out(webhook).model_dump_json()


def delivery_json(delivery: Delivery) -> str:
    """The JSON text of a delivery."""
    return delivery_out(delivery).model_dump_json()
