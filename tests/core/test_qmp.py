from __future__ import annotations

import pytest

from app.core.qmp import block_commit_arguments


@pytest.mark.parametrize(
    ("backing_file", "speed", "optional"),
    [
        (None, 0, {}),
        ("base.qcow2", 0, {"backing-file": "base.qcow2"}),
        (None, 1, {"speed": 1}),
        ("base.qcow2", 2**63 - 1, {"backing-file": "base.qcow2", "speed": 2**63 - 1}),
    ],
)
def test_the_arguments_of_block_commit(backing_file: str | None, speed: int, optional: dict[str, object]) -> None:
    """Nodes are named, never files; where a header is to be written the job waits for that; it stays to be read."""
    assert block_commit_arguments(
        device="n3", top_node="n2", base_node="n0", backing_file=backing_file, speed=speed, on_error="enospc"
    ) == {
        "device": "n3",
        "top-node": "n2",
        "base-node": "n0",
        "on-error": "enospc",
        "auto-finalize": backing_file is None,
        "auto-dismiss": False,
        **optional,
    }
