"""The picture of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.image import imread

from modelyard.training.history import History
from modelyard.training.summary import loss_curve


def history(losses: list[float]) -> History:
    steps = [{"step": step, "loss": loss, "learning_rate": 0.1} for step, loss in enumerate(losses, 1)]
    return History([*steps, {"step": len(losses), "validation_loss": losses[-1]}])


def test_a_run_becomes_a_png_with_curves_in_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "loss.png"
    assert loss_curve(history([4.0, 3.0, 2.5]), path, title="x") == path
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = imread(path)
    is_blue = (pixels[..., 2] > 0.6) & (pixels[..., 0] < 0.3)
    assert pixels.shape[:2] == (540, 960)
    assert np.count_nonzero(is_blue) > 200


def test_one_step_is_enough_for_a_picture(tmp_path: Path) -> None:
    assert loss_curve(history([4.0]), tmp_path / "loss.png", title="x") is not None


def test_without_a_logged_loss_there_is_no_picture(tmp_path: Path) -> None:
    assert loss_curve(History([{"step": 0, "test_loss": 1.0}]), tmp_path / "loss.png", title="x") is None
    assert not (tmp_path / "loss.png").exists()
