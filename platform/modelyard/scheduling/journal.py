"""The scheduler's memory: an append-only table of events in any SQL database, each chained to the one before.

An event is written before it takes effect, in one transaction, so a kill at any moment loses nothing that was
acknowledged. Each row carries the SHA-256 of its content and of the row before it: a changed, missing or
half-written row is found when the journal is read, and named by its line.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql

from modelyard.errors import IntegrityError, StorageError

GENESIS = "0" * 64
STATE = "state"
"""Kind of the event that stands for all lines before it."""
_METADATA = sql.MetaData()
_EVENTS = sql.Table(
    "scheduler_events",
    _METADATA,
    sql.Column("line", sql.Integer, primary_key=True, autoincrement=False),
    sql.Column("at_s", sql.Float, nullable=False),
    sql.Column("kind", sql.String(32), nullable=False),
    sql.Column("body", sql.Text, nullable=False),
    sql.Column("chain", sql.String(64), nullable=False),
)


@dataclass(frozen=True)
class Event:
    """Something that happened, at `at_s` seconds since the epoch."""

    at_s: float
    kind: str
    body: Mapping[str, Any]


class Journal:
    """Events in the order they happened. One writer; a second one is refused at its first append."""

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        """Open `url` (SQLAlchemy's, e.g. `sqlite:////path/journal.db`, `postgresql://...`); made when absent.

        Raises:
            StorageError: the database cannot be reached or written.
        """
        self.url, self._clock = url, clock
        self._line, self._chain = 0, GENESIS
        self._first = 0
        try:
            self._engine = sql.create_engine(url, pool_pre_ping=True)
            if self._engine.dialect.name == "sqlite":
                sql.event.listen(self._engine, "connect", _durable_sqlite)
            _METADATA.create_all(self._engine)
        except (sql.exc.SQLAlchemyError, ImportError) as error:
            raise _unreachable(url, error) from error

    def read(self) -> list[Event]:
        """All events so far, checked; appends go on after the last of them.

        Raises:
            IntegrityError: a line was changed, is missing or does not parse; it is named.
            StorageError: the database cannot be read.
        """
        try:
            with self._engine.connect() as connection:
                rows = connection.execute(sql.select(_EVENTS).order_by(_EVENTS.c.line)).all()
        except sql.exc.SQLAlchemyError as error:
            raise _unreachable(self.url, error) from error
        events = []
        line, chain = 0, GENESIS
        if rows and rows[0].kind == STATE:  # it stands for all lines before it
            line, chain = rows[0].line - 1, _previous(rows[0].body)
        for row in rows:
            events.append(self._checked(row, line + 1, chain))
            line, chain = row.line, row.chain
        self._line, self._chain = line, chain
        self._first = rows[0].line - 1 if rows else 0
        return events

    def append(self, *events: tuple[str, Mapping[str, Any]]) -> list[Event]:
        """Write `(kind, body)` pairs, all or none of them; they are on disk when this returns.

        Raises:
            IntegrityError: another scheduler writes to the same journal.
            StorageError: the database cannot be written; nothing of it took effect.
        """
        rows, written = [], []
        line, chain, now = self._line, self._chain, self._clock()
        for kind, body in events:
            text = _text(body)
            line, chain = line + 1, _link(chain, line + 1, now, kind, text)
            rows.append({"line": line, "at_s": now, "kind": kind, "body": text, "chain": chain})
            written.append(Event(now, kind, json.loads(text)))
        if rows:
            self._insert(rows)
            self._line, self._chain = line, chain
        return written

    @property
    def length(self) -> int:
        """Number of lines, counted when they are read and written."""
        return self._line - self._first

    def compact(self, state: Mapping[str, Any]) -> None:
        """Put one event, all that the lines so far amount to, in their place; both or neither.

        Raises:
            StorageError: the database cannot be written; the lines are as they were.
        """
        now, line = self._clock(), self._line + 1
        text = _text({**state, "previous": self._chain})
        row = {"line": line, "at_s": now, "kind": STATE, "body": text}
        row["chain"] = _link(self._chain, line, now, STATE, text)
        try:
            with self._engine.begin() as connection:
                connection.execute(sql.insert(_EVENTS), [row])
                connection.execute(sql.delete(_EVENTS).where(_EVENTS.c.line < line))
        except sql.exc.SQLAlchemyError as error:
            raise _unreachable(self.url, error) from error
        self._line, self._chain, self._first = line, str(row["chain"]), line - 1

    def cut(self, line: int) -> int:
        """Drop `line` and everything after it: the way back from a damaged journal. Returns how many rows went."""
        try:
            with self._engine.begin() as connection:
                gone = connection.execute(sql.delete(_EVENTS).where(_EVENTS.c.line >= line)).rowcount
        except sql.exc.SQLAlchemyError as error:
            raise _unreachable(self.url, error) from error
        return int(gone)

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def _insert(self, rows: Sequence[Mapping[str, Any]]) -> None:
        try:
            with self._engine.begin() as connection:
                connection.execute(sql.insert(_EVENTS), list(rows))
        except sql.exc.IntegrityError as error:
            raise IntegrityError(
                f"scheduler journal {_shown(self.url)}: line {rows[0]['line']} is there already",
                "another scheduler writes to it; stop one of them, or give each its own journal",
            ) from error
        except sql.exc.SQLAlchemyError as error:
            raise _unreachable(self.url, error) from error

    def _checked(self, row: Any, line: int, chain: str) -> Event:
        problem = ""
        if row.line != line:
            problem = f"line {line} is missing"
        elif _link(chain, row.line, row.at_s, row.kind, row.body) != row.chain:
            problem = f"line {line} ({row.kind}) was changed after it was written"
        if problem:
            raise IntegrityError(
                f"scheduler journal {_shown(self.url)}: {problem}",
                f"restore it from a backup, or drop that line and all after it: "
                f"modelyard scheduler recover --journal {_shown(self.url)} --from-line {line}",
            )
        return Event(row.at_s, row.kind, json.loads(row.body))


def _text(body: Mapping[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _previous(body: str) -> str:
    """The chain before a state event; what is damaged gives another, and is found so."""
    try:
        return str(json.loads(body).get("previous"))
    except (ValueError, AttributeError):
        return GENESIS


def _link(chain: str, line: int, at_s: float, kind: str, body: str) -> str:
    content = json.dumps([chain, line, at_s, kind, body])
    return hashlib.sha256(content.encode()).hexdigest()


def _durable_sqlite(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _shown(url: str) -> str:
    """The URL without its password."""
    try:
        return sql.engine.make_url(url).render_as_string(hide_password=True)
    except sql.exc.ArgumentError:
        return url


def _unreachable(url: str, error: Exception) -> StorageError:
    reason = str(getattr(error, "orig", None) or error).splitlines()[0]
    return StorageError(
        f"scheduler journal {_shown(url)}: {reason}", "check that the database runs and that its disk has room"
    )
