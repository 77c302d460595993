"""The JSON of events and their data, which is the JSON of the API's own answers (ports in `app.engine.views`)."""

from __future__ import annotations

from app.api.cloudevents import event_json
from app.api.schemas.domains import domain_json
from app.api.schemas.jobs import job_json
from app.api.schemas.webhooks import webhook_json
from app.core.job import Job
from app.engine.ports.events import StoredEvent
from app.engine.ports.outbox import Webhook
from app.engine.views import DomainView


class JsonRender:
    """Writes JSON."""

    def job(self, job: Job) -> str:
        """The JSON of a job."""
        return job_json(job)

    def domain(self, view: DomainView) -> str:
        """The JSON of a domain."""
        return domain_json(view)

    def webhook(self, webhook: Webhook) -> str:
        """The JSON of a webhook, without its secrets."""
        return webhook_json(webhook)

    def event(self, event: StoredEvent) -> str:
        """The JSON of a whole event."""
        return event_json(event)
