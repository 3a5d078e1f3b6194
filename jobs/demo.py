"""The main job from end to end, as the commands a user would type: `make demo`."""

import shlex
from collections.abc import Sequence

import click

from modelyard.cli.main import modelyard, run

STEPS: Sequence[Sequence[str]] = (
    ("data", "prepare", "--config", "jobs/configs/pydocs.yaml"),
    ("train", "--config", "jobs/configs/tiny_gpt.yaml"),
    ("evaluate", "--config", "jobs/configs/evaluate_tiny_gpt.yaml"),
    ("models", "promote", "models:/tiny-gpt", "demo"),
    ("models", "show", "models:/tiny-gpt@demo"),
    ("predict", "models:/tiny-gpt@demo", "The for statement is used to"),
)


@click.command()
def demo() -> None:
    """Prepare, train, evaluate, register and ask a small language model."""
    for step in STEPS:
        click.secho(f"\n$ modelyard {shlex.join(step)}", bold=True)
        modelyard.main(list(step), standalone_mode=False)


if __name__ == "__main__":
    run(demo)
