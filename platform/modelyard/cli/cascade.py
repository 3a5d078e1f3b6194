"""`modelyard serve cascade`: calibrate a small model that asks a larger one when it is unsure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelyard.cli import tables

if TYPE_CHECKING:
    from modelyard.serving.cascade.records import Calibration, Score, Target


@click.group()
def cascade() -> None:
    """A small model at a site, a large one in the cloud: calibrate when the second is asked, and show it."""


@cascade.command()
@click.argument("small")
@click.argument("large")
@click.option("--dataset", help="Images: a dataset with held-out rows, e.g. datasets:/digits.")
@click.option("--split", default="validation", show_default=True, help="Images: the rows to use.")
@click.option(
    "--examples",
    type=click.Path(path_type=Path, dir_okay=False),
    help='Text: a file with lines {"prompt": ..., "answer": ...}.',
)
@click.option("--max-accuracy-drop", type=float, help="Promise at most this drop below the large model, e.g. 0.02.")
@click.option("--max-share-up", type=float, help="Or promise that at most this share of the calls goes up.")
@click.option("--confidence", type=float, default=0.95, show_default=True, help="How surely the promise holds.")
@click.option(
    "--score",
    "kind",
    type=click.Choice(["mean_logprob", "quantile_logprob"]),
    default="mean_logprob",
    show_default=True,
    help="Text: what is taken for confidence.",
)
@click.option("--quantile", type=float, default=0.0, help="Text: of the tokens' probabilities; 0 is the least.")
@click.option("--first-tokens", type=int, help="Text: decide after so many tokens; by default on the whole answer.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Text: longest answer.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Text: of sampling.")
@click.option("--engine", default="auto", show_default=True, help="Text: what the site runs the models on.")
@click.option(
    "--judge",
    type=click.Choice(["exact", "contains"]),
    default="contains",
    show_default=True,
    help="Text: when an answer counts as right.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Halves the rows, and seeds sampling.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default="cascade.json", show_default=True, help="File."
)
@click.option("--png", type=click.Path(path_type=Path, dir_okay=False), help="Draw the curve.")
def calibrate(
    small: str,
    large: str,
    dataset: str | None,
    split: str,
    examples: Path | None,
    max_accuracy_drop: float | None,
    max_share_up: float | None,
    confidence: float,
    kind: str,
    quantile: float,
    first_tokens: int | None,
    max_tokens: int,
    temperature: float,
    engine: str,
    judge: str,
    seed: int,
    out: Path,
    png: Path | None,
) -> None:
    """Find the confidence below which calls go from the model SMALL up to the model LARGE.

    Half of the held-out rows choose it, the other half proves it.
    """
    from modelyard.artifacts.registry import Registry
    from modelyard.config import parse
    from modelyard.errors import ConfigError
    from modelyard.serving.cascade import measure, records
    from modelyard.serving.protocol import Sampling

    if (dataset is None) == (examples is None):
        raise ConfigError("give --dataset or --examples, one of them", "--dataset for images, --examples for text")
    target: Target = parse(
        records.Target,
        {"max_accuracy_drop": max_accuracy_drop, "max_share_up": max_share_up, "confidence": confidence},
        "command line",
    )
    registry = Registry.from_settings()
    if dataset is not None:
        found = measure.calibrate_classifiers(
            registry, small, large, dataset=dataset, split=split, target=target, seed=seed
        )
    else:
        assert examples is not None
        score: Score = parse(
            records.Score, {"kind": kind, "quantile": quantile, "first_tokens": first_tokens}, "command line"
        )
        found = measure.calibrate_texts(
            registry,
            small,
            large,
            examples=examples,
            score=score,
            target=target,
            sampling=Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed if temperature else None),
            engine=engine,
            judge="exact" if judge == "exact" else "contains",
            seed=seed,
        )
    found.write(out)
    _show(found)
    if png is not None:
        _draw(found, png)
    click.echo(f"written to {out}; name it as `calibration` of a cascade")


@cascade.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--png", type=click.Path(path_type=Path, dir_okay=False), help="Draw the curve.")
def show(file: Path, png: Path | None) -> None:
    """Show what a calibration FILE promises, what its proof says, and the whole trade."""
    from modelyard.serving.cascade.records import Calibration

    found = Calibration.read(file)
    _show(found)
    if png is not None:
        _draw(found, png)


def _show(found: Calibration) -> None:
    click.echo("\n".join(report(found)))
    table = tables.table("threshold", "accuracy", "sent up", "bytes up", "bytes down", "wrong at the site")
    for point in found.curve[:: max(1, len(found.curve) // 10)]:
        wrong = "-" if point.kept_error is None else f"{point.kept_error:.2%}"
        cells = (f"{point.threshold:.4f}", f"{point.accuracy:.2%}", f"{point.share_up:.1%}")
        tables.add_row(table, *cells, f"{point.bytes_up:.1f}", f"{point.bytes_down:.1f}", wrong)
    tables.console().print(table)


def report(found: Calibration) -> list[str]:
    """The lines that show a calibration."""
    target, proof = found.target, found.proof
    what = "accuracy drop" if target.max_accuracy_drop is not None else "share sent up"
    at = proof.figures
    lines = [
        f"small      {found.small.reference} {proof.accuracy_small:.2%} right alone",
        f"large      {found.large.reference} {proof.accuracy_large:.2%} right alone",
        f"threshold  {found.threshold:.4f} ({found.score.kind})",
        f"chosen on  {found.rows} rows of {found.dataset.reference}",
        f"promise    {what} at most {target.bound:.2%}, with confidence {target.confidence:.0%}",
        f"proof      {proof.rows} other rows: {at.accuracy:.2%} right, {at.share_up:.1%} sent up, "
        f"{what} between {proof.low:.2%} and {proof.high:.2%}",
    ]
    if proof.calibration_error is not None and proof.calibration_error_raw is not None:
        lines.append(
            f"confidence off by {proof.calibration_error:.3f} on average, {proof.calibration_error_raw:.3f} without "
            f"its temperature of {found.temperature:.2f}"
        )
    if found.is_refuted:
        lines.append("REFUTED    the other rows speak against the promise; calibrate with more rows")
    return lines


def _draw(found: Calibration, path: Path) -> None:
    from modelyard.serving.cascade.picture import draw_curve

    draw_curve(found, path)
    click.echo(f"curve drawn to {path}")
