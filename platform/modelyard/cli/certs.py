"""`modelyard certs`: the certificates and the token that close a cluster to others."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path

import click

from modelyard.cli import tables

_folder = click.option(
    "--folder", type=click.Path(path_type=Path), help="Where they are; by default ~/.modelyard/cluster."
)


@click.group()
def certs() -> None:
    """Make, rotate and show a cluster's certificates (mutual TLS between nodes) and its token."""


@certs.command()
@_folder
@click.option("--name", default="modelyard", show_default=True, help="Name of the authority.")
@click.option("--store", help="MODELYARD_STORE of every node, e.g. s3://bucket/modelyard.")
@click.option("--tracking-uri", help="MODELYARD_TRACKING_URI of every node, e.g. postgresql://...")
@click.option("--env", "extra", multiple=True, metavar="NAME=VALUE", help="More variables of every node.")
@click.option("--redis", help="Where the head keeps its state, e.g. rediss://10.0.0.9:6380; by default on its disk.")
@click.option("--redis-password-file", type=click.Path(path_type=Path), help="File with that Redis' password.")
@click.option(
    "--redis-ca", type=click.Path(path_type=Path), help="Who signed its certificate; by default this authority."
)
def create(
    folder: Path | None,
    name: str,
    store: str | None,
    tracking_uri: str | None,
    extra: tuple[str, ...],
    redis: str | None,
    redis_password_file: Path | None,
    redis_ca: Path | None,
) -> None:
    """Make the authority, the token and the settings that `ray up` brings to every node."""
    from modelyard.clusters import certs as made
    from modelyard.errors import ConfigError

    environment = [("MODELYARD_STORE", store), ("MODELYARD_TRACKING_URI", tracking_uri)]
    for each in extra:
        variable, separator, value = each.partition("=")
        if not separator or not (variable.isidentifier() and variable.isascii()):
            raise ConfigError(
                f"--env {each!r} sets nothing", "write --env NAME=VALUE; a NAME has ASCII letters, digits, _"
            )
        environment.append((variable, value))
    if redis is not None:
        made.check_redis(redis, redis_ca)
    password = _password(redis_password_file)
    where = folder or made.default_folder()
    made.create(where, name, [(variable, value) for variable, value in environment if value is not None])
    if redis is not None:
        made.set_redis(where, name, redis, password, redis_ca)
    click.echo(f"authority, token and settings are in {where}; keep ca.key and token to yourself")


@certs.command()
@_folder
@click.argument("address")
@click.option("--name", default="modelyard", show_default=True, help="Name of the cluster in it.")
@click.option("--redis-password-file", type=click.Path(path_type=Path), help="File with its password.")
@click.option(
    "--redis-ca", type=click.Path(path_type=Path), help="Who signed its certificate; by default this authority."
)
def redis(
    folder: Path | None, address: str, name: str, redis_password_file: Path | None, redis_ca: Path | None
) -> None:
    """Keep the head's state in the Redis at ADDRESS, with an authority that is there already; next: modelyard up."""
    from modelyard.clusters import certs as made

    where = folder or made.default_folder()
    made.set_redis(where, name, address, _password(redis_password_file), redis_ca)
    click.echo(f"the head will keep its state at {address}: see {where / made.HEAD_ENV}")


@certs.command()
@_folder
@click.option("--finish", is_flag=True, help="Last step: trust the new authority only.")
@click.option("--token", "also_token", is_flag=True, help="Make a new token as well; all nodes must restart together.")
def rotate(folder: Path | None, finish: bool, also_token: bool) -> None:
    """Replace the authority: `rotate`, `modelyard up FILE` for every node's certificate, `rotate --finish`."""
    from modelyard.clusters import certs as made

    made.rotate(folder or made.default_folder(), is_last_step=finish, also_token=also_token)
    click.echo(
        "only the new authority is trusted now"
        if finish
        else "old and new authority are trusted now; next: modelyard up FILE, then modelyard certs rotate --finish"
    )


@certs.command()
@_folder
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(folder: Path | None, as_json: bool) -> int:
    """Show what is there and when it ends. Exit code 1 when something is wrong."""
    from modelyard.clusters import certs as made

    found = made.inspect(folder or made.default_folder())
    if as_json:
        rows = [
            {
                "file": str(each.file),
                "subject": each.subject,
                "names": each.names,
                "days_left": each.days_left,
                "problem": each.problem,
            }
            for each in found
        ]
        click.echo(json.dumps(rows, indent=2))
    else:
        table = tables.table("file", "for", "names", "ends", "problem")
        for each in found:
            ends = "-" if each.expires is None else f"{each.expires:%Y-%m-%d} ({each.days_left} days)"
            problem = f"{each.problem} -> {each.todo}" if each.problem else "-"
            tables.add_row(table, each.file.name, each.subject, ", ".join(each.names) or "-", ends, problem)
        tables.console().print(table)
    return 1 if any(each.problem for each in found) else 0


@certs.command()
@_folder
@click.option("--authority", type=click.Path(path_type=Path), help="Folder of the authority, when it is another one.")
@click.option("--address", "addresses", multiple=True, help="Address of this node; by default all of them.")
@click.option("--days", default=365, show_default=True, type=click.IntRange(1, 825), help="How long it holds.")
@click.option("--forget", is_flag=True, help="Remove --folder's copy of the key in --authority afterwards.")
def node(folder: Path | None, authority: Path | None, addresses: tuple[str, ...], days: int, forget: bool) -> None:
    """Make this node's certificate; `ray up` runs it on every node. A good one is kept."""
    from modelyard.clusters import certs as made
    from modelyard.errors import ConfigError

    try:
        given = [ipaddress.ip_address(each) for each in addresses] or None
    except ValueError as error:
        raise ConfigError(f"--address: {error}", "give an IP address") from None
    where = folder or made.default_folder()
    is_new = made.issue(where, given, authority, days, forget=forget)
    click.echo(f"{'new certificate' if is_new else 'the certificate is still good'}: {where / made.NODE_CERT}")


def _password(path: Path | None) -> str:
    from modelyard.errors import ConfigError, NotFoundError

    if path is None:
        return ""
    try:
        password = path.read_text().strip()
    except OSError as error:
        raise NotFoundError(f"{str(path)!r} cannot be read: {error}", "name a file that is there") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--redis-password-file {str(path)!r} is no text: {error.reason}", "write UTF-8") from None
    if not password:
        raise ConfigError(
            f"--redis-password-file {str(path)!r} is empty", "write the password into it, or leave the option out"
        )
    return password
