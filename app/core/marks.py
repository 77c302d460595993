"""Which images become invalid by a job, and which are right again."""

from __future__ import annotations

from app.core.images import Image, InvalidReason, MarkChange, marks_of
from app.core.job import Job
from app.core.kinds import kind_of
from app.core.states import DataState, State


def _new_active(job: Job) -> tuple[Image, ...]:
    """After a pivot the base is the active layer, and has all that the guest reads."""
    return (kind_of(job.spec).written(job.spec).image,) if job.capabilities.pivots else ()


def mark_change(before: DataState, after: Job) -> MarkChange | None:
    """What a step means for the content of images; `before` is the data state in front of it. None: nothing.

    Once a job has begun to write, the layers that its kind names show a mixture. They are right again, or gone, once
    the job has merged them after all. After `on_ready: keep` they stay as they are, and so does the mark.
    """
    images = tuple(layer.image for layer in kind_of(after.spec).mixed(after.spec))
    if after.state is State.COMPLETED:
        judgement = after.control.judgement
        # A person who resolves a lost job as completed says that it was merged.
        if judgement is None or judgement.merged or after.resolved is not None:
            merged = tuple(layer.image for layer in kind_of(after.spec).worthless(after.spec))
            left = marks_of(merged, job_id=after.id, domain=after.domain, reason=InvalidReason.MERGED)
            return MarkChange(add=left, remove=images + _new_active(after), domain=after.domain)
        return _added(images, after, InvalidReason.KEPT)
    if before is DataState.UNTOUCHED and after.data_state is not DataState.UNTOUCHED:
        return _added(images, after, InvalidReason.BASE_MODIFIED)
    return None


def _added(images: tuple[Image, ...], job: Job, reason: InvalidReason) -> MarkChange | None:
    return MarkChange(add=marks_of(images, job_id=job.id, domain=job.domain, reason=reason)) if images else None
