"""`modelyard cluster`: check cluster files before anything is started from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelyard.cli import tables
from modelyard.cli.options import Seconds

if TYPE_CHECKING:
    from modelyard.clusters.check import Problem
    from modelyard.clusters.demand import Offer
    from modelyard.clusters.files import ClusterFile, NodeType

_file = click.argument("file", type=click.Path(path_type=Path))


@click.group()
def cluster() -> None:
    """Check cluster files, and help `ray up` on your own machines."""


@cluster.command()
@_file
@click.option(
    "--configs",
    type=click.Path(path_type=Path),
    help="Folder of job configs to find room for; by default jobs/configs, where there is one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(file: Path, configs: Path | None, as_json: bool) -> int:
    """Validate FILE offline, and print what each job's config could get on it.

    Exit code 2 when it cannot work, 1 when only a job's config is invalid.
    """
    from modelyard.clusters import demand, files
    from modelyard.clusters.check import check as problems_of

    read = files.read(file)
    problems = problems_of(read)
    try:
        types = read.node_types
    except files.ShapeError:  # among the problems
        types = ()
    here = Path("jobs/configs")
    jobs = demand.demands(configs or here) if configs or here.is_dir() else []
    offers = [demand.offer(each, types) for each in jobs]
    if as_json:
        report = {
            "kind": read.kind,
            "problems": [problem._asdict() for problem in problems],
            "jobs": {
                each.demand.name: {"kind": each.demand.kind, "fits": each.fits, "workers": dict(each.workers)}
                for each in offers
            },
        }
        click.echo(json.dumps(report, indent=2))
    else:
        _print(read, types, problems, offers)
    if any(problem.level == "error" for problem in problems):
        return 2
    return 1 if any(each.demand.kind == "invalid" for each in offers) else 0


@cluster.command("node-flags", hidden=True)
@_file
def node_flags(file: Path) -> None:
    """Print the flags for `ray start` on this machine, as metadata.hosts of FILE has them."""
    from modelyard.clusters import files
    from modelyard.clusters.certs import own_addresses

    click.echo(" ".join(files.host_flags(files.read(file), {str(address) for address in own_addresses()})))


@cluster.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--open", "opened", multiple=True, type=click.IntRange(1, 65535), help="A port that stays open to all.")
@click.option("--apply", "is_applied", is_flag=True, help="Load the rules on this machine; needs root, or sudo.")
@click.option("--apply-if-allowed", is_flag=True, help="As --apply, but without nft or root only say so.")
@click.option("--remove", is_flag=True, help="Take them away instead.")
def firewall(
    file: Path | None, opened: tuple[int, ...], is_applied: bool, apply_if_allowed: bool, remove: bool
) -> None:
    """Print nftables rules that let only the machines of FILE reach the ports of Ray; ssh stays open."""
    from modelyard.clusters import files, launch
    from modelyard.clusters import firewall as rules
    from modelyard.errors import AccessError, ConfigError, NotFoundError

    if remove:
        rules.remove()
        return
    if file is None:
        raise ConfigError("no cluster file is named", "modelyard cluster firewall FILE")
    read = files.read(file)
    if read.kind != "local":
        raise ConfigError(f"{str(file)!r} is of kind {read.kind}", "there the security group or network policy does it")
    text = rules.rules(launch.addresses(read), opened)
    if not is_applied and not apply_if_allowed:
        click.echo(text, nl=False)
        return
    try:
        rules.apply(text)
    except (AccessError, NotFoundError) as error:
        if not apply_if_allowed:
            raise
        click.echo(f"the ports of Ray stay open: {error}", err=True)
        return
    click.echo("only the cluster's machines reach the ports of Ray here")


@cluster.command("keep-head", context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--stop", is_flag=True, help="End the head and its keeper instead.")
@click.option("--forget", is_flag=True, help="With --stop: also remove the kept state.")
@click.option("--timeout-s", default=180.0, show_default=True, type=Seconds(), help="Longest wait for the head.")
def keep_head(command: tuple[str, ...], stop: bool, forget: bool, timeout_s: float) -> None:
    """Start a head (`-- ray start --head ...`) that is started again whenever it dies.

    Its state is on its disk (~/.modelyard/head), or in the Redis that `modelyard certs redis` names: actors, Serve and
    jobs are found again, and the other nodes join anew.
    """
    from modelyard.clusters import certs, keeper
    from modelyard.errors import ConfigError

    if stop or forget:
        if command or not stop:
            raise ConfigError("--stop takes no command, and --forget goes with --stop", "keep-head --stop --forget")
        click.echo("stopped" if keeper.stop() else "no head is kept here")
        if forget:
            keeper.forget(certs.default_folder())
        return
    pid = keeper.keep(command, certs.default_folder(), timeout_s)
    click.echo(f"the head runs; process {pid} keeps it")


def _print(read: ClusterFile, types: tuple[NodeType, ...], problems: list[Problem], offers: list[Offer]) -> None:
    from modelyard.clusters.instances import known

    table = tables.table("node type", "pool", "tier", "site", "machine", "nodes", "CPUs", "accelerators")
    for each in types:
        instance = known(read.kind).get(each.instance or "")
        accelerator = instance.accelerator if instance else None
        gpus = int(each.resources.get("GPU", 0))
        name = each.labels.get("ray.io/accelerator-type", "GPU")
        memory = f" {accelerator.memory_gib} GiB" if accelerator else ""
        count = f"{each.min_count}..{each.max_count}" if each.max_count > 1 or not each.min_count else "1"
        cells = [each.pool, each.labels.get("modelyard/tier", "-"), each.labels.get("modelyard/site", "-")]
        cells += [each.instance or "-", "1" if each.is_head else count, f"{each.resources.get('CPU', 0):g}"]
        tables.add_row(table, each.name, *cells, (f"{gpus} x {name}{memory}" if gpus else "-") + " spot" * each.is_spot)
    tables.console().print(table)
    click.echo()
    table = tables.table("job config", "kind", "asks for", "could get")
    for offer in offers:
        tables.add_row(table, offer.demand.name, offer.demand.kind, *_row(offer))
    tables.console().print(table)
    for problem in problems:
        click.echo(click.style(f"{problem}", fg="red" if problem.level == "error" else "yellow"))
    errors = sum(problem.level == "error" for problem in problems)
    invalid = sum(offer.demand.kind == "invalid" for offer in offers)
    homeless = sum(not offer.fits for offer in offers) - invalid
    click.echo(f"\n{read.path}: {errors + invalid} errors, {len(problems) - errors + homeless} warnings", nl=False)
    jobs = [f"{invalid} invalid job configs"] * bool(invalid) + [f"{homeless} jobs without room"] * bool(homeless)
    click.echo(f" (with {', '.join(jobs)})" if jobs else "")


def _row(offer: Offer) -> tuple[str, str]:
    demand = offer.demand
    if demand.kind == "invalid":
        return demand.note, "-"
    workers = f"{demand.min_workers}" + (f"..{demand.max_workers}" if demand.max_workers > demand.min_workers else "")
    each = ", ".join(f"{amount:g} {name}" for name, amount in demand.per_worker.items())
    asks = f"{workers} x ({each})" + (f" in {demand.selector}" if demand.selector else "")
    if not offer.fits:
        best = max(offer.workers.values(), default=0)
        return asks, f"nothing: at most {best} of {demand.min_workers} workers in one pool"
    good = {pool: count for pool, count in offer.workers.items() if count >= demand.min_workers}
    return asks, ", ".join(f"{count} in {pool}" for pool, count in good.items())
