"""A calibration's curve as a picture."""

from __future__ import annotations

from pathlib import Path

from modelyard.serving.cascade.records import Calibration


def draw_curve(calibration: Calibration, path: Path) -> Path:
    """Accuracy against the share sent up and against bytes, on the rows of the proof, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    proof, points = calibration.proof, calibration.curve
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    chosen = proof.figures
    both_ways = [point.bytes_up + point.bytes_down for point in points]
    for axes, values, at in (
        (left, [100 * point.share_up for point in points], 100 * chosen.share_up),
        (right, both_ways, chosen.bytes_up + chosen.bytes_down),
    ):
        axes.plot(values, [100 * point.accuracy for point in points], color="tab:blue", label="cascade")
        axes.plot(at, 100 * chosen.accuracy, "o", color="tab:red", label=f"chosen: threshold {chosen.threshold:.3f}")
        axes.axhline(100 * proof.accuracy_large, color="tab:gray", linestyle="--", label="large model alone")
        axes.axhline(100 * proof.accuracy_small, color="tab:gray", linestyle=":", label="small model alone")
        axes.grid(alpha=0.3)
    left.set(xlabel="calls sent up (%)", ylabel=f"accuracy (%) on {proof.rows} rows")
    right.set(xlabel="bytes up and down, mean of all calls")
    left.legend(loc="lower right")
    figure.suptitle(f"{calibration.small.reference}, else {calibration.large.reference}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
