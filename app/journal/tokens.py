"""API tokens: kept as hashes in the journal's file, where `blockjobd token` changes them while the service runs."""

from __future__ import annotations

import hashlib
import re
import secrets
import sqlite3
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Final, Self

from app.engine.ports.clock import Clock
from app.engine.ports.tokens import Role, Token
from app.journal.database import connect, transaction
from app.journal.failures import reading
from app.journal.files import sync_folder, write_private

ADMIN: Final = "admin"
"""The name of the token that the service makes for itself at its first start."""

FILE: Final = "token"

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TEXT: Final = re.compile(r"bjt_[A-Za-z0-9_-]{43}")


class TokenError(ValueError):
    """What was asked of the tokens can't be done; the message says why, for a person."""


class Tokens:
    """The tokens of a state directory.

    Other processes may change them at any time, and what they change holds at once. Calls block, for microseconds
    (`find`) or as long as the disk takes to store; they may come from any thread. All raise `JournalError`.
    """

    def __init__(self, state_dir: Path, connection: sqlite3.Connection, clock: Clock) -> None:
        self._file = state_dir / FILE
        self._connection = connection
        self._clock = clock
        self._lock = Lock()

    @classmethod
    def open(cls, state_dir: Path, clock: Clock) -> Tokens:
        """The tokens of `state_dir`, which is made if it is missing; raises as `app.journal.database.connect` does."""
        return cls(state_dir, connect(state_dir), clock)

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def find(self, text: str) -> Token | None:
        """The token with this text, unless there is none or it was revoked."""
        with self._lock, reading():
            row = self._connection.execute(
                "SELECT name, role, created_at FROM tokens WHERE hash = ?", (_hash(text),)
            ).fetchone()
        return _token(*row) if row else None

    def list_tokens(self) -> list[Token]:
        """Every token, by name."""
        with self._lock, reading():
            rows = self._connection.execute("SELECT name, role, created_at FROM tokens ORDER BY name").fetchall()
        return [_token(*row) for row in rows]

    def create(self, role: Role, name: str) -> str:
        """Make a token; its text, which can't be had again.

        Raises `TokenError` where the name is malformed, taken, or the service's own.
        """
        if not NAME.fullmatch(name):
            raise TokenError(
                f"{name!r} can't be a token's name: it takes 1 to 64 letters, digits, '.', '_' and '-', "
                "and starts with a letter or digit"
            )
        if name == ADMIN:
            raise TokenError(f"{ADMIN!r} is the name of the token that the service makes itself; take another one")
        text = _new_text()
        with self._lock, transaction(self._connection):
            if self._connection.execute("SELECT 1 FROM tokens WHERE name = ?", (name,)).fetchone():
                raise TokenError(f"there is a token {name!r} already; revoke it first, or take another name")
            self._insert(text, role, name)
        return text

    def revoke(self, name: str) -> None:
        """Make a token worthless; with it goes the state directory's token file, if it holds that token.

        Raises `TokenError` where there is no such token.
        """
        with self._lock, transaction(self._connection):
            row = self._connection.execute("SELECT hash FROM tokens WHERE name = ?", (name,)).fetchone()
            if row is None:
                raise TokenError(f"there is no token {name!r}")
            # The file goes first: if it outlived the row, the next start would register its token again.
            kept = self._kept()
            if kept is not None and _hash(kept) == row[0]:
                self._file.unlink(missing_ok=True)
                sync_folder(self._file.parent)
            self._connection.execute("DELETE FROM tokens WHERE name = ?", (name,))

    def ensure_admin(self) -> Path:
        """See to it that the token file holds a working admin token; the file's path.

        A file that is there is taken as it is, so that a token can be handed to a service before its first start.
        Raises `TokenError` where it holds no token, and `OSError` where it can't be read or written.
        """
        text = self._kept()
        if text is None:
            text = _new_text()
            write_private(self._file, f"{text}\n")
        if not TEXT.fullmatch(text):
            raise TokenError(f"{self._file} holds no token; remove it to have one made")
        found = self.find(text)
        if found is None or (found.name, found.role) != (ADMIN, Role.ADMIN):
            with self._lock, transaction(self._connection):
                # A file that somebody removed or replaced takes its old token with it.
                self._connection.execute("DELETE FROM tokens WHERE name = ? OR hash = ?", (ADMIN, _hash(text)))
                self._insert(text, Role.ADMIN, ADMIN)
        return self._file

    def _insert(self, text: str, role: Role, name: str) -> None:
        self._connection.execute(
            "INSERT INTO tokens (hash, name, role, created_at) VALUES (?, ?, ?, ?)",
            (_hash(text), name, role.value, self._clock.now()),
        )

    def _kept(self) -> str | None:
        try:
            return self._file.read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:
            return None


def _new_text() -> str:
    return f"bjt_{secrets.token_urlsafe(32)}"


def _hash(text: str) -> str:
    # No salt and no stretching: 256 random bits can't be guessed, and the hash is what a token is looked up by.
    return hashlib.sha256(text.encode()).hexdigest()


def _token(name: str, role: str, created_at: int) -> Token:
    return Token(name=name, role=Role(role), created_at=created_at)
