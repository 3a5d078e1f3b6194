"""`modelyard evaluate`: measure a model on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from modelyard.cli.options import config_options

if TYPE_CHECKING:
    from modelyard.training.evaluation import EvaluateConfig, EvaluationResult

_TITLES = {"f1": "F1", "iou": "IoU", "ap": "AP", "ap_50": "AP@.5"}
"""How a column of the table of classes is headed; the others by their names."""


def _config_type() -> type[EvaluateConfig]:
    from modelyard.training.evaluation import EvaluateConfig

    return EvaluateConfig


@click.command()
@config_options(_config_type)
def evaluate(config: EvaluateConfig) -> None:
    """Measure a model on every row of a split, with confidence intervals, and record it on the model's version.

    Without a file: modelyard evaluate --model models:/tiny-gpt --dataset datasets:/pydocs
    """
    from modelyard.training.evaluation import evaluate as run

    with row_progress(config.model) as on_progress:
        result = run(
            config.model,
            config.dataset,
            split=config.split,
            batch_size=config.batch_size,
            bootstrap_samples=config.bootstrap_samples,
            confidence=config.confidence,
            seed=config.seed,
            on_progress=on_progress,
        )
    click.echo("\n".join(report(result)))


@contextmanager
def row_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, where that is a terminal; yields what to call with (rows done, rows in all)."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def report(result: EvaluationResult) -> list[str]:
    """The lines that show a result: metrics with intervals, then the classes."""
    lines = [
        f"{result.model.reference} on {result.dataset.reference}, split {result.split}, {result.num_rows} rows",
        "",
        f"{'metric':<16}{'value':>12}   {result.confidence:.0%} interval",
    ]
    for name, (value, low, high) in result.metrics.items():
        lines.append(f"{name:<16}{value:>12.4f}   {low:.4f} .. {high:.4f}")
    if result.classes:
        width = max(12, *(len(row.name) + 2 for row in result.classes))
        titles = [_TITLES.get(field, field) for field in result.classes[0].score._fields]
        lines += ["", f"{'class':<{width}}" + "".join(f"{title:>10}" for title in titles)]
        for name, score in result.classes:
            shown = (f"{value:>10}" if isinstance(value, int) else f"{value:>10.4f}" for value in score)
            lines.append(f"{name:<{width}}" + "".join(shown))
    return lines
