"""A run as a picture."""

from __future__ import annotations

from pathlib import Path

from modelyard.training.history import History


def loss_curve(history: History, path: Path, title: str) -> Path | None:
    """Draw the training loss (and validation losses, and the learning rate) over steps into a PNG.

    Returns the path; None when nothing was logged.
    """
    losses = history.series("loss")
    if not losses:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*losses, strict=True), color="tab:blue", linewidth=0.8, alpha=0.5, label="training, each step")
    smooth = _smoothed(losses)
    axes.plot(*zip(*smooth, strict=True), color="tab:blue", linewidth=1.8, label="training, smoothed")
    measured = sorted({name for record in history.records for name in record if name.endswith("_loss")})
    for colour, field in enumerate(measured, 1):  # the first of matplotlib's colours is the training loss's
        points = history.series(field)
        axes.plot(*zip(*points, strict=True), f"C{colour}", marker="o", markersize=4, label=field.replace("_", " "))
    axes.set(xlabel="step", ylabel="loss (nats)", title=title)
    axes.grid(alpha=0.3)
    rates = axes.twinx()
    rates.plot(*zip(*history.series("learning_rate"), strict=True), color="tab:gray", linewidth=0.8, linestyle=":")
    rates.set_ylabel("learning rate (dotted)")
    axes.legend(loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _smoothed(points: list[tuple[int, float]], weight: float = 0.9) -> list[tuple[int, float]]:
    """Exponential moving average, corrected for its start."""
    average, mass, smooth = 0.0, 0.0, []
    for step, value in points:
        average = weight * average + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        smooth.append((step, average / mass))
    return smooth
