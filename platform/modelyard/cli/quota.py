"""`modelyard quota`: what tenants are guaranteed, may hold, and hold."""

from __future__ import annotations

import json
from typing import Any

import click

from modelyard.cli import tables


@click.group()
def quota() -> None:
    """Show and set what tenants may hold."""


@quota.command("set")
@click.argument("tenant")
@click.option("--parent", help="Tenant it stands below.")
@click.option("--weight", default=1.0, show_default=True, help="Share among its siblings of what is left.")
@click.option("--guaranteed", multiple=True, metavar="POOL=GPUS", help="What it can always get back; may repeat.")
@click.option("--limit", multiple=True, metavar="POOL=GPUS", help="The most it may hold; may repeat.")
def set_command(
    tenant: str, parent: str | None, weight: float, guaranteed: tuple[str, ...], limit: tuple[str, ...]
) -> None:
    """Add TENANT or replace what it may hold."""
    from modelyard.scheduling import Tenant

    wanted = Tenant(
        name=tenant,
        parent=parent,
        weight=weight,
        guaranteed=_amounts("--guaranteed", guaranteed),
        limit=_amounts("--limit", limit),
    )
    service, actor = _service()
    service.call(actor.set_tenant, wanted)
    click.echo(f"tenant {tenant} is set")


@quota.command()
@click.argument("tenant")
def remove(tenant: str) -> None:
    """Forget what TENANT may hold."""
    service, actor = _service()
    service.call(actor.remove_tenant, tenant)
    click.echo(f"tenant {tenant} is removed")


@quota.command()
@click.argument("tenant", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(tenant: str | None, as_json: bool) -> None:
    """Show all tenants, or one: guaranteed, limit, and what its jobs hold."""
    from modelyard.errors import NotFoundError, nearest

    service, actor = _service()
    snapshot, entries, *_ = service.call(actor.look)
    rows = summarize(snapshot, entries)
    if tenant is not None:
        known = [row["tenant"] for row in rows]
        rows = [row for row in rows if row["tenant"] == tenant]
        if not rows:
            raise NotFoundError(f"there is no tenant {tenant!r}", nearest(tenant, known))
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = tables.table("tenant", "parent", "weight", "guaranteed", "limit", "holds", "jobs")
    for row in rows:
        amounts = [", ".join(f"{p} {n:g}" for p, n in row[k].items()) or "-" for k in ("guaranteed", "limit", "holds")]
        tables.add_row(table, row["tenant"], row["parent"] or "-", f"{row['weight']:g}", *amounts, str(row["jobs"]))
    tables.console().print(table)


def summarize(snapshot: Any, entries: Any) -> list[dict[str, Any]]:
    """One row per tenant, those without a quota of their own included; `holds` is GPUs by pool."""
    from modelyard.scheduling.model import Tenant, pool_of

    known = {tenant.name: tenant for tenant in snapshot.tenants}
    active = [entry for entry in entries.values() if not entry.status.is_over]
    rows = []
    for name in sorted(known.keys() | {entry.request.tenant for entry in active}):
        tenant, own = known.get(name, Tenant(name=name)), [e for e in active if e.request.tenant == name]
        holds: dict[str, float] = {}
        for entry in own:
            for node, count in entry.allocation.items():
                pool = pool_of(snapshot.node_by_id[node]) if node in snapshot.node_by_id else "gone"
                holds[pool] = holds.get(pool, 0.0) + count * entry.request.gpus_per_worker
        rows.append(
            {
                "tenant": name,
                "parent": tenant.parent,
                "weight": tenant.weight,
                "guaranteed": dict(tenant.guaranteed),
                "limit": dict(tenant.limit),
                "holds": holds,
                "jobs": len(own),
            }
        )
    return rows


def _service() -> tuple[Any, Any]:
    from modelyard.cluster import connect_existing
    from modelyard.scheduling import service

    connect_existing()
    return service, service.required()


def _amounts(option: str, words: tuple[str, ...]) -> dict[str, float]:
    found = {}
    for word in words:
        pool, _, number = word.partition("=")
        try:
            found[pool] = float(number)
        except ValueError:
            raise click.UsageError(f"{option} {word!r} is not POOL=GPUS, for example a100=8") from None
    return found
