"""`python -m bench [NAME…]`: measure, print tables, and keep the figures."""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

from bench.figures import Section
from bench.report import draw, markdown, read_pictures, versions, write_results, write_tables
from bench.stage import Stage

ALL = ("small", "large", "events", "api", "domains", "many", "journal", "soak")
HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
DOCUMENTS = HERE.parent / "docs"


def main() -> int:
    """Run the benchmarks that were named, or all; a figure never fails."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(ALL)}")
    parser.add_argument("--short", action="store_true", help="only show that they work, and keep no figures")
    parser.add_argument("--redraw", action="store_true", help="only draw the pictures of the figures that were kept")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="where images and journals are put")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(ALL):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
    if asked.redraw:
        for picture in read_pictures(RESULTS):
            draw(picture, DOCUMENTS / "pictures")
        return 0
    print("\n".join(f"- {name}: {text}" for name, text in versions().items()), end="\n\n", flush=True)
    sections: list[Section] = []
    begin = time.monotonic()
    for name in asked.names or ALL:
        started = time.monotonic()
        folder = Path(tempfile.mkdtemp(prefix="bjb-", dir=asked.folder))
        try:
            section: Section = importlib.import_module(f"bench.{name}").run(Stage(folder, asked.short))
        except BaseException:
            # The log of the service in there says why.
            print(f"{name} failed; what it has left is in {folder}", file=sys.stderr)
            raise
        shutil.rmtree(folder)
        sections.append(section)
        print(markdown(section), f"\n({time.monotonic() - started:.0f} s)\n", sep="", flush=True)
    if not asked.short:
        write_results(RESULTS, sections, seconds=time.monotonic() - begin)
        write_tables(DOCUMENTS / "performance.md", sections)
        for picture in (picture for section in sections for picture in section.pictures):
            draw(picture, DOCUMENTS / "pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
