"""`modelyard up`, `down` and `status`: a cluster on this laptop, or what a cluster file describes."""

from __future__ import annotations

import json
from pathlib import Path

import click

from modelyard.cli import tables
from modelyard.cli.options import Seconds


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--pool", "pools", multiple=True, metavar="NAME=NODESxGPUS[:CPUS]", help="A pool of logical nodes.")
@click.option("--site", "sites", multiple=True, metavar="NAME", help="An edge site of one node.")
@click.option("--cpus", type=click.IntRange(min=0), help="CPUs of the head; with pools it takes no work by default.")
@click.option("--temp-dir", type=click.Path(path_type=Path), help="Ray's folder; by default Ray's own.")
@click.option(
    "--start-timeout-s",
    type=Seconds(),
    help="Longest wait for the nodes: by default 120 on this machine, 3600 for FILE.",
)
def up(
    file: Path | None,
    pools: tuple[str, ...],
    sites: tuple[str, ...],
    cpus: int | None,
    temp_dir: Path | None,
    start_timeout_s: float | None,
) -> None:
    """Start a cluster: from FILE (a `ray up` file, checked first), or on this machine.

    \b
    modelyard up                                              one node, all CPUs
    modelyard up --pool a100=2x4 --pool l4=1x8 --site north   2 nodes of 4, 1 of 8, an edge site
    """
    if file is not None:
        _up_from(file, bool(pools or sites or cpus is not None), start_timeout_s)
        return
    from modelyard.clusters import laptop
    from modelyard.training.interrupts import terminated_as_interrupted

    laptop.authenticate(make=True)
    nodes = laptop.plan(pools, sites, cpus)
    limit = start_timeout_s or laptop.START_TIMEOUT_S
    with terminated_as_interrupted():  # half a cluster would stay
        started = laptop.up(nodes, temp_dir, limit, say=lambda text: click.echo(text, err=True))
    click.echo(f"address    {started.address}   (export RAY_ADDRESS={started.address})")
    click.echo(f"dashboard  {started.dashboard}")
    click.echo(f"nodes      {len(nodes)}: modelyard status shows them, modelyard down stops them")


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option(
    "--timeout-s", default=3600.0, show_default=True, type=Seconds(), help="Longest wait for the machines of FILE."
)
def down(file: Path | None, timeout_s: float) -> None:
    """Stop the cluster of this laptop, or that of FILE, and nothing else."""
    if file is not None:
        from modelyard.clusters import files, launch

        launch.down(files.read(file), lambda text: click.echo(text, err=True), timeout_s)
        click.echo(f"{file}: down")
        return
    from modelyard.clusters import laptop

    here = laptop.required()
    laptop.down(here)
    click.echo(f"stopped: {len(here.nodes)} nodes")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(as_json: bool) -> int:
    """Show the laptop's cluster: nodes, labels, resources. Exit code 1 when a node is gone."""
    from modelyard.clusters import laptop

    laptop.authenticate()
    running = laptop.required()
    found = {node["name"]: node for node in laptop.look(running) if node["alive"]}
    rows = [
        {
            "node": node.name,
            "pool": node.labels["modelyard/pool"],
            "site": node.labels["modelyard/site"],
            "tier": node.labels["modelyard/tier"],
            "cpus": node.cpus,
            "gpus": node.gpus,
            "alive": node.name in found,
        }
        for node in running.nodes
    ]
    if as_json:
        click.echo(json.dumps({"address": running.address, "dashboard": running.dashboard, "nodes": rows}, indent=2))
    else:
        click.echo(f"address    {running.address}\ndashboard  {running.dashboard}\n")
        table = tables.table("node", "pool", "site", "tier", "CPUs", "accelerators", "state")
        for row in rows:
            cells = [str(row[key]) for key in ("node", "pool", "site", "tier", "cpus", "gpus")]
            tables.add_row(table, *cells, "alive" if row["alive"] else "gone")
        tables.console().print(table)
    return 0 if all(row["alive"] for row in rows) else 1


def _up_from(file: Path, has_pools: bool, timeout_s: float | None) -> None:
    from modelyard.clusters import files, launch
    from modelyard.errors import ConfigError

    if has_pools:
        raise ConfigError("--pool, --site and --cpus are for a laptop; the pools of FILE are in FILE", "leave them out")
    limit = timeout_s or launch.LAUNCHER_TIMEOUT_S
    launch.up(files.read(file), lambda text: click.echo(text, err=True), timeout_s=limit)
    click.echo(f"{file}: up; run jobs with: modelyard submit --cluster {file} jobs/train.py --config CONFIG")
