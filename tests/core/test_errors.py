from __future__ import annotations

import pytest

from app.core.errors import Code, Problem, Refused, invalid, invalid_together, qemu_problem


@pytest.mark.parametrize(
    ("error_class", "desc", "code"),
    [
        ("GenericError", "Failed to resize base: No space left on device", Code.INSUFFICIENT_STORAGE),
        ("GenericError", 'Failed to get "write" lock', Code.IMAGE_LOCKED),
        ("GenericError", 'Failed to get shared "consistent read" lock', Code.IMAGE_LOCKED),
        ("GenericError", "Could not open 'b': Failed to get shared \"write\" lock", Code.IMAGE_LOCKED),
        ("CommandNotFound", "The command block-commit has not been found", Code.NOT_SUPPORTED),
        ("GenericError", "Node 'n2' is busy: block device is in use by block job: commit", Code.JOB_CONFLICT),
        (
            "GenericError",
            (
                "Permission conflict on node 'base': permissions 'write' are both required by an unnamed block device "
                "(uses node 'base' as 'root' child) and unshared by node 'o' (uses node 'base' as 'backing' child)."
            ),
            Code.IMAGE_SHARED,
        ),
        ("GenericError", "Need a root block node", Code.QEMU_ERROR),
        ("DeviceNotFound", "Device 'nope' not found", Code.QEMU_ERROR),
        ("GenericError", "Job ID 'bj-1' already in use", Code.QEMU_ERROR),
        ("GenericError", 'Failed to get "consistent read" lock', Code.IMAGE_LOCKED),
        (
            "GenericError",
            (
                "Permission conflict on node 'base': permissions 'write' are both required by node 'x' (uses node "
                "'base' as 'file' child) and unshared by block device 'exp' (uses node 'base' as 'root' child)."
            ),
            Code.QEMU_ERROR,
        ),
    ],
)
def test_qemus_refusal_has_our_code_where_there_is_one(error_class: str, desc: str, code: Code) -> None:
    """Whatever the code, QEMU's class and words go to the caller as they came."""
    problem = qemu_problem(error_class, desc, doing="block-commit")
    assert problem.code is code
    assert problem.extra == {"qmp": {"class": error_class, "desc": desc}}
    assert problem.detail.startswith("block-commit: ")
    assert desc in problem.detail


def test_wrong_fields_are_told_together() -> None:
    """Several wrong fields make one problem that has each one's pointer and words."""
    problem = invalid_together([invalid("/a", "too long"), invalid("/b/0", "unknown")])
    assert problem == Problem(
        code=Code.INVALID_REQUEST,
        detail="/a: too long; /b/0: unknown",
        extra={"errors": [{"pointer": "/a", "detail": "too long"}, {"pointer": "/b/0", "detail": "unknown"}]},
    )


def test_a_refusal_carries_its_problem() -> None:
    """What is raised has the problem for the caller, and says the same in a log."""
    problem = invalid("/top", "not a string")
    refused = Refused(problem)
    assert refused.problem is problem
    assert str(refused) == "invalid-request: /top: not a string"


def test_codes_are_spelt_as_their_names() -> None:
    """A code's text is its name in lower case with hyphens, so that none is misspelt."""
    assert [code.value for code in Code] == [code.name.lower().replace("_", "-") for code in Code]


@pytest.mark.parametrize("desc", ["Block node is read-only", "Could not reopen file: Permission denied"])
def test_an_image_that_qemu_can_not_write(desc: str) -> None:
    """The reason has a code of its own."""
    problem = qemu_problem("GenericError", desc, doing="block-commit")
    assert (problem.code, problem.extra) == (Code.IMAGE_READ_ONLY, {"qmp": {"class": "GenericError", "desc": desc}})
