"""`modelyard submit`: run a job script on a cluster and follow it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from modelyard.cli.options import Seconds

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from modelyard.clusters.laptop import Laptop
    from modelyard.clusters.submit import Job


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--cluster", "file", type=click.Path(path_type=Path), help="Its `ray up` file: go through ssh.")
@click.option("--address", help="Its dashboard, e.g. http://127.0.0.1:8265; by default RAY_API_SERVER_ADDRESS.")
@click.option("--token-file", type=click.Path(path_type=Path), help="File of the cluster's token.")
@click.option("--working-dir", type=click.Path(path_type=Path), help="Folder to send; by default the repository.")
@click.option("--env", "environment", multiple=True, metavar="NAME=VALUE", help="A variable of the job.")
@click.option("--tenant", help="Who pays: lease.tenant of the config.")
@click.option("--priority", type=int, help="lease.priority of the config.")
@click.option("--pools", help="lease.pools of the config, most wanted first, by commas.")
@click.option("--id", "submission_id", help="Name of the job; by default Ray makes one.")
@click.option("--installed", is_flag=True, help="Run the Modelyard that the nodes have, not the code that is here.")
@click.option("--driver-pool", metavar="POOL", help="Run the script on a node of this pool: it outlives the head.")
@click.option("--restarts", default=0, type=click.IntRange(min=0), help="Send it again when its node is lost.")
@click.option("--detach", is_flag=True, help="Return once the job is accepted.")
@click.option(
    "--timeout-s", default=60.0, show_default=True, type=Seconds(), help="Longest wait for the way to the cluster."
)
def submit(
    script: Path,
    arguments: tuple[str, ...],
    file: Path | None,
    address: str | None,
    token_file: Path | None,
    working_dir: Path | None,
    environment: tuple[str, ...],
    tenant: str | None,
    priority: int | None,
    pools: str | None,
    submission_id: str | None,
    installed: bool,
    driver_pool: str | None,
    restarts: int,
    detach: bool,
    timeout_s: float,
) -> int:
    """Run SCRIPT with ARGUMENTS on a cluster, print what it prints, and exit with its exit code.

    Ctrl-C stops watching; the job goes on. Options that SCRIPT shares with this command go after `--`:
    `modelyard submit SCRIPT -- --id 5`.
    """
    from modelyard.clusters import laptop
    from modelyard.clusters import submit as jobs
    from modelyard.errors import ConfigError

    if detach and restarts:
        raise ConfigError("--restarts needs somebody who watches, --detach leaves", "leave one of them out")
    chosen = None if pools is None else "[" + pools + "]"
    job = jobs.prepare(
        script,
        arguments,
        working_dir,
        {"tenant": tenant, "priority": priority, "pools": chosen},
        environment={**_laptop_variables(file, address), **_pairs(environment)},
        with_code=not installed,
        submission_id=submission_id,
        pool=driver_pool,
    )
    with _way(file, address, timeout_s) as url:
        client = jobs.connect(url, _token(file, token_file, url), timeout_s)
        known = jobs.pools_with_nodes(client, url) if driver_pool is not None else set()
        if known and driver_pool not in known:
            others = ", ".join(sorted(known))
            click.echo(
                f"no node of the pool {driver_pool} is there now (of others: {others}); it is waited for", err=True
            )
        job_id = jobs.start(client, job, url)
        click.echo(f"job {job_id}: {job.entrypoint}", err=True)
        if detach:
            click.echo(job_id)
            return 0
        here = laptop.current()
        is_elsewhere = here is not None and url == here.dashboard and driver_pool is not None
        return _followed(client, job, job_id, url, restarts, here if is_elsewhere else None)


def _followed(client: JobSubmissionClient, job: Job, job_id: str, url: str, restarts: int, here: Laptop | None) -> int:
    """Follow a job, and send it again when its node was lost; a run goes on from its newest checkpoint."""
    from modelyard.clusters import laptop
    from modelyard.clusters import submit as jobs

    for left in range(restarts, -1, -1):
        try:
            read = None if here is None else functools.partial(laptop.job_log, here, job_id)
            code = jobs.follow(client, job_id, lambda text: click.echo(text, nl=False), read=read)
        except KeyboardInterrupt:
            click.echo(f"\njob {job_id} goes on; ray job logs --follow {job_id}, ray job stop {job_id}", err=True)
            return 130
        if code == 0 or left == 0 or not jobs.was_lost(client, job_id, url):
            break
        again = dataclasses.replace(job, submission_id=None)
        click.echo(f"job {job_id}: its node is lost; it is sent again", err=True)
        job_id = jobs.start(client, again, url)
    said = jobs.why(client, job_id, url) if code else ""
    how = "done" if code == 0 else f"Ray lost sight of it: {said}" if said else f"exit code {code}"
    click.echo(f"job {job_id}: {how}", err=True)
    return code


def _pairs(words: tuple[str, ...]) -> dict[str, str]:
    from modelyard.errors import ConfigError

    found = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator or not name.isidentifier():
            raise ConfigError(f"--env {word!r} sets nothing", "write --env NAME=VALUE")
        found[name] = value
    return found


def _laptop_variables(file: Path | None, address: str | None) -> dict[str, str]:
    """On this machine a job uses the artifacts and records of the shell it was sent from."""
    from modelyard.clusters import laptop

    elsewhere = file is not None or address is not None or "RAY_API_SERVER_ADDRESS" in os.environ
    if elsewhere or laptop.current() is None:
        return {}
    names = ("MODELYARD_HOME", "MODELYARD_STORE", "MODELYARD_TRACKING_URI")
    return {name: os.environ[name] for name in names if name in os.environ}


@contextlib.contextmanager
def _way(file: Path | None, address: str | None, timeout_s: float) -> Iterator[str]:
    from modelyard.clusters import files, laptop, tunnel
    from modelyard.errors import ConfigError, NotFoundError

    if file is not None and address is not None:
        raise ConfigError("--cluster and --address name two clusters", "give one of them")
    if file is not None:
        with tunnel.dashboard(files.read(file), timeout_s) as forwarded:
            yield forwarded
        return
    url = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if url is None and (here := laptop.current()) is not None:
        url = here.dashboard
    if url is None:
        raise NotFoundError(
            "no cluster is named, and none runs here", "give --cluster FILE, or start one: modelyard up"
        )
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is no address of a dashboard", "write it as http://127.0.0.1:8265")
    yield url


def _token(file: Path | None, token_file: Path | None, url: str) -> str | None:
    """The token: from the named file, the environment, the cluster's folder, or where Ray keeps it."""
    from modelyard.clusters import certs
    from modelyard.errors import AccessError, ConfigError, NotFoundError

    if token_file is not None:
        if not token_file.exists():
            raise NotFoundError(f"no token file {str(token_file)!r}", "it is made by modelyard certs create")
        if not (token := _read(token_file)):
            raise ConfigError(
                f"--token-file {str(token_file)!r} holds no token", "it is made by modelyard certs create"
            )
        return token
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    places = [Path(named)] if named else []
    places += [certs.default_folder() / certs.TOKEN] if file is not None else []
    places.append(Path.home() / ".ray" / "auth_token")
    found = next((token for place in places if (token := _read(place))), None)
    host = urlsplit(url).hostname or ""
    if found and url.startswith("http://") and not (host == "localhost" or host == "::1" or host.startswith("127.")):
        raise AccessError(
            f"{url} is plain HTTP: the token could be read on its way",
            "go through ssh with --cluster FILE, or name the token with --token-file to send it all the same",
        )
    return found


def _read(place: Path) -> str | None:
    return place.read_text().strip() if place.is_file() else None
