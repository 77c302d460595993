"""API tokens, made and revoked by one process while another one checks them."""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import pytest

from app.engine.ports.tokens import Role, Token
from app.journal.tokens import TokenError, Tokens

from .support import SetClock, opened

COMMAND = """
import sys
from pathlib import Path
from app.engine.ports.tokens import Role
from app.journal.tokens import Tokens
from tests.journal.support import SetClock
verb, state_dir, name = sys.argv[1:]
with Tokens.open(Path(state_dir), SetClock(5)) as tokens:
    print(tokens.create(Role.OPERATE, name) if verb == "create" else tokens.revoke(name))
"""
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tokens(tmp_path: Path) -> Generator[Tokens]:
    with Tokens.open(tmp_path, SetClock(5)) as opened_tokens:
        yield opened_tokens


def in_another_process(verb: str, state_dir: Path, name: str) -> str:
    command = [sys.executable, "-c", COMMAND, verb, str(state_dir), name]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def test_a_token_is_found_by_its_text(tokens: Tokens) -> None:
    """Its text opens the door, with its role; any other text does not."""
    text = tokens.create(Role.READ, "ci.build-1_x")
    assert re.fullmatch(r"bjt_[A-Za-z0-9_-]{43}", text)
    assert tokens.find(text) == Token(name="ci.build-1_x", role=Role.READ, created_at=5)
    for wrong in ("", "bjt_", text[:-1], f"{text}x", text.upper(), "ci.build-1_x", "naïve"):
        assert tokens.find(wrong) is None


def test_the_text_is_not_kept(tokens: Tokens, tmp_path: Path) -> None:
    """No file of the state directory holds a token's text; what is kept is its SHA-256."""
    text = tokens.create(Role.READ, "ci")
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert text.encode() not in content
    assert hashlib.sha256(text.encode()).hexdigest().encode() in content


def test_a_revoked_token_is_worthless_at_once(tokens: Tokens) -> None:
    """It is not found any more; its name can be given again, to another text."""
    text = tokens.create(Role.ADMIN, "ops")
    tokens.revoke("ops")
    assert tokens.find(text) is None
    assert tokens.list_tokens() == []
    assert tokens.create(Role.READ, "ops") != text


def test_tokens_are_listed_by_name(tokens: Tokens) -> None:
    """The list has names, roles and times, and no texts."""
    tokens.create(Role.OPERATE, "b")
    tokens.create(Role.READ, "a")
    assert tokens.list_tokens() == [
        Token(name="a", role=Role.READ, created_at=5),
        Token(name="b", role=Role.OPERATE, created_at=5),
    ]


@pytest.mark.parametrize("name", ["", "-x", ".x", "a b", "a/b", "é", "a\n", "a" * 65])
def test_a_malformed_name_is_refused(tokens: Tokens, name: str) -> None:
    """The message repeats the name and says what a name is made of."""
    with pytest.raises(TokenError, match=re.escape(repr(name)) + ".*1 to 64 letters"):
        tokens.create(Role.READ, name)


def test_a_taken_name_is_refused(tokens: Tokens) -> None:
    """A second token of a name is refused, and the first one stays."""
    text = tokens.create(Role.READ, "a" * 64)
    with pytest.raises(TokenError, match="already"):
        tokens.create(Role.ADMIN, "a" * 64)
    assert tokens.find(text)


def test_the_name_of_the_services_own_token_is_refused(tokens: Tokens) -> None:
    """`admin` is made by the service alone."""
    with pytest.raises(TokenError, match="'admin' is the name of the token that the service makes"):
        tokens.create(Role.READ, "admin")


def test_revoking_what_is_not_there_is_refused(tokens: Tokens) -> None:
    """A name that was mistyped is told, not passed over."""
    with pytest.raises(TokenError, match="no token 'cj'"):
        tokens.revoke("cj")


def test_commands_work_while_the_service_runs(tokens: Tokens, tmp_path: Path) -> None:
    """A token that another process makes is good for the running service at once, and worthless once revoked there."""
    with opened(tmp_path):
        text = in_another_process("create", tmp_path, "ci")
        assert tokens.find(text) == Token(name="ci", role=Role.OPERATE, created_at=5)
        in_another_process("revoke", tmp_path, "ci")
        assert tokens.find(text) is None


def test_a_command_waits_for_a_write_of_the_service(tokens: Tokens, tmp_path: Path) -> None:
    """A token is made although somebody else is writing just then; checking tokens does not wait for either."""
    text = tokens.create(Role.READ, "first")
    with closing(sqlite3.connect(tmp_path / "journal.sqlite3", isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.5, lambda: other.execute("COMMIT"))
        timer.start()
        began = time.monotonic()
        assert tokens.find(text)
        assert time.monotonic() - began < 0.4
        tokens.create(Role.READ, "second")
        timer.join()
    assert [token.name for token in tokens.list_tokens()] == ["first", "second"]


def test_tokens_are_found_from_any_thread(tokens: Tokens) -> None:
    """Requests that are served by threads check tokens at the same time."""
    texts = {name: tokens.create(Role.READ, name) for name in "abcd"}
    wrong: list[str] = []

    def look(name: str) -> None:
        for _ in range(300):
            found = tokens.find(texts[name])
            if found is None or found.name != name:
                wrong.append(name)

    threads = [threading.Thread(target=look, args=(name,)) for name in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_first_start_makes_an_admin_token(tokens: Tokens, tmp_path: Path) -> None:
    """It stands in a file for its owner only, ends with a newline, and works; later starts change nothing."""
    before = os.umask(0)
    try:
        path = tokens.ensure_admin()
    finally:
        os.umask(before)
    assert path == tmp_path / "token"
    assert path.stat().st_mode & 0o777 == 0o600
    text = path.read_text()
    assert re.fullmatch(r"bjt_[A-Za-z0-9_-]{43}\n", text)
    assert tokens.find(text.strip()) == Token(name="admin", role=Role.ADMIN, created_at=5)
    tokens.ensure_admin()
    assert path.read_text() == text
    assert len(tokens.list_tokens()) == 1
    assert {each.name for each in tmp_path.iterdir()} <= {
        "token",
        "journal.sqlite3",
        "journal.sqlite3-wal",
        "journal.sqlite3-shm",
    }


def test_a_token_file_that_is_there_is_used(tokens: Tokens, tmp_path: Path) -> None:
    """A token that was put there, or outlived the database, is registered; it takes the place of an earlier one."""
    tokens.ensure_admin()
    old = (tmp_path / "token").read_text().strip()
    handed = "bjt_" + "A" * 43
    (tmp_path / "token").write_text(handed)
    tokens.ensure_admin()
    assert tokens.find(handed) == Token(name="admin", role=Role.ADMIN, created_at=5)
    assert tokens.find(old) is None


@pytest.mark.parametrize("content", ["", "\n", "secret\n", "bjt_short\n"])
def test_a_token_file_without_a_token_is_refused(tokens: Tokens, tmp_path: Path, content: str) -> None:
    """Nothing that can be guessed becomes an admin token by accident."""
    (tmp_path / "token").write_text(content)
    with pytest.raises(TokenError, match="holds no token"):
        tokens.ensure_admin()
    assert tokens.list_tokens() == []


def test_a_crash_while_the_token_file_is_written_does_no_harm(tokens: Tokens, tmp_path: Path) -> None:
    """What is left of an earlier attempt is not taken for a token and not in the way."""
    (tmp_path / ".token.new").write_text("bjt_")
    text = tokens.ensure_admin().read_text().strip()
    assert tokens.find(text)
    assert not (tmp_path / ".token.new").exists()


def test_revoking_the_admin_token_removes_its_file(tokens: Tokens, tmp_path: Path) -> None:
    """It stays revoked over a restart, which makes another one."""
    text = tokens.ensure_admin().read_text().strip()
    tokens.revoke("admin")
    assert not (tmp_path / "token").exists()
    new = tokens.ensure_admin().read_text().strip()
    assert new != text
    assert tokens.find(text) is None
    assert tokens.find(new)


def test_revoking_another_token_leaves_the_file(tokens: Tokens, tmp_path: Path) -> None:
    """The file goes only with the token that it holds."""
    tokens.ensure_admin()
    tokens.create(Role.ADMIN, "ops")
    tokens.revoke("ops")
    assert (tmp_path / "token").exists()
