"""Forecasting: it beats the season before on a series that drifts, and counts errors as the literature does."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from modelyard.config import parse
from modelyard.data.config import PrepareConfig
from modelyard.data.dataset import Dataset
from modelyard.data.prepare import prepare_folder
from modelyard.errors import ConfigError, DataError, InputError
from modelyard.tasks import Forecasting

from .conftest import assert_saved_whole, images_info, measure, row_losses, train

Architecture = Literal["lstm", "patchtst"]
SMALL: dict[str, Any] = {"hidden_size": 32, "layers": 1, "heads": 2, "patch": 8, "patch_stride": 4, "dropout": 0.0}


@pytest.fixture(scope="module")
def drifting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wave of period 12 on a slow one of period 97, in 600 points; 36 are seen, 6 foretold."""
    folder = tmp_path_factory.mktemp("series")
    generator = np.random.default_rng(0)
    time = np.arange(600)
    waves = 10 * np.sin(time * 2 * np.pi / 12) + 10 * np.sin(time * 2 * np.pi / 97)
    values = 100 + waves + generator.normal(0, 0.3, 600)
    (folder / "a.csv").write_text("load\n" + "\n".join(map(str, values)))
    source = {"kind": "series", "paths": [str(folder / "a.csv")], "columns": ["load"]}
    windows = {"past": 36, "future": 6, "season": 12}
    splits = {"train": 0.7, "validation": 0.1, "test": 0.2}
    config = {"name": "drifting", "source": source, "windows": windows, "splits": splits}
    prepare_folder(parse(PrepareConfig, config), folder / "data")
    return folder / "data"


@pytest.mark.parametrize("architecture", ["lstm", "patchtst"])
def test_the_season_before_is_beaten(architecture: Architecture, drifting: Path) -> None:
    task = Forecasting(architecture=architecture, **SMALL)
    metrics = task.metrics(measure(task, train(task, drifting, 150), drifting))
    assert metrics["mase"] < 0.8 * metrics["seasonal_naive_mase"]
    assert metrics["mase"] < 1


def test_errors_are_counted_as_by_hand(drifting: Path) -> None:
    task = Forecasting(**SMALL)
    model = train(task, drifting, 1)
    rows = Dataset.open(drifting).split("test").read(np.arange(7))
    forecast = np.array(task.predict(model, list(rows["past"])))
    errors = np.abs(forecast - rows["future"])
    naive = np.abs(rows["past"][:, -12:-6] - rows["future"])
    with torch.inference_mode():
        stats = {name: v.numpy() for name, v in task.statistics(model, task.collate(rows, "cpu")).items()}
    assert task.metrics(stats) == pytest.approx(
        {
            "mase": (errors.mean(axis=1) / rows["scale"]).mean(),
            "seasonal_naive_mase": (naive.mean(axis=1) / rows["scale"]).mean(),
            "wape": errors.sum() / np.abs(rows["future"]).sum(),
            "mae": errors.mean(),
            "rmse": np.sqrt((errors**2).mean()),
        },
        rel=1e-4,
    )
    np.testing.assert_allclose(row_losses(task, model, rows), errors.mean(axis=1) / rows["scale"], rtol=1e-4)


def test_an_untrained_seasonal_model_stays_near_the_season_before(drifting: Path) -> None:
    stats = measure(Forecasting(**SMALL), train(Forecasting(**SMALL), drifting, 0), drifting)
    metrics = Forecasting(**SMALL).metrics(stats)
    assert metrics["mase"] == pytest.approx(metrics["seasonal_naive_mase"], rel=0.5)


@pytest.mark.parametrize("architecture", ["lstm", "patchtst"])
@pytest.mark.parametrize("seasonal", [True, False])
def test_a_louder_series_gets_a_louder_forecast(architecture: Architecture, seasonal: bool, drifting: Path) -> None:
    task = Forecasting(architecture=architecture, seasonal=seasonal, **SMALL)
    model = train(task, drifting, 2)
    past = Dataset.open(drifting).split("test").read(np.arange(1))["past"][0]
    plain, louder = (np.array(task.predict(model, [values])[0]) for values in (past, 10 * past + 5))
    np.testing.assert_allclose(louder, 10 * plain + 5, rtol=1e-3)


@pytest.mark.parametrize("architecture", ["lstm", "patchtst"])
def test_a_row_counts_the_same_in_any_batch(architecture: Architecture, drifting: Path) -> None:
    task = Forecasting(architecture=architecture, **SMALL)
    model = train(task, drifting, 1).train()
    rows = Dataset.open(drifting).split("test").read(np.arange(6))
    parts = [row_losses(task, model, {k: v[i : i + 2] for k, v in rows.items()}) for i in (0, 2, 4)]
    torch.testing.assert_close(row_losses(task, model, rows), torch.cat(parts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["lstm", "patchtst"])
def test_a_saved_model_answers_identically(architecture: Architecture, drifting: Path, tmp_path: Path) -> None:
    task = Forecasting(architecture=architecture, **SMALL)
    model = train(task, drifting, 2)
    assert_saved_whole(task, model, drifting, tmp_path)
    assert task.flops_per_row(model) > 1000


def test_what_does_not_fit_is_refused(drifting: Path) -> None:
    info = Dataset.open(drifting).info
    with pytest.raises(DataError, match="needs a dataset of series, this one holds images"):
        Forecasting().check(images_info())
    with pytest.raises(
        ConfigError,
        match=r"task\.patch=30 is longer than the 24 points to look at \(a past of 36, less one season of 12",
    ):
        Forecasting(patch=30).check(info)
    with pytest.raises(ConfigError, match=r"task\.heads=5 does not divide"):
        Forecasting(architecture="patchtst", heads=5).check(info)
    task = Forecasting(**SMALL)
    model = train(task, drifting, 0)
    with pytest.raises(InputError, match=r"shape \(3,\), the model takes \(36,\)"):
        task.predict(model, [[1, 2, 3]])
    with pytest.raises(DataError, match="with the season 12; in the dataset these are 6, 36, 24"):
        task.check_saved(drifting, info, info.with_changes(season=24), drifting)
