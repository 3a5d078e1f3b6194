"""`modelyard pools`: what there is, and who holds it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from modelyard.cli import tables

if TYPE_CHECKING:
    from modelyard.cluster import Node
    from modelyard.scheduling.ledger import Entry


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def pools(as_json: bool) -> None:
    """Show the pools: nodes, accelerators free, used and broken, and which jobs hold them."""
    from modelyard.cluster import RayCluster, connect_existing
    from modelyard.scheduling import service

    connect_existing()
    entries: dict[str, Entry] = {}
    if (actor := service.connect()) is not None:
        _, entries, *_ = service.call(actor.look)
    found = summarize(RayCluster().nodes(), entries)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    table = tables.table("pool", "nodes", "unit", "total", "leased", "in use", "free", "broken", "held by")
    for each in found:
        holders = ", ".join(f"{job} x{count}" for job, count in each["held_by"].items()) or "-"
        numbers = [f"{each[name]:g}" for name in ("total", "leased", "in_use", "free", "broken")]
        tables.add_row(table, each["pool"], str(each["nodes"]), each["unit"], *numbers, holders)
    tables.console().print(table)


def summarize(nodes: tuple[Node, ...], entries: dict[str, Entry]) -> list[dict[str, Any]]:
    """One row per pool; counts are GPUs, or CPUs in a pool without any."""
    from modelyard.scheduling.model import pool_of

    rows = []
    for pool in sorted({pool_of(node) for node in nodes}):
        members = [node for node in nodes if pool_of(node) == pool]
        unit = "GPU" if any(node.total.get("GPU") for node in members) else "CPU"
        usable = [node for node in members if node.is_usable]
        names = {node.node_id for node in members}
        held = {
            job: sum(count for node, count in entry.allocation.items() if node in names)
            for job, entry in entries.items()
        }
        rows.append(
            {
                "pool": pool,
                "nodes": len(usable),
                "unit": unit,
                "total": sum(node.total.get(unit, 0.0) for node in usable),
                "leased": sum(entries[job].request.resources.get(unit, 0.0) * count for job, count in held.items()),
                "in_use": sum(node.total.get(unit, 0.0) - node.free.get(unit, 0.0) for node in usable),
                "free": sum(_free(node, unit, entries) for node in usable),
                "broken": sum(node.total.get(unit, 0.0) for node in members if not node.is_usable),
                "held_by": {job: count for job, count in held.items() if count},
            }
        )
    return rows


def _free(node: Node, unit: str, entries: dict[str, Entry]) -> float:
    """What neither a lease nor Ray holds; a lease counts before its workers have started too."""
    leased = sum(e.request.resources.get(unit, 0.0) * e.allocation.get(node.node_id, 0) for e in entries.values())
    return max(min(node.free.get(unit, 0.0), node.total.get(unit, 0.0) - leased), 0.0)
