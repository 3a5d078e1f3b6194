"""`modelyard scheduler`: start, stop, recover."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def scheduler() -> None:
    """Start, stop and repair the scheduler of the Ray cluster this machine belongs to."""


@scheduler.command()
@click.option("--policy", "policy_name", default="fair_share", show_default=True, help="How jobs are chosen.")
@click.option("--journal", help="SQLAlchemy URL of its journal; by default SQLite below MODELYARD_HOME.")
@click.option("--lease-ttl-s", default=15.0, show_default=True, help="Silence after which a driver has died.")
@click.option("--yield-timeout-s", default=120.0, show_default=True, help="Longest time to give a lease back.")
@click.option(
    "--autoscaling-config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The cluster launcher's file, which says what nodes may be launched; by default the one `ray up` left here.",
)
@click.option("--start-timeout-s", default=60.0, show_default=True, help="Longest wait for it to start.")
def start(
    policy_name: str,
    journal: str | None,
    lease_ttl_s: float,
    yield_timeout_s: float,
    autoscaling_config: Path | None,
    start_timeout_s: float,
) -> None:
    """Start it on this node. It outlives this command, restarts by itself and forgets nothing."""
    from modelyard.cluster import connect_existing
    from modelyard.scheduling import service
    from modelyard.scheduling.scheduler import Timing

    connect_existing()
    timing = Timing(lease_ttl_s=lease_ttl_s, yield_timeout_s=yield_timeout_s)
    service.start(
        policy_name,
        journal=journal,
        timing=timing,
        autoscaling_config=autoscaling_config,
        start_timeout_s=start_timeout_s,
    )
    click.echo(f"the scheduler runs: policy {policy_name}, journal {journal or service.default_journal()}")


@scheduler.command()
def stop() -> None:
    """Stop it. Running jobs go on; a scheduler started later on the same journal takes them over."""
    from modelyard.cluster import connect_existing
    from modelyard.scheduling import service

    connect_existing()
    service.stop()
    click.echo("the scheduler is stopped")


@scheduler.command()
@click.option("--journal", help="SQLAlchemy URL of the journal; by default SQLite below MODELYARD_HOME.")
@click.option("--from-line", type=click.IntRange(min=1), required=True, help="First line to drop.")
@click.confirmation_option(prompt="This forgets what the dropped lines say. Go on?")
def recover(journal: str | None, from_line: int) -> None:
    """Drop a damaged line of the journal and all after it."""
    from modelyard.scheduling import service
    from modelyard.scheduling.journal import Journal

    opened = Journal(journal or service.default_journal())
    gone = opened.cut(from_line)
    left = len(opened.read())
    click.echo(f"{gone} lines dropped, {left} left")
