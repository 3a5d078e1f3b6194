"""`modelyard models compare`: which of two models is better, and is it more than chance?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from modelyard.cli.evaluate import row_progress

if TYPE_CHECKING:
    from modelyard.training.comparison import Comparison


@click.command()
@click.argument("first")
@click.argument("second")
@click.option("--dataset", metavar="REF", help="Rows to compare on. Default: the dataset both were trained on.")
@click.option("--split", default="test", show_default=True, help="Split to measure on; all of its rows are used.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Rows at a time.")
@click.option("--samples", type=click.IntRange(min=1), default=1000, show_default=True, help="Bootstrap resamples.")
@click.option(
    "--confidence",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.95,
    show_default=True,
    help="Confidence of the intervals.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the resamples.")
def compare(
    first: str,
    second: str,
    dataset: str | None,
    split: str,
    batch_size: int,
    samples: int,
    confidence: float,
    seed: int,
) -> None:
    """Measure the models FIRST and SECOND on the same rows and say which is better, or that it may be chance."""
    from modelyard.training.comparison import compare as run

    with row_progress(f"{first}, {second}") as on_progress:
        comparison = run(
            first,
            second,
            dataset,
            split=split,
            batch_size=batch_size,
            bootstrap_samples=samples,
            confidence=confidence,
            seed=seed,
            on_progress=on_progress,
        )
    click.echo("\n".join(report(comparison)))


def report(comparison: Comparison) -> list[str]:
    """The lines that show a comparison: both models, the difference with its interval, and the verdict."""
    first, second = comparison.first, comparison.second
    width = max(14, len(first.model.reference) + 2, len(second.model.reference) + 2)
    lines = [
        f"on {first.dataset.reference}, split {first.split}, {first.num_rows} rows",
        "",
        f"{'metric':<16}{first.model.reference:>{width}}{second.model.reference:>{width}}{'difference':>14}"
        f"   {first.confidence:.0%} interval",
    ]
    for name, (value, low, high) in comparison.differences.items():
        left, right = first.metrics[name].value, second.metrics[name].value
        lines.append(f"{name:<16}{left:>{width}.4f}{right:>{width}.4f}{value:>14.4f}   {low:.4f} .. {high:.4f}")
    return [*lines, "", verdict(comparison)]


def verdict(comparison: Comparison) -> str:
    """One plain sentence: which is better, or that the rows cannot tell them apart."""
    metric, _ = comparison.first.objective
    first, second = comparison.first.model.reference, comparison.second.model.reference
    if comparison.better is None:
        return (
            f"{first} and {second} cannot be told apart by {metric} on these rows "
            f"({comparison.first.confidence:.0%} confidence)."
        )
    better, worse = (first, second) if comparison.better == "first" else (second, first)
    return f"{better} is better than {worse} by {metric} ({comparison.first.confidence:.0%} confidence)."
