"""`modelyard drain`: empty a node before it is mended or taken away."""

from __future__ import annotations

import click

from modelyard.cli.options import Seconds


@click.command()
@click.argument("node")
@click.option(
    "--deadline-s",
    default=600.0,
    show_default=True,
    type=Seconds(from_zero=True),
    help="Longest time to leave; announced to what runs.",
)
def drain(node: str, deadline_s: float) -> None:
    """Empty NODE (its id, address, or name in `modelyard status`), and return when nothing is left on it.

    Training runs checkpoint and go on elsewhere; replicas move without a failed request. The node takes nothing new.
    """
    from modelyard.cluster import connect_existing
    from modelyard.clusters import drain as draining

    connect_existing()
    draining.drain(node, deadline_s, lambda text: click.echo(text, err=True))
    click.echo(f"{node} is empty: it can be stopped")
