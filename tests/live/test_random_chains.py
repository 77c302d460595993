"""Plan and run agree: random chains, random requests, and what QEMU does with them."""

from __future__ import annotations

import os
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.live.conftest import Boot
from tests.support.chains import MIB, Chain, assert_same, blockdev, drive, read_image
from tests.support.service import Service

pytestmark = pytest.mark.live

SEEDS = range(int(os.environ.get("CHAINS", "24")))
"""More of them than are tried each time: `CHAINS=500 pytest tests/live/test_random_chains.py`."""

HARMFUL = frozenset({"sizes-unsafe", "base-cannot-grow", "backing-file-impossible", "nothing-to-pull"})
"""What a random request on a sound chain may be refused for: a cluster of 512 bytes holds no long name."""

BLOCKS = 16384
"""Bytes that the file system itself may take for a file: it counts whole blocks, and lists of its pieces."""


@dataclass(frozen=True)
class Asked:
    """A request and the disk that it is for."""

    verb: str
    body: dict[str, Any]


def random_chain(folder: Path, rng: random.Random) -> Chain:
    """2 to 8 layers of several formats, sizes and clusters, with data, zeros and holes."""
    chain = Chain([], [])
    size = 0
    for number in range(rng.randint(2, 8)):
        format_ = rng.choice(["raw", "qcow2"]) if number == 0 else "qcow2"
        size = rng.choice([size or 4 * MIB, 4 * MIB, 4 * MIB + 512 * rng.randint(1, 900), 2 * MIB, 6 * MIB])
        image = folder / f"i{number}.{format_}"
        create = ["qemu-img", "create", "-q", "-f", format_]
        if format_ == "qcow2":
            options = [f"cluster_size={rng.choice([512, 4096, 65536, 65536, 2 * MIB])}"]
            options.append(f"compat={rng.choice(['0.10', '1.1', '1.1'])}")
            create += ["-o", ",".join(options)]
        if number:
            below = chain.images[-1]
            create += ["-b", str(below) if rng.random() < 0.5 else below.name, "-F", chain.formats[-1]]
        subprocess.run([*create, str(image), str(size)], check=True)
        before = chain.views[-1] if number else b""
        view = bytearray(before[:size].ljust(size, b"\0"))
        commands: list[str] = []
        for _ in range(rng.randint(0, 8)):
            at = rng.randrange(size // 512) * 512
            length = min(size - at, 512 * rng.choice([1, 7, 128, 700]))
            pattern = rng.choice([0, *range(1, 256)])
            zero = rng.random() < 0.2
            view[at : at + length] = bytes([0 if zero else pattern]) * length
            commands += ["-c", f"write -q -z {at} {length}" if zero else f"write -q -P {pattern} {at} {length}"]
        if commands:
            subprocess.run(["qemu-io", "-f", format_, *commands, str(image)], check=True)
        chain.images.append(image)
        chain.views.append(bytes(view))
        chain.formats.append(format_)
    return chain


def random_request(chain: Chain, rng: random.Random) -> Asked:
    """A pull or a commit of some run of layers."""
    last = len(chain.images) - 1
    top = rng.randint(0, last - 1)
    base = rng.choice([None, rng.randint(top + 1, last)])
    body: dict[str, Any] = {"top": f"vda[{top}]", "base": None if base is None else f"vda[{base}]"}
    if rng.random() < 0.5:
        return Asked("pull", body)
    return Asked("commit", body | ({"flags": ["active"], "on_ready": "pivot"} if top == 0 else {}))


def on_disk(chain: Chain) -> dict[str, int]:
    """Bytes that each image takes."""
    return {str(image): image.stat().st_blocks * 512 for image in chain.images}


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_planned_is_done(service: Service, boot: Boot, domain: str, folder: Path, seed: int) -> None:
    """What a dry run lets pass, QEMU takes, the guest reads the same, and no file grows by more than was said."""
    rng = random.Random(seed)
    chain = random_chain(folder, rng)
    asked = random_request(chain, rng)
    qemu = boot(rng.choice([drive, blockdev])(chain))
    url = f"/domains/{domain}/disks/vda/{asked.verb}"
    dry = service.client.post(f"{url}?dry_run=true", json=asked.body)
    before = on_disk(chain)
    answer = service.client.post(url, json=asked.body)
    if dry.status_code != 200:
        assert (answer.status_code, answer.json()["code"]) == (dry.status_code, dry.json()["code"])
        assert dry.json()["code"] in HARMFUL, dry.text
        return
    plan = dry.json()
    assert answer.status_code == 202, answer.text
    job = service.wait_for_job(answer.json()["id"])
    assert job["state"] == "completed", job["error"]
    assert job["result"]["chain"] == plan["chain_after"]
    qemu.quit()
    active = Path(plan["chain_after"][0])
    seen = read_image(active, chain.formats[chain.images.index(active)])
    # A larger base shows what it has beyond the end of the layers above, as the plan warns.
    assert len(seen) == len(chain.view) or "disk-grows" in {warning["code"] for warning in plan["warnings"]}
    assert_same(seen[: len(chain.view)], chain.view)
    written = job["top"] if asked.verb == "pull" else job["base"]
    for file, size in on_disk(chain).items():
        bound = plan["base_growth_max"] if file == written else 0
        assert size - before[file] <= bound + BLOCKS, (file, size - before[file], bound)
    for file in plan["chain_after"]:
        if file.endswith(".qcow2"):
            subprocess.run(["qemu-img", "check", "-q", file], check=True)
