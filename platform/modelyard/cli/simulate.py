"""`modelyard simulate`: what a policy would make of a workload, before anything is bought or changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelyard.cli import tables
from modelyard.errors import ConfigError

if TYPE_CHECKING:
    from modelyard.cluster import Node
    from modelyard.scheduling.traces.base import Trace

FORMATS = ("jsonl", "gavel", "sia", "rubick", "synthetic")


@click.command()
@click.option("--trace", "trace_path", type=click.Path(path_type=Path), help="The workload; not for synthetic.")
@click.option("--format", "kind", type=click.Choice(FORMATS), default="jsonl", show_default=True)
@click.option("--tables", "tables_path", type=click.Path(path_type=Path), help="Speeds: a JSON file or traces/.")
@click.option("--pools", "pools_text", metavar="NAME=NODESxGPUS,...", help="The cluster; by default the trace's own.")
@click.option("--policy", "policies", default="fair_share", show_default=True, help="One or more, separated by commas.")
@click.option("--jobs", default=100, show_default=True, help="synthetic: number of jobs.")
@click.option("--seed", default=0, show_default=True, help="synthetic: seed.")
@click.option("--round-s", default=60.0, show_default=True, help="Seconds between decisions.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.option("--png", "png_path", type=click.Path(path_type=Path), help="Also draw utilization and completion times.")
def simulate(
    trace_path: Path | None,
    kind: str,
    tables_path: Path | None,
    pools_text: str | None,
    policies: str,
    jobs: int,
    seed: int,
    round_s: float,
    json_path: Path | None,
    png_path: Path | None,
) -> None:
    """Replay a workload through scheduling policies and compare them."""
    from modelyard.scheduling.comparison import figures, picture
    from modelyard.scheduling.policies import policy
    from modelyard.scheduling.simulator import Rules, Simulation

    for option, path in (("--json", json_path), ("--png", png_path)):
        check_output(option, path)
    chosen = [policy(name.strip()) for name in policies.split(",")]
    pools = None if pools_text is None else parse_pools(pools_text)
    trace = _read(kind, trace_path, tables_path, pools, jobs, seed)
    nodes = _nodes(trace, pools)
    results = []
    for each in chosen:
        click.echo(f"simulating {len(trace.jobs)} jobs of {trace.name} under {each.name} ...", err=True)
        results.append(Simulation(trace=trace, policy=each, rules=Rules(round_s=round_s), nodes=nodes).run())
    rows = [figures(result) for result in results]
    heads = ("avg JCT h", "p50 h", "p99 h", "makespan h", "GPU-h/job", "restarts", "held", "decide ms")
    table = tables.table("policy", *heads)
    for row in rows:
        numbers = [row[name] for name in list(row)[2:8]]
        shown = [f"{number:.3f}" for number in numbers]
        tables.add_row(table, row["policy"], *shown, f"{row['utilization']:.0%}", f"{row['decision_s_p50'] * 1e3:.1f}")
    tables.console().print(table)
    if json_path is not None:
        json_path.write_text(json.dumps({"trace": trace.name, "policies": rows}, indent=2) + "\n")
    if png_path is not None:
        picture(results, png_path)
        click.echo(f"picture {png_path}")


def check_output(option: str, path: Path | None) -> None:
    """Refuse a file that could not be written at the end.

    Raises:
        ConfigError: it is a folder, or in none.
    """
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ConfigError(f"{option} {str(path)!r} is no file in an existing folder", "name a file in one that exists")


def parse_pools(text: str) -> dict[str, tuple[int, int]]:
    """`a100=2x8,t4=6x4` as pool to (nodes, GPUs of each).

    Raises:
        ConfigError: a part is not of that form.
    """
    found = {}
    for part in text.split(","):
        name, _, shape = part.strip().partition("=")
        nodes, _, gpus = shape.partition("x")
        if not (name and nodes.isdigit() and gpus.isdigit() and int(nodes) and int(gpus)):
            raise ConfigError(f"--pools: {part!r} is not NAME=NODESxGPUS", "write for example a100=2x8,t4=6x4")
        found[name] = (int(nodes), int(gpus))
    return found


def _nodes(trace: Trace, pools: dict[str, tuple[int, int]] | None) -> tuple[Node, ...]:
    from modelyard.scheduling.traces.base import cluster_of

    if pools is not None:
        return cluster_of(pools)
    if not trace.nodes:
        raise ConfigError(f"trace {trace.name!r} says nothing of a cluster", "give one: --pools a100=2x8,t4=6x4")
    return trace.nodes


def _read(
    kind: str, path: Path | None, speeds: Path | None, pools: dict[str, tuple[int, int]] | None, jobs: int, seed: int
) -> Trace:
    from modelyard.scheduling.traces import gavel, jsonl, rubick, sia
    from modelyard.scheduling.traces.generator import Generator

    if kind == "synthetic":
        generator = Generator(num_jobs=jobs, seed=seed)
        return (generator if pools is None else Generator(num_jobs=jobs, seed=seed, pools=pools)).trace()
    if path is None:
        raise ConfigError(f"--format {kind} reads a file", "name it with --trace FILE")
    if kind == "jsonl":
        return jsonl.read(path)
    if speeds is None:
        raise ConfigError(f"--format {kind} needs the speeds of its jobs", "name them with --tables PATH")
    readers: dict[str, Callable[[Path, Path], Trace]] = {
        "gavel": gavel.read,
        "sia": lambda at, of: sia.read(at, sia.read_models(of, tuple(sia.HETEROGENEOUS))),
        "rubick": lambda at, of: rubick.read(at, rubick.read_plans(of)),
    }
    return readers[kind](path, speeds)
