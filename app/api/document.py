"""`python -m app.api.document` writes the files of `openapi/`, so that people can read them without the service."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Final

from app.api.app import create_app, openapi_json
from app.api.codes import problems_page

FOLDER: Final = Path(__file__).parents[2] / "openapi"


def pages() -> dict[Path, str]:
    """The files, each with the text that it should hold."""
    app = create_app(None, lambda _text: None, version=version("blockjobd"))
    return {FOLDER / "openapi.json": openapi_json(app), FOLDER / "problems.md": problems_page()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text)
