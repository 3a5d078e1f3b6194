"""`modelyard keys`: who may ask the served models, and how much."""

from __future__ import annotations

import datetime as dt
import json
import re
import time
from typing import TYPE_CHECKING, Any

import click

from modelyard.cli import tables

if TYPE_CHECKING:
    from modelyard.security import KeyStore

_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_database = click.option("--database", envvar="MODELYARD_GATEWAY_DB", help="The gateways' database URL.")


class Lifetime(click.ParamType[float]):
    """A time span such as `30d` or `12h`, as seconds."""

    name = "SPAN"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        found = re.fullmatch(r"(\d{1,6})([smhdw])", str(value))
        if found is None or int(found[1]) == 0:
            self.fail(f"{value!r} is no time span; write 90m, 12h, 30d or 8w", param, ctx)
        return float(int(found[1]) * _UNITS_S[found[2]])


@click.group()
def keys() -> None:
    """Make, list and revoke the API keys of served models; set tenants' token quotas."""


@keys.command()
@click.option("--tenant", required=True, help="Whose key it is; quotas are counted by tenant.")
@click.option("--name", default="", help="What you will call it.")
@click.option("--models", multiple=True, default=("*",), show_default=True, help="Glob of model names; may repeat.")
@click.option(
    "--work",
    multiple=True,
    type=click.Choice(["generate", "embed", "predict"]),
    help="What it may ask for; may repeat; all by default.",
)
@click.option("--rpm", type=click.IntRange(min=1), help="Requests a minute; no limit by default.")
@click.option("--tpm", type=click.IntRange(min=1), help="Tokens a minute, prompts and answers; no limit by default.")
@click.option("--expires", type=Lifetime(), help="How long it lives, e.g. 30d; for ever by default.")
@click.option("--site", help="The site it is at home at.")
@_database
def create(
    tenant: str,
    name: str,
    models: tuple[str, ...],
    work: tuple[Any, ...],
    rpm: int | None,
    tpm: int | None,
    expires: float | None,
    site: str | None,
    database: str | None,
) -> None:
    """Make a key. It is printed once, alone on standard output, and can never be read again."""
    from modelyard.security.callers import ALL_WORK

    key = _store(database).create(
        tenant=tenant,
        name=name,
        models=models,
        work=work or ALL_WORK,
        requests_per_minute=rpm,
        tokens_per_minute=tpm,
        site=site,
        lifetime_s=expires,
    )
    click.echo(key)
    click.echo("keep it: only a digest is stored", err=True)


@keys.command("list")
@click.option("--tenant", help="Only this tenant's.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_database
def list_command(tenant: str | None, as_json: bool, database: str | None) -> None:
    """List keys, never their secrets."""
    now = time.time()
    records = _store(database).list(tenant)
    if as_json:
        rows = [
            {
                "id": record.id,
                "state": record.state(now),
                "tenant": record.caller.tenant,
                "name": record.caller.name,
                "models": list(record.caller.models),
                "work": list(record.caller.work),
                "rpm": record.caller.requests_per_minute,
                "tpm": record.caller.tokens_per_minute,
                "site": record.caller.site,
                "created_s": record.created_s,
                "expires_s": record.caller.expires_s,
            }
            for record in records
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    if not records:
        click.echo("there are no keys; make one with `modelyard keys create --tenant NAME`")
        return
    table = tables.table("id", "state", "tenant", "name", "models", "work", "rpm", "tpm", "site", "expires")
    for record in records:
        caller = record.caller
        limits = ["-" if n is None else str(n) for n in (caller.requests_per_minute, caller.tokens_per_minute)]
        tables.add_row(
            table,
            record.id,
            record.state(now),
            caller.tenant,
            caller.name or "-",
            " ".join(caller.models),
            " ".join(caller.work),
            *limits,
            caller.site or "-",
            _day(caller.expires_s),
        )
    tables.console().print(table)


@keys.command()
@click.argument("identity", metavar="ID")
@_database
def revoke(identity: str, database: str | None) -> None:
    """Refuse the key ID (or the whole key) from now on; gateways notice within seconds (their `key_cache_s`)."""
    from modelyard.security.keys import key_id

    identity = key_id(identity) or identity
    _store(database).revoke(identity)
    click.echo(f"key {identity} is revoked")


@keys.command()
@click.argument("tenant")
@click.option("--tokens-per-day", type=click.IntRange(min=0), help="By the calendar day in UTC.")
@click.option("--tokens-per-month", type=click.IntRange(min=0), help="By the calendar month in UTC.")
@_database
def quota(tenant: str, tokens_per_day: int | None, tokens_per_month: int | None, database: str | None) -> None:
    """Bound what all keys of TENANT use together; an option left out is without bound."""
    from modelyard.security import TokenQuota

    _store(database).set_quota(tenant, TokenQuota(tokens_per_day, tokens_per_month))
    shown = ["no bound" if n is None else f"{n:,} tokens" for n in (tokens_per_day, tokens_per_month)]
    click.echo(f"tenant {tenant}: {shown[0]} a day, {shown[1]} a month")


def _store(database: str | None) -> KeyStore:
    from modelyard.security import KeyStore

    return KeyStore(database)


def _day(moment_s: float | None) -> str:
    return "never" if moment_s is None else f"{dt.datetime.fromtimestamp(moment_s, dt.UTC):%Y-%m-%d %H:%M} UTC"
