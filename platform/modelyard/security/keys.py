"""API keys: made once, shown once, stored as a digest, looked up by their public part.

A key is `my-<id>-<secret>`: 12 hex digits that name it in lists and logs, and 256 random bits. The database holds the
SHA-256 of the whole key. A slow hash (argon2, bcrypt) defends guessable passwords; nobody guesses 256 bits from a
stolen digest, however fast the hash, and a request must not pay 50 ms for a defence it does not need. The digest is
compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import sqlalchemy as sql

from modelyard.errors import ConfigError, NotFoundError, nearest
from modelyard.security import database
from modelyard.security.callers import ALL_WORK, Caller, Work

TABLES = sql.MetaData()
_KEYS = sql.Table(
    "gateway_keys",
    TABLES,
    sql.Column("id", sql.String(12), primary_key=True),
    sql.Column("digest", sql.LargeBinary(32), nullable=False),
    sql.Column("tenant", sql.String(128), nullable=False),
    sql.Column("name", sql.String(128), nullable=False),
    sql.Column("models", sql.Text, nullable=False),
    sql.Column("work", sql.String(128), nullable=False),
    sql.Column("requests_per_minute", sql.Integer),
    sql.Column("tokens_per_minute", sql.Integer),
    sql.Column("site", sql.String(128)),
    sql.Column("created_s", sql.Float, nullable=False),
    sql.Column("expires_s", sql.Float),
    sql.Column("revoked_s", sql.Float),
)
_QUOTAS = sql.Table(
    "gateway_quotas",
    TABLES,
    sql.Column("tenant", sql.String(128), primary_key=True),
    sql.Column("tokens_per_day", sql.BigInteger),
    sql.Column("tokens_per_month", sql.BigInteger),
)
_KEY = re.compile(r"my-([0-9a-f]{12})-([A-Za-z0-9_-]{43})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

T = TypeVar("T")


@dataclass(frozen=True)
class TokenQuota:
    """What a tenant may use, all its keys together; None is without bound."""

    tokens_per_day: int | None = None
    """By the calendar day in UTC."""
    tokens_per_month: int | None = None
    """By the calendar month in UTC."""


@dataclass(frozen=True)
class KeyRecord:
    """A key as the database holds it: everything but its secret."""

    id: str
    digest: bytes
    caller: Caller
    created_s: float
    revoked_s: float | None

    def opens_for(self, key: str) -> bool:
        """Whether `key` is the one that was handed out, in constant time."""
        return hmac.compare_digest(self.digest, _digest(key))

    def state(self, now_s: float) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked_s is not None:
            return "revoked"
        expires = self.caller.expires_s
        return "expired" if expires is not None and expires <= now_s else "active"


def key_id(key: str) -> str | None:
    """The public part of a well-formed key, else None."""
    found = _KEY.fullmatch(key)
    return found[1] if found else None


class KeyStore:
    """Keys and tenants' token quotas in a database. Every method may wait for the disk or the network."""

    def __init__(self, url: str | None = None, *, clock: Callable[[], float] = time.time) -> None:
        """Open the database; tables are made when absent.

        Raises:
            StorageError: it cannot be reached or written; so does every method.
        """
        self.url, self._clock = url or database.default_url(), clock
        self._engine = database.connect(self.url, TABLES)

    def create(
        self,
        *,
        tenant: str,
        name: str = "",
        models: Sequence[str] = ("*",),
        work: Sequence[Work] = ALL_WORK,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        site: str | None = None,
        lifetime_s: float | None = None,
    ) -> str:
        """Make a key and return it; it cannot be read again.

        Raises:
            ConfigError: a name, a glob or a limit cannot be used.
        """
        for field, value in (("tenant", tenant), ("site", site), ("name", name or None)):
            if value is not None and not _NAME.fullmatch(value):
                raise ConfigError(
                    f"{field} {value!r} is not a name", "use up to 128 letters, digits, dots, dashes, underscores"
                )
        for field, limit in (("rpm", requests_per_minute), ("tpm", tokens_per_minute), ("expires", lifetime_s)):
            if limit is not None and not 0 < limit < 2**31:
                raise ConfigError(f"{field} is {limit}, outside 1..{2**31 - 1}", "leave it out for no limit")
        if not models or any(not glob or any(c.isspace() for c in glob) for glob in models):
            raise ConfigError(f"models {list(models)} holds no usable glob", "name at least one, for example 'tiny-*'")
        unknown = [kind for kind in work if kind not in ALL_WORK]
        if unknown or not work:
            raise ConfigError(f"work {list(work)} is not known", nearest(str(*unknown[:1]), ALL_WORK))
        identity, now = secrets.token_hex(6), self._clock()
        key = f"my-{identity}-{secrets.token_urlsafe(32)}"
        row = {
            "id": identity,
            "digest": _digest(key),
            "tenant": tenant,
            "name": name,
            "models": " ".join(models),
            "work": " ".join(sorted(set(work))),
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
            "site": site,
            "created_s": now,
            "expires_s": None if lifetime_s is None else now + lifetime_s,
        }
        self._run(lambda connection: connection.execute(sql.insert(_KEYS).values(row)))
        return key

    def find(self, identity: str) -> KeyRecord | None:
        """The key with this public part."""
        row = self._run(lambda c: c.execute(sql.select(_KEYS).where(_KEYS.c.id == identity)).first())
        return None if row is None else _record(row)

    def list(self, tenant: str | None = None) -> list[KeyRecord]:
        """All keys, or those of one tenant, the oldest first."""
        query = sql.select(_KEYS).order_by(_KEYS.c.created_s, _KEYS.c.id)
        if tenant is not None:
            query = query.where(_KEYS.c.tenant == tenant)
        return [_record(row) for row in self._run(lambda connection: connection.execute(query).all())]

    def revoke(self, identity: str) -> None:
        """Refuse a key from now on, for good; gateways notice within their `key_cache_s`.

        Raises:
            NotFoundError: there is no such key.
        """
        wanted = sql.update(_KEYS).where(_KEYS.c.id == identity)
        values = {"revoked_s": sql.func.coalesce(_KEYS.c.revoked_s, self._clock())}
        if self._run(lambda connection: connection.execute(wanted.values(values)).rowcount) == 0:
            raise NotFoundError(f"there is no key {identity!r}", nearest(identity, [key.id for key in self.list()]))

    def set_quota(self, tenant: str, quota: TokenQuota) -> None:
        """Replace what a tenant may use.

        Raises:
            ConfigError: a quota is negative.
        """
        values = {"tokens_per_day": quota.tokens_per_day, "tokens_per_month": quota.tokens_per_month}
        for field, value in values.items():
            if value is not None and not 0 <= value < 2**62:
                raise ConfigError(f"{field} is {value}, below 0 or past counting", "leave it out for no bound")

        def replace(connection: sql.Connection) -> None:
            connection.execute(sql.delete(_QUOTAS).where(_QUOTAS.c.tenant == tenant))
            connection.execute(sql.insert(_QUOTAS).values(tenant=tenant, **values))

        self._run(replace)

    def quota(self, tenant: str) -> TokenQuota:
        """What a tenant may use."""
        row = self._run(lambda c: c.execute(sql.select(_QUOTAS).where(_QUOTAS.c.tenant == tenant)).first())
        return TokenQuota() if row is None else TokenQuota(row.tokens_per_day, row.tokens_per_month)

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def _run(self, statements: Callable[[sql.Connection], T]) -> T:
        try:
            with self._engine.begin() as connection:
                return statements(connection)
        except sql.exc.SQLAlchemyError as error:
            raise database.unreachable(self.url, error) from error


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _record(row: sql.Row[tuple[object, ...]]) -> KeyRecord:
    caller = Caller(
        subject=f"key:{row.id}",
        tenant=row.tenant,
        name=row.name,
        models=tuple(row.models.split()),
        work=tuple(row.work.split()),
        requests_per_minute=row.requests_per_minute,
        tokens_per_minute=row.tokens_per_minute,
        site=row.site,
        expires_s=row.expires_s,
    )
    return KeyRecord(row.id, row.digest, caller, row.created_s, row.revoked_s)
