"""What was used, shared by all replicas: one row a subject, changed in one transaction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sql

from modelyard.security import database
from modelyard.serving.gateway import limits

TABLES = sql.MetaData()
_USAGE = sql.Table(
    "gateway_usage",
    TABLES,
    sql.Column("subject", sql.String(512), primary_key=True),
    sql.Column("slots", sql.Text, nullable=False),
)


@dataclass(frozen=True)
class Want:
    """Units of one subject that a call needs."""

    subject: str
    window: limits.Window
    needed: int


@dataclass(frozen=True)
class Refusal:
    """The first want that does not fit; nothing of the call was counted."""

    want: Want
    remaining: int
    wait_s: float | None
    """None: it never will."""
    reset_s: float


class UsageStore:
    """Counts in a database. Methods wait for it; call them off the event loop."""

    def __init__(self, url: str | None = None) -> None:
        """Open the database; the table is made when absent.

        Raises:
            StorageError: it cannot be reached or written; so does `exchange`.
        """
        self.url = url or database.default_url()
        self._engine = database.connect(self.url, TABLES)

    def exchange(
        self, now_s: float, changes: Mapping[str, limits.Slots], wants: Sequence[Want]
    ) -> list[limits.Grant] | Refusal:
        """Apply `changes` (subject -> slot -> units), then grant all of `wants` or none of them."""
        try:
            with self._engine.begin() as connection:
                return _exchange(connection, now_s, changes, wants)
        except sql.exc.SQLAlchemyError as error:
            raise database.unreachable(self.url, error) from error

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()


def _exchange(
    connection: sql.Connection, now_s: float, changes: Mapping[str, limits.Slots], wants: Sequence[Want]
) -> list[limits.Grant] | Refusal:
    subjects = sorted({*changes, *(want.subject for want in wants)})  # in one order everywhere: no deadlock
    before = {subject: _locked(connection, subject) for subject in subjects}
    after = {subject: limits.changed(slots, changes.get(subject, {})) for subject, slots in before.items()}
    answer = _granted(after, now_s, wants)
    if not isinstance(answer, Refusal):
        for want, grant in zip(wants, answer, strict=True):
            kept = limits.live(want.window, after[want.subject], now_s)
            after[want.subject] = limits.changed(kept, {grant.slot: grant.units})
    for subject in subjects:
        if after[subject] != before[subject]:
            text = json.dumps({slot: units for slot, units in after[subject].items() if units})
            connection.execute(sql.update(_USAGE).where(_USAGE.c.subject == subject).values(slots=text))
    return answer


def _granted(used: Mapping[str, limits.Slots], now_s: float, wants: Sequence[Want]) -> list[limits.Grant] | Refusal:
    grants = []
    for want in wants:
        slots = used[want.subject]
        grant = limits.grant(want.window, slots, now_s, want.needed)
        if grant is None:
            left = max(0, want.window.limit - sum(limits.live(want.window, slots, now_s).values()))
            wait = limits.wait_s(want.window, slots, now_s, want.needed)
            return Refusal(want, left, wait, limits.reset_s(want.window, slots, now_s))
        grants.append(grant)
    return grants


def _locked(connection: sql.Connection, subject: str) -> dict[int, int]:
    """The row of `subject`, made when absent, and ours until the transaction ends."""
    query = sql.select(_USAGE.c.slots).where(_USAGE.c.subject == subject).with_for_update()
    text = connection.execute(query).scalar()
    if text is None:
        try:
            with connection.begin_nested():
                connection.execute(sql.insert(_USAGE).values(subject=subject, slots="{}"))
        except sql.exc.IntegrityError:
            text = connection.execute(query).scalar_one()  # another replica was first, and has committed
        else:
            return {}
    return {int(slot): units for slot, units in json.loads(text).items()}
