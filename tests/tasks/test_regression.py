"""Regression: it finds a line, is saved whole, and refuses what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelyard.data.dataset import Column, Dataset, DatasetInfo
from modelyard.errors import DataError, InputError
from modelyard.tasks import Regression

from .conftest import assert_saved_whole, images_info, measure, train, write_dataset


def numbers_folder(folder: Path, features: np.ndarray, targets: np.ndarray) -> Path:
    columns = (
        Column(name="features", dtype="float32", shape=features.shape[1:]),
        Column(name="targets", dtype="float32", shape=targets.shape[1:]),
    )
    both = (("x", features), ("y", targets))
    names = [tuple(f"{letter}{i}" for i in range(values.shape[1])) for letter, values in both]
    info = DatasetInfo(format="numbers", columns=columns, splits={}, features=names[0], targets=names[1])
    rows = {"features": features.astype(np.float32), "targets": targets.astype(np.float32)}
    return write_dataset(folder, info, {"train": rows, "test": rows})


@pytest.fixture
def line(tmp_path: Path) -> Path:
    """The points (1, 2), (2, 4), (3, 6)."""
    return numbers_folder(tmp_path / "line", np.array([[1], [2], [3]]), np.array([[2], [4], [6]]))


def test_a_line_through_three_points_is_found(line: Path) -> None:
    task = Regression()
    model: Any = train(task, line, 1500, batch=3, rate=0.03)
    assert model[0].weight.item() == pytest.approx(2, abs=1e-3)
    assert model[0].bias.item() == pytest.approx(0, abs=1e-3)
    assert [answer[0] for answer in task.predict(model, [4, [5], np.array([6.0])])] == pytest.approx(
        [8, 10, 12], abs=0.01
    )


def test_hidden_layers_bend_the_line(tmp_path: Path) -> None:
    x = np.linspace(-2, 2, 64)[:, None]
    folder = numbers_folder(tmp_path / "parabola", x, x**2)
    scores = {
        hidden: task.metrics(measure(task, train(task, folder, 300, batch=32, rate=0.01), folder))["r2"]
        for hidden in ((), (32,))
        for task in [Regression(hidden=hidden)]
    }
    assert scores[()] < 0.1
    assert scores[(32,)] > 0.95


def test_metrics_agree_with_scikit_learn() -> None:
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

    task, generator = Regression(), np.random.default_rng(0)
    model = task.build(_info(3, 1), None)
    rows = {"features": generator.normal(size=(50, 3)), "targets": generator.normal(size=(50, 1))}
    with torch.inference_mode():
        batch = task.collate(rows, "cpu")
        stats = {name: value.numpy() for name, value in task.statistics(model, batch).items()}
        found = model(batch["features"]).numpy()
    truth = rows["targets"]
    assert task.metrics(stats) == pytest.approx(
        {
            "rmse": root_mean_squared_error(truth, found),
            "mae": mean_absolute_error(truth, found),
            "r2": r2_score(truth, found),
        },
        rel=1e-4,
    )


def test_a_saved_model_answers_identically(line: Path, tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).normal(size=(8, 3))
    folder = numbers_folder(tmp_path / "data", numbers, numbers[:, :2])
    task = Regression(hidden=(5,))
    assert_saved_whole(task, train(task, folder, 3), folder, tmp_path)


def test_flops_are_those_of_the_layers() -> None:
    task = Regression(hidden=(8,))
    assert task.flops_per_row(task.build(_info(4, 2), None)) == 6 * (4 * 8 + 8 * 2)


def test_what_does_not_fit_is_refused(line: Path) -> None:
    task = Regression()
    with pytest.raises(DataError, match="needs a dataset of numbers, this one holds images"):
        task.check(images_info())
    model = task.build(_info(2, 1), None)
    for wrong in ([1], [1, 2, 3], "one", [1, float("nan")], [[1, 2]]):
        with pytest.raises(InputError, match="an input"):
            task.predict(model, [wrong])
    with pytest.raises(InputError, match="no option 'top'"):
        task.predict(model, [[1, 2]], top=3)
    info = Dataset.open(line).info
    with pytest.raises(DataError, match=r"predicts \('y0',\) from \('x0', 'x1'\)"):
        task.check_saved(line, _info(2, 1), info, line)


def _info(features: int, targets: int) -> DatasetInfo:
    columns = (
        Column(name="features", dtype="float32", shape=(features,)),
        Column(name="targets", dtype="float32", shape=(targets,)),
    )
    names = tuple(f"x{i}" for i in range(features)), tuple(f"y{i}" for i in range(targets))
    return DatasetInfo(format="numbers", columns=columns, splits={}, features=names[0], targets=names[1])
