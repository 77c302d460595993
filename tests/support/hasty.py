"""A build of the service that soon tries webhooks again: `SCHEDULE=MS,MS,… python -m tests.support.hasty`."""

from __future__ import annotations

import os

import uvloop

from app.logs import configure
from app.settings import load
from app.wiring import serve


def main() -> None:
    """Serve, with the waits between attempts that the environment names."""
    settings = load(None, os.environ)
    configure(settings.log_format)
    schedule = tuple(int(wait) for wait in os.environ["SCHEDULE"].split(","))
    uvloop.run(serve(settings, schedule=schedule))


if __name__ == "__main__":
    main()
