"""A build of the service on a disk that fails: `DISK_FILE=FILE python -m tests.support.failing`.

The file's JSON, such as {"fail_sync": 1, "only": "-wal"}, is what `tests.support.disk.Disk` is told; it is removed once
it has been read.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import uvloop

from app.logs import configure
from app.settings import load
from app.wiring import serve
from tests.support.disk import Disk


def main() -> None:
    """Serve until SIGTERM."""
    disk, file = Disk(), Path(os.environ["DISK_FILE"])
    disk.install()

    def listen() -> None:
        while True:
            if file.exists():
                for name, value in json.loads(file.read_text(encoding="utf-8")).items():
                    setattr(disk, name, value)
                file.unlink()
            time.sleep(0.01)

    threading.Thread(target=listen, daemon=True).start()
    settings = load(None, os.environ)
    configure(settings.log_format)
    uvloop.run(serve(settings))
    # The disk's functions are gone before the interpreter is.
    os._exit(0)


if __name__ == "__main__":
    main()
