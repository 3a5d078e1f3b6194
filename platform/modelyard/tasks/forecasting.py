"""Forecasting: the next H points of a series from its last L."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from modelyard.errors import ConfigError, DataError
from modelyard.tasks.base import Objective
from modelyard.tasks.own_network import OwnNetwork, answering, matrix_weights, numbers, plain_module, refuse_options

if TYPE_CHECKING:
    from torch import Tensor, device, nn

    from modelyard.data.dataset import DatasetInfo

PAST, FUTURE, SCALE = "past", "future", "scale"
"""Columns of a dataset of series: (n, L), (n, H) and (n,) float32."""


class Forecasting(OwnNetwork):
    """One network for all series of the dataset; each window is brought to one scale and back."""

    kind: Literal["forecasting"] = "forecasting"
    architecture: Literal["lstm", "patchtst"] = "lstm"
    """`lstm`: a recurrent network. `patchtst`: a transformer over patches (Nie et al. 2023), by transformers."""
    hidden_size: int = Field(default=64, gt=0)
    """Width of the network."""
    layers: int = Field(default=2, gt=0)
    """Recurrent or transformer layers."""
    heads: int = Field(default=4, gt=0)
    """Attention heads (patchtst only)."""
    patch: int = Field(default=16, gt=0)
    """Points of time in one patch (patchtst), or in one recurrent step (lstm)."""
    patch_stride: int = Field(default=8, gt=0)
    """Points of time between the beginnings of two patches (patchtst only)."""
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    seasonal: bool = True
    """Look at, and foretell, differences to the season before (as Box and Jenkins do); False: the values themselves."""

    metric_names: ClassVar[tuple[str, ...]] = ("mase", "seasonal_naive_mase", "wape", "mae", "rmse")

    @property
    def objective(self) -> Objective:
        return ("mase", "min")

    def check(self, info: DatasetInfo) -> None:
        if info.format != "series":
            raise DataError(
                f"task forecasting needs a dataset of series, this one holds {info.format}",
                "prepare one with source.kind `series`",
            )
        past = _lengths(info)[0]
        seen = past - (info.season or 1) if self.seasonal else past
        if self.patch > seen:
            raise ConfigError(
                f"task.patch={self.patch} is longer than the {seen} points to look at (a past of {past}"
                + (f", less one season of {info.season} to compare with)" if self.seasonal else ")"),
                "lower task.patch, prepare windows with a longer past, or set task.seasonal to false",
            )
        if self.architecture == "patchtst" and self.hidden_size % self.heads:
            raise ConfigError(f"task.heads={self.heads} does not divide task.hidden_size={self.hidden_size}")

    def build(self, info: DatasetInfo, dataset_folder: Path | None) -> nn.Module:
        from modelyard.tasks import forecasting_models as models

        self.check(info)
        past, future = _lengths(info)
        seen = past - (info.season or 1) if self.seasonal else past
        body: nn.Module
        if self.architecture == "lstm":
            body = models.lstm(seen, future, self.patch, self.hidden_size, self.layers, self.dropout)
        else:
            body = models.patchtst(
                seen, future, self.patch, self.patch_stride, self.hidden_size, self.layers, self.heads, self.dropout
            )
        return models.Forecaster(body, past, future, info.season or 1, self.seasonal)

    def collate(self, rows: Mapping[str, np.ndarray], device: device | str) -> dict[str, Tensor]:
        import torch

        return {name: torch.from_numpy(rows[name].astype(np.float32)).to(device) for name in (PAST, FUTURE, SCALE)}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Absolute error in units of the scale, the mean over the future, (B,): what MASE measures."""
        return _scaled_error(model(batch[PAST]).float(), batch)

    def statistics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`scaled_error`, `naive_scaled_error`, `absolute_error`, `squared_error`, `size`: fp32 means of each row."""
        net = plain_module(model)
        forecast = model(batch[PAST]).float()
        error = forecast - batch[FUTURE]
        return {
            "scaled_error": _scaled_error(forecast, batch),
            "naive_scaled_error": _scaled_error(_seasonal_naive(batch, net), batch),
            "absolute_error": error.abs().mean(dim=1),
            "squared_error": error.square().mean(dim=1),
            "size": batch[FUTURE].abs().mean(dim=1),
        }

    def check_saved(self, folder: Path, trained: DatasetInfo, info: DatasetInfo, dataset_folder: Path) -> None:
        super().check_saved(folder, trained, info, dataset_folder)
        if (*_lengths(trained), trained.season) != (*_lengths(info), info.season):
            raise DataError(
                f"the model foretells {_lengths(trained)[1]} points from {_lengths(trained)[0]} with the season "
                f"{trained.season}; in the dataset these are {_lengths(info)[1]}, {_lengths(info)[0]}, {info.season}",
                "prepare the dataset with the same windows",
            )

    def metrics(self, stats: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Of n windows.

        `mase`: mean absolute error in units of the in-sample error of the seasonal-naive forecast (Hyndman and
        Koehler 2006). `seasonal_naive_mase`: the same of that forecast on these very windows. `wape`: absolute error
        as a share of the values. `mae`, `rmse`: in the series' own units.
        """
        mean = {name: float(values.mean(dtype=np.float64)) for name, values in stats.items()}
        return {
            "mase": mean["scaled_error"],
            "seasonal_naive_mase": mean["naive_scaled_error"],
            "wape": mean["absolute_error"] / max(mean["size"], 1e-12),
            "mae": mean["absolute_error"],
            "rmse": mean["squared_error"] ** 0.5,
        }

    def flops_per_row(self, model: nn.Module) -> float:
        """6 per weight and step: 2 forward, 4 backward; attention's own products are left out, as they are few."""
        net: Any = model
        once = matrix_weights(model) - matrix_weights(net.body, without="head")
        return float(6 * (net.body.steps * matrix_weights(net.body, without="head") + once))

    def predict(self, model: nn.Module, inputs: Sequence[Any], **options: Any) -> list[Any]:
        """The next H points after each input, a list of its last L points, the oldest first.

        Raises:
            InputError: an input is no list of L numbers.
        """
        import torch

        refuse_options(self.kind, options)
        if not inputs:
            return []
        net: Any = model
        rows = np.stack([numbers(value, net.past, "points of the series, the oldest first") for value in inputs])
        with answering(model) as where:
            found: list[Any] = model(torch.from_numpy(rows).to(where)).float().cpu().tolist()
        return found


def _lengths(info: DatasetInfo) -> tuple[int, int]:
    shapes = {column.name: column.shape for column in info.columns}
    return shapes[PAST][0], shapes[FUTURE][0]


def _scaled_error(forecast: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return (forecast - batch[FUTURE]).abs().mean(dim=1) / batch[SCALE]


def _seasonal_naive(batch: Mapping[str, Tensor], net: Any) -> Tensor:
    from modelyard.tasks.forecasting_models import seasonal_naive

    return seasonal_naive(batch[PAST], net.future, net.season)
