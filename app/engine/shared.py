"""What all domains of this host share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from app.core.chain import Disk, Identity, Layer
from app.core.job import EventType, Job
from app.core.reconcile import uses_base
from app.engine.budget import Budget
from app.engine.hub import Hub
from app.engine.ports.clock import Clock
from app.engine.ports.driver import Driver
from app.engine.ports.events import StoredEvent
from app.engine.ports.images import Images
from app.engine.ports.journal import Journal
from app.engine.recovery import Recovery
from app.engine.views import Render


async def _nothing() -> None:
    """There is no domain that is off."""


@dataclass(slots=True, kw_only=True)
class Shared:
    """The ports, the subscribers, the budget, and every unfinished job.

    `disks` gives each known domain's disks as they were last read; `read_off` reads those of the domains that are off
    anew, as nobody tells when somebody works on their images. `new_id` makes the id of a new job.
    """

    driver: Driver
    journal: Journal
    images: Images
    clock: Clock
    hub: Hub
    budget: Budget
    recovery: Recovery
    render: Render
    new_id: Callable[[], str]
    disks: Callable[[], Mapping[str, tuple[Disk, ...]]] = dict
    read_off: Callable[[], Awaitable[None]] = _nothing
    live: dict[str, Job] = field(default_factory=dict[str, Job])

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

    def base_user(self, domain: str, disk: Disk, base: Layer) -> str | None:
        """The other disk, of any known domain, whose data a merge into `base` would change; None if there is none."""
        for other_domain, disks in self.disks().items():
            for other in disks:
                if (other_domain, other.name) != (domain, disk.name) and uses_base(other, disk, base):
                    return f"{other_domain}/{other.name}"
        return None

    def image_user(self, file: str, identity: Identity | None) -> str | None:
        """A disk, of any known domain, that has the image in its chain; None if there is none."""
        for domain, disks in self.disks().items():
            for disk in disks:
                for layer in disk.layers:
                    if layer.file == file or (identity is not None and layer.identity == identity):
                        return f"{domain}/{disk.name}"
        return None
