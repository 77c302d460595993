"""Stores versions of a job until it is killed, and prints what the journal acknowledged: version, last event id.

Arguments: state directory, the id of a job that is there already.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

from app.core.machine.step import StoredVersion
from app.core.states import EventType

from .support import heard_by, opened


async def main(state_dir: Path, job_id: str) -> None:
    """Two versions and two events to a transaction."""
    with opened(state_dir) as journal:
        heard = heard_by(journal)
        job = await journal.job(job_id)
        assert job is not None
        while True:
            paused = replace(job, version=job.version + 1)
            job = replace(job, version=job.version + 2)
            await journal.store([StoredVersion(EventType.PAUSED, paused), StoredVersion(EventType.RESUMED, job)])
            sys.stdout.write(f"{job.version} {heard[-1].id}\n")
            sys.stdout.flush()


asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
