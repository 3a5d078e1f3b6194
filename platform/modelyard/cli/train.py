"""`modelyard train`, and what `jobs/train.py` runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from modelyard.cli.options import config_options
from modelyard.config import Config

if TYPE_CHECKING:
    from modelyard.training import Run, TrainConfig


def _config_type() -> type[Config]:
    from modelyard.training.config import TrainConfig

    return TrainConfig


@click.command("train")
@config_options(_config_type)
def train_command(config: TrainConfig) -> None:
    """Train a model as a config file says, and register it."""
    from modelyard.training import train

    show_run(train(config))


def show_run(run: Run) -> None:
    """Print what a run made: the model, its metrics before and after, the picture."""
    click.echo(f"model      {run.model}")
    click.echo(f"digest     {run.digest}")
    click.echo(f"run        {run.run_id}, {run.steps} steps ({run.stopped_because})")
    for name, value in run.metrics.items():
        before = f"{run.initial_metrics[name]:.4g} -> " if name in run.initial_metrics else ""
        click.echo(f"{name:<10} {before}{value:.4g} on held-out data")
    if run.loss_curve is not None:
        click.echo(f"loss curve {run.loss_curve}")
