"""What all domains of this host share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from app.core.job import Job
from app.core.states import EventType
from app.engine.budget import Budget
from app.engine.hub import Hub
from app.engine.known import KnownDisks
from app.engine.ports.clock import Clock
from app.engine.ports.driver import Driver
from app.engine.ports.events import StoredEvent
from app.engine.ports.images import Images
from app.engine.ports.journal import Journal
from app.engine.recovery import Recovery
from app.engine.tasks import Tasks
from app.engine.telling import DomainTeller
from app.engine.views import Render


@dataclass(slots=True, kw_only=True)
class Shared:
    """The ports, the subscribers, the budget, the tasks, and every unfinished job.

    `drivers` are found by the name that a registration gives. `new_id` makes the id of a new job. The directory of
    domains sets the `teller`.
    """

    drivers: Mapping[str, Driver]
    journal: Journal
    images: Images
    clock: Clock
    hub: Hub
    budget: Budget
    recovery: Recovery
    render: Render
    new_id: Callable[[], str]
    known: KnownDisks
    tasks: Tasks
    live: dict[str, Job] = field(default_factory=dict[str, Job])
    teller: DomainTeller = field(init=False)

    def publish_progress(self, job: Job) -> None:
        """Tell the subscribers how far a job is; that is not stored."""
        event = StoredEvent(
            id=None,
            type=EventType.PROGRESS,
            time=self.clock.now(),
            domain=job.domain,
            disk=job.disk,
            job_id=job.id,
            data=self.render.job(job),
        )
        self.hub.publish([event])
