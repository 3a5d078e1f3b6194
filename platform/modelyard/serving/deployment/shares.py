"""What each canary gets of its model's calls, in the gateway's database, and how deployments answered lately."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import sqlalchemy as sql

from modelyard.security.database import connect, default_url, unreachable
from modelyard.serving.deployment.rollout import Outcomes
from modelyard.serving.deployment.routing import Share

T = TypeVar("T")
_METADATA = sql.MetaData()
_SHARES = sql.Table(
    "serving_shares",
    _METADATA,
    sql.Column("application", sql.String(200), primary_key=True),
    sql.Column("percent", sql.Float, nullable=False),
    sql.Column("is_shadow", sql.Boolean, nullable=False),
    sql.Column("withdrawn", sql.Text, nullable=False),
    sql.Column("changed_s", sql.Float, nullable=False),
)
_CALLS = sql.Table(
    "serving_calls",
    _METADATA,
    sql.Column("application", sql.String(200), nullable=False, index=True),
    sql.Column("at_s", sql.Float, nullable=False, index=True),
    sql.Column("is_error", sql.Boolean, nullable=False),
    sql.Column("first_token_s", sql.Float),
)
Call = tuple[str, float, bool, float | None]
"""Application, Unix time, whether it failed, seconds to the first token."""


class ShareStore:
    """Shares and the calls they are judged by, the same for all replicas of a gateway."""

    def __init__(self, url: str | None = None, *, clock: Callable[[], float] = time.time) -> None:
        """Open the database (`MODELYARD_GATEWAY_DB` by default).

        Raises:
            StorageError: it cannot be reached or written.
        """
        self._url, self._clock = url or default_url(), clock
        self._engine = connect(self._url, _METADATA)

    def shares(self) -> dict[str, Share]:
        """Share by application."""
        rows = self._run(lambda c: c.execute(sql.select(_SHARES)).all())
        return {row.application: Share(row.percent, row.is_shadow, row.withdrawn) for row in rows}

    def set_share(self, application: str, share: Share) -> None:
        """Give an application its share from now on; what was counted before is forgotten."""
        values = {
            "percent": share.percent,
            "is_shadow": share.is_shadow,
            "withdrawn": share.withdrawn,
            "changed_s": self._clock(),
        }

        def change(connection: sql.Connection) -> None:
            connection.execute(sql.delete(_SHARES).where(_SHARES.c.application == application))
            connection.execute(sql.insert(_SHARES).values(application=application, **values))

        self._run(change)

    def withdraw(self, application: str, why: str) -> bool:
        """Take a canary out; False when another gateway has done so before."""
        rows = _SHARES.c.application == application, _SHARES.c.withdrawn == ""
        done = self._run(lambda c: c.execute(sql.update(_SHARES).where(*rows).values(withdrawn=why)).rowcount)
        return bool(done)

    def forget(self, application: str) -> None:
        """Drop an application that is no longer deployed."""

        def change(connection: sql.Connection) -> None:
            connection.execute(sql.delete(_SHARES).where(_SHARES.c.application == application))
            connection.execute(sql.delete(_CALLS).where(_CALLS.c.application == application))

        self._run(change)

    def record(self, calls: Iterable[Call], keep_s: float) -> None:
        """Add calls and drop those older than `keep_s`."""
        rows = [dict(zip(("application", "at_s", "is_error", "first_token_s"), call, strict=True)) for call in calls]

        def change(connection: sql.Connection) -> None:
            if rows:
                connection.execute(sql.insert(_CALLS), rows)
            connection.execute(sql.delete(_CALLS).where(_CALLS.c.at_s < self._clock() - keep_s))

        self._run(change)

    def outcomes(self, applications: Iterable[str], window_s: float) -> Mapping[str, Outcomes]:
        """How each application answered within the window, and since the first one's share was set."""
        names = list(applications)
        began = sql.select(sql.func.max(_SHARES.c.changed_s)).where(_SHARES.c.application.in_(names))
        columns = _CALLS.c.application, _CALLS.c.is_error, _CALLS.c.first_token_s

        def read(connection: sql.Connection) -> list[Any]:
            since = max(connection.execute(began).scalar() or 0.0, self._clock() - window_s)
            chosen = sql.select(*columns).where(_CALLS.c.application.in_(names), _CALLS.c.at_s >= since)
            return list(connection.execute(chosen).all())

        found = {}
        rows = self._run(read)
        for name in names:
            mine = [row for row in rows if row.application == name]
            first = [row.first_token_s for row in mine if row.first_token_s is not None]
            found[name] = Outcomes(len(mine), sum(row.is_error for row in mine), first)
        return found

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def _run(self, work: Callable[[sql.Connection], T]) -> T:
        try:
            with self._engine.begin() as connection:
                return work(connection)
        except sql.exc.SQLAlchemyError as error:
            raise unreachable(self._url, error) from error
