"""What docs/webhooks.md tells people to run does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from app.core.incoming import IncomingDelivery, Provider, signature_error
from app.core.outgoing import new_secret, signatures

PAGE = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text()
SECRET = new_secret(b"\x00\xffp" * 10)
BODY = '{"type": "job.completed", "data": {"id": "bj-1", "result": null}}'


def block(language: str, mark: str) -> str:
    """The one block of code on the page that has `mark` in it."""
    (found,) = (text for text in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if mark in text)
    return found


def in_shell(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-euo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False)


def test_a_pipeline_that_signs_by_itself(tmp_path: Path) -> None:
    """The request that the commands make is genuine."""
    (tmp_path / "ci.secret").write_text(f"{SECRET}\n")
    stub = "curl() { printf '%s\\0' \"$@\"; }\n"
    ran = in_shell(stub + block("sh", "webhook-signature: v1,$mac"), tmp_path)
    assert ran.returncode == 0, ran.stderr
    words = ran.stdout.split("\0")
    headers = dict(word.split(": ", 1) for word in words if ": " in word and not word.startswith("{"))
    delivery = IncomingDelivery(
        {name.lower(): value for name, value in headers.items()}, words[words.index("-d") + 1].encode()
    )
    assert signature_error(Provider.STANDARD, SECRET, delivery, time.time()) is None


@pytest.mark.parametrize(
    ("body", "age", "said"), [(BODY, 0, "genuine\n"), (BODY + " ", 0, "forged\n"), (BODY, 400, "genuine\ntoo old\n")]
)
def test_a_receiver_in_shell(tmp_path: Path, body: str, age: int, said: str) -> None:
    """It takes what is genuine, also beside another secret's signature, and nothing else."""
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "body").write_text(body)
    now = int(time.time()) - age
    headers = signatures((new_secret(b"x" * 32), SECRET), "wd-1", now, BODY.encode())
    script = block("sh", 'case " $signature "')
    ran = in_shell(script, tmp_path, id="wd-1", time=str(now), signature=headers["webhook-signature"])
    assert (ran.stdout, ran.returncode == 0) == (said, said == "genuine\n"), ran.stderr


def test_a_receiver_in_python() -> None:
    """It takes each id once, and what is not genuine never."""
    ids: list[str] = []
    done: list[tuple[str, object]] = []

    def seen(id_: str) -> bool:
        ids.append(id_)
        return ids.count(id_) > 1

    def go_on_with(id_: str, result: object) -> None:
        done.append((id_, result))

    names: dict[str, Any] = {"seen": seen, "go_on_with": go_on_with}
    exec(block("python", "def take").replace("whsec_…", SECRET), names)
    headers = dict(signatures((SECRET,), "wd-1", int(time.time()), BODY.encode()))
    assert [names["take"](headers, BODY.encode()) for _ in range(2)] == [204, 204]
    assert done == [("bj-1", None)]
    assert names["take"](headers, BODY.encode() + b" ") == 400


def test_a_secret_from_the_shell(tmp_path: Path) -> None:
    """What the page makes one with is taken."""
    (command,) = re.findall(r"`(echo \"whsec_.*?)`", PAGE)
    made = in_shell(command, tmp_path).stdout.strip()
    assert made.startswith("whsec_")
    assert len(made) == len(SECRET) + 4
