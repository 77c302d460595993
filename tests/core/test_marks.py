from __future__ import annotations

from dataclasses import replace

import pytest

from app.core.evidence import Judgement
from app.core.images import Image, InvalidReason, valid_layers
from app.core.job import Control, Job, Resolution
from app.core.marks import mark_change
from app.core.states import DataState, State
from tests.core.samples import FILES, LAYERS, active_job, disk, intermediate_job

MIXED = tuple(Image(file) for file in FILES[1:3])


def ended(job: Job, *, merged: bool, **more: object) -> Job:
    """The job, completed."""
    control = Control(judgement=Judgement(state=State.COMPLETED, merged=merged))
    done = replace(job, state=State.COMPLETED, data_state=DataState.MERGED, control=control)
    return replace(done, **more)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("job", [active_job(), intermediate_job()])
def test_layers_between_top_and_a_modified_base_are_not_valid(job: Job) -> None:
    """Once the base is written to, the images on it show a mixture; the active layer and the base itself do not."""
    begun = replace(job, state=State.RUNNING, data_state=DataState.BASE_MODIFIED)
    change = mark_change(DataState.UNTOUCHED, begun)
    assert change is not None
    assert (tuple(mark.image for mark in change.add), change.remove) == (MIXED, ())
    assert {(mark.job_id, mark.domain, mark.reason) for mark in change.add} == {
        (job.id, "web1", InvalidReason.BASE_MODIFIED)
    }
    assert valid_layers(disk(), change.add) == (True, False, False, True)
    # A snapshot on top changes nothing for them.
    snapshot = replace(LAYERS[0], file="/images/s4.qcow2", node="n4")
    assert valid_layers(disk(snapshot, *LAYERS), change.add) == (True, True, False, False, True)


@pytest.mark.parametrize("job", [active_job(), intermediate_job()])
def test_a_step_that_changes_no_data_changes_no_mark(job: Job) -> None:
    """A mark is set once, and an end without a merge leaves it."""
    begun = replace(job, state=State.RUNNING, data_state=DataState.BASE_MODIFIED)
    assert mark_change(DataState.UNTOUCHED, job) is None
    assert mark_change(DataState.BASE_MODIFIED, begun) is None
    assert mark_change(DataState.BASE_MODIFIED, replace(begun, state=State.CANCELED)) is None


def test_what_is_merged_after_all_is_marked_no_more() -> None:
    """The merged images have left the chain; a verdict of a person on a lost job counts as the merge.

    What was left in place of them is remembered, and is nobody's layer any more.
    """
    change = mark_change(DataState.BASE_MODIFIED, ended(intermediate_job(), merged=True))
    assert change is not None
    assert (change.remove, change.domain) == (MIXED, "web1")
    assert [(mark.image, mark.reason) for mark in change.add] == [(image, InvalidReason.MERGED) for image in MIXED]
    assert valid_layers(disk(), change.add) == (True, True, True, True)
    judged = ended(active_job(), merged=False, resolved=Resolution(by="ada", at=5))
    # Of the active layer the base has all: it is right again, whatever had been written below it before.
    change = mark_change(DataState.BASE_MODIFIED, judged)
    assert change is not None
    assert change.remove == (*MIXED, Image(FILES[3]))
    assert [mark.image for mark in change.add] == [Image(file) for file in FILES[:3]]


def test_a_kept_overlay_keeps_the_marks() -> None:
    """After `keep` the layers in between still stand on a base that is a copy of the active layer."""
    change = mark_change(DataState.BASE_MODIFIED, ended(active_job(), merged=False))
    assert change is not None
    assert {mark.reason for mark in change.add} == {InvalidReason.KEPT}
    assert valid_layers(disk(), change.add) == (True, False, False, True)


def test_a_job_between_two_layers_leaves_none_mixed() -> None:
    """A merge of the active layer into the one right below has no layer in between."""
    job = active_job("shallow")
    assert mark_change(DataState.UNTOUCHED, replace(job, data_state=DataState.BASE_MODIFIED)) is None


def test_an_active_layer_that_was_a_mixture_before_is_right() -> None:
    """After a pivot the guest reads the base, and what the guest reads is right, marked or not."""
    marks = mark_change(DataState.UNTOUCHED, replace(active_job(), data_state=DataState.BASE_MODIFIED))
    assert marks is not None
    assert valid_layers(disk(*LAYERS[2:]), marks.add) == (True, True)


def test_a_mark_of_an_image_that_nobody_can_see_is_the_domains_own() -> None:
    """Another domain may have another file under the same path; a file that both see is one file."""
    marks = mark_change(DataState.UNTOUCHED, replace(active_job(), data_state=DataState.BASE_MODIFIED))
    assert marks is not None
    assert valid_layers(disk(), marks.add, "web1") == (True, False, False, True)
    assert valid_layers(disk(), marks.add, "web2") == (True,) * 4
    seen = tuple(replace(mark, image=Image(mark.image.path, (1, 7))) for mark in marks.add)
    below = replace(LAYERS[1], file="/mnt/other", identity=(1, 7))
    assert valid_layers(disk(LAYERS[0], below), seen, "web2") == (True, False)
