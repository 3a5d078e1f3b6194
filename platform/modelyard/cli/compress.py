"""`modelyard compress`, and what `jobs/compress.py` runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from modelyard.cli.options import config_options
from modelyard.config import Config

if TYPE_CHECKING:
    from modelyard.compression import Compressed, Recipe


def _config_type() -> type[Config]:
    from modelyard.compression import Recipe

    return Recipe


@click.command("compress")
@click.argument("model")
@config_options(_config_type, file_option="--recipe")
def compress_command(model: str, config: Recipe) -> None:
    """Make MODEL smaller and faster as a recipe says; register the result when it holds the recipe's limits.

    For example: modelyard compress models:/tiny-gpt@production --recipe jobs/configs/compress_int8.yaml
    """
    from modelyard.compression import compress

    show(compress(model, config, on_step=lambda line: click.echo(line, err=True)))


def show(result: Compressed) -> None:
    """Print what became of a model."""
    click.echo("\n".join(result.report.lines()))
    click.echo(f"model      {result.model}")
    click.echo(f"digest     {result.digest}")
    click.echo(f"report     {result.picture}")
