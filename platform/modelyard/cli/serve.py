"""`modelyard serve`: serve registered models behind an OpenAI-compatible gateway."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from modelyard.cli import tables

if TYPE_CHECKING:
    from modelyard.serving.deployment.config import ServingConfig

_database = click.option("--database", envvar="MODELYARD_GATEWAY_DB", help="The gateway's database URL.")


@click.group()
def serve() -> None:
    """Serve registered models: deploy, look, scale, canary, promote, roll back."""


@serve.command()
@click.argument("what", nargs=-1, required=True, metavar="REFERENCE... | FILE.yaml")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, help="Port to listen on.")
@click.option("--engine", default="auto", show_default=True, help="transformers, openvino, vllm, batch or auto.")
@click.option("--cpus", default=1.0, show_default=True, help="CPUs per replica; also its threads.")
@click.option("--open", "is_open", is_flag=True, help="Answer without keys; only on 127.0.0.1.")
@click.option("--detach", is_flag=True, help="Return once it runs, instead of staying until Ctrl-C.")
def up(what: tuple[str, ...], host: str, port: int, engine: str, cpus: float, is_open: bool, detach: bool) -> None:
    """Serve models by reference (models:/tiny-gpt@production), or all that FILE.yaml says.

    On a laptop this starts Ray, a replica of each model and the gateway, prints a key and a call to try, and stays
    until Ctrl-C. On a cluster (RAY_ADDRESS) use --detach.
    """
    context = click.get_current_context()
    given = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    config = _config(what, host, port, engine, cpus, is_open, given)
    from modelyard.cluster import connect
    from modelyard.serving.deployment import control

    connect()
    control.up(config, lambda text: click.echo(text, err=True))
    _say_how_to_call(config)
    if not detach:
        _stay([*(app.application for app in config.models), *(["gateway"] if config.gateway else [])])


@serve.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_database
def status(as_json: bool, database: str | None) -> None:
    """What is deployed: version, engine, replicas, where they run, and what a canary gets."""
    control = _control()
    from modelyard.cluster import RayCluster
    from modelyard.serving.deployment.shares import ShareStore

    now = control.current()
    shares = ShareStore(database).shares() if any(each.app.is_canary for each in now.values()) else {}
    pools = {node.node_id: node.labels.get("modelyard/pool", "default") for node in RayCluster().nodes()}
    rows = []
    for name, each in sorted(now.items()):
        share = shares.get(name)
        rows.append(
            {
                "application": name,
                "model": each.served.reference,
                "engine": each.served.engine,
                "status": each.status.lower(),
                "running": each.running,
                "wanted": each.wanted,
                "where": each.app.placement.site or ", ".join(sorted({pools.get(n, "gone") for n in each.nodes})),
                "share_percent": share.percent if share else None,
                "is_shadow": bool(share and share.is_shadow),
                "note": (share.withdrawn if share else "") or each.message,
            }
        )
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = tables.table("application", "model", "engine", "status", "replicas", "where", "share", "note")
    for row in rows:
        percent = "-" if row["share_percent"] is None else f"{row['share_percent']:g} %"
        percent += " shadow" if row["is_shadow"] else ""
        replicas = f"{row['running']} of {row['wanted']}"
        cells = [str(row[key]) or "-" for key in ("application", "model", "engine", "status")]
        tables.add_row(table, *cells, replicas, str(row["where"]) or "-", percent, str(row["note"]) or "-")
    tables.console().print(table)


@serve.command()
@click.argument("application")
@click.option("--min", "min_replicas", type=click.IntRange(min=0), required=True, help="Fewest replicas; 0: none.")
@click.option("--max", "max_replicas", type=click.IntRange(min=1), required=True, help="Most replicas.")
def scale(application: str, min_replicas: int, max_replicas: int) -> None:
    """Change how many replicas APPLICATION may have; those that go finish their calls first."""
    _control().scale(application, min_replicas, max_replicas, lambda text: click.echo(text, err=True))
    click.echo(f"{application} has {min_replicas} to {max_replicas} replicas")


@serve.command()
@click.argument("model")
@click.option("--reference", required=True, help="The version to try, e.g. models:/tiny-gpt/4.")
@click.option("--percent", type=click.FloatRange(0, 100), required=True, help="Its share of the calls.")
@click.option("--shadow", is_flag=True, help="Send it copies of that share; callers get the stable answer.")
@_database
def canary(model: str, reference: str, percent: float, shadow: bool, database: str | None) -> None:
    """Serve another version of MODEL beside the stable one, for a share of the calls.

    A canary that fails more, or answers much more slowly, is withdrawn by itself; see `serve status`.
    """
    from modelyard.serving.deployment.routing import Share

    control = _control()
    name = control.canary(model, reference, Share(percent, shadow), database, lambda text: click.echo(text, err=True))
    click.echo(f"{name} gets {'copies of ' if shadow else ''}{percent:g} % of the calls")


@serve.command()
@click.argument("model")
@_database
def promote(model: str, database: str | None) -> None:
    """Make MODEL's canary the stable version; no call is lost."""
    reference = _control().promote(model, database, lambda text: click.echo(text, err=True))
    click.echo(f"{model} serves {reference}")


@serve.command()
@click.argument("model")
@_database
def rollback(model: str, database: str | None) -> None:
    """Take MODEL's canary down; the stable version gets all calls."""
    reference = _control().rollback(model, database)
    click.echo(f"{reference} is gone; {model} gets all calls")


@serve.command()
@click.argument("applications", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="The gateway and every model.")
def down(applications: tuple[str, ...], everything: bool) -> None:
    """Take APPLICATIONS down; they finish their calls first."""
    from modelyard.errors import InputError

    control = _control()
    if not applications and not everything:
        raise InputError("nothing was named", "name applications (see `modelyard serve status`), or use --all")
    names = [*control.current(), "gateway"] if everything else list(applications)
    for name in names:
        if not everything:
            control.require(name)
    control.down(names)
    click.echo(f"{', '.join(names)}: down")


def _config(
    what: tuple[str, ...], host: str, port: int, engine: str, cpus: float, is_open: bool, given: set[str]
) -> ServingConfig:
    """`given`: options of the command line, which a file yields to."""
    from modelyard.config import load, parse
    from modelyard.errors import InputError
    from modelyard.serving.deployment.config import ServingConfig

    if len(what) == 1 and what[0].endswith((".yaml", ".yml")):
        if unused := sorted({"engine", "cpus"} & given):
            raise InputError(f"--{unused[0]} says nothing about the models of {what[0]}", "write it into that file")
        overrides = {"host": f"host={host}", "port": f"port={port}", "is_open": "gateway.settings.open_access=true"}
        return load(ServingConfig, Path(what[0]), [text for name, text in overrides.items() if name in given])
    models = [{"model": {"reference": each, "engine": engine}, "placement": {"cpus": cpus}} for each in what]
    gateway = {"settings": {"open_access": is_open}}
    return parse(ServingConfig, {"host": host, "port": port, "models": models, "gateway": gateway})


def _say_how_to_call(config: ServingConfig) -> None:
    """A key (a new one, for this laptop) and a line to paste."""
    if config.gateway is None:
        return
    url = f"{'https' if config.certificate else 'http'}://{config.host}:{config.port}"
    key = ""
    if not config.gateway.settings.open_access:
        from modelyard.security import KeyStore

        key = KeyStore(config.gateway.settings.database).create(tenant="default", name="serve-up")
        click.echo(f"key   {key}   (shown once; more: modelyard keys create)")
    model = config.models[0].name
    header = f" -H 'Authorization: Bearer {key}'" if key else ""
    body = json.dumps({"model": model, "prompt": "The for statement", "max_tokens": 32})
    click.echo(f"page  {url}/")
    click.echo(f"curl {url}/v1/completions{header} -H 'Content-Type: application/json' -d '{body}'")


def _stay(applications: list[str]) -> None:
    import signal
    import threading

    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    signal.signal(signal.SIGINT, lambda *_: over.set())
    click.echo("Ctrl-C ends it", err=True)
    while not over.wait(1.0):
        pass
    click.echo("finishing the calls that run", err=True)
    from ray import serve as ray_serve

    for name in applications:
        ray_serve.delete(name)


def _control() -> Any:
    from modelyard.cluster import connect_existing
    from modelyard.serving.deployment import control

    connect_existing()
    return control
