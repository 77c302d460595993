"""The command that starts a commit, in QEMU's words: sent by the monitor, shown by a dry run."""

from __future__ import annotations


def block_commit_arguments(
    *, device: str, top_node: str, base_node: str, backing_file: str | None, speed: int, on_error: str
) -> dict[str, object]:
    """The arguments of QAPI `block-commit`, without the `job-id`.

    `device` is the node-name of the disk's root, `speed` is in bytes/s (0: no limit), `backing_file` the string for
    the header of the layer above `top_node`, None for a commit of the active layer. The job stays in QEMU once it has
    concluded, so that its outcome can be read after a crash of ours.

    A commit below the active layer waits for `job-finalize` before it changes the header: QEMU does so before the
    merged data is on the disk, and a QEMU that is killed in between leaves a header that leads past it. A pending
    commit of the active layer would hold up the guest's I/O; QEMU has its data written before the pivot.
    """
    arguments: dict[str, object] = {"device": device, "top-node": top_node, "base-node": base_node}
    if backing_file is not None:
        arguments["backing-file"] = backing_file
    if speed > 0:
        arguments["speed"] = speed
    return arguments | {"on-error": on_error, "auto-finalize": backing_file is None, "auto-dismiss": False}
