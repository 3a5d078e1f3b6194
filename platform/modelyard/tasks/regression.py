"""Regression: numbers from numbers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from modelyard.errors import DataError
from modelyard.tasks.base import Objective
from modelyard.tasks.own_network import OwnNetwork, answering, matrix_weights, numbers, refuse_options

if TYPE_CHECKING:
    from torch import Tensor, device, nn

    from modelyard.data.dataset import DatasetInfo

FEATURES, TARGETS = "features", "targets"
"""Columns of a dataset of numbers: (n, F) and (n, K) float32."""


class Regression(OwnNetwork):
    """Mean-squared error on rows of F features and K targets; linear unless hidden layers are asked for."""

    kind: Literal["regression"] = "regression"
    hidden: tuple[int, ...] = ()
    """Width of each hidden layer; none: one linear layer, y = w x + b."""

    metric_names: ClassVar[tuple[str, ...]] = ("rmse", "mae", "r2")

    @property
    def objective(self) -> Objective:
        return ("rmse", "min")

    def check(self, info: DatasetInfo) -> None:
        if info.format != "numbers":
            raise DataError(
                f"task regression needs a dataset of numbers, this one holds {info.format}",
                "prepare one with source.kind `table` or `points`",
            )

    def build(self, info: DatasetInfo, dataset_folder: Path | None) -> nn.Module:
        from torch import nn

        self.check(info)
        widths = [len(info.features), *self.hidden, len(info.targets)]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        return nn.Sequential(*layers[:-1])

    def collate(self, rows: Mapping[str, np.ndarray], device: device | str) -> dict[str, Tensor]:
        import torch

        return {name: torch.from_numpy(rows[name].astype(np.float32)).to(device) for name in (FEATURES, TARGETS)}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean squared error of each row, (B,)."""
        errors: Tensor = model(batch[FEATURES]).float() - batch[TARGETS]
        return errors.square().mean(dim=1)

    def statistics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`squared_error`, `absolute_error`: fp32 means over a row's targets; `target`, `target_square` likewise."""
        errors, targets = model(batch[FEATURES]).float() - batch[TARGETS], batch[TARGETS]
        return {
            "squared_error": errors.square().mean(dim=1),
            "absolute_error": errors.abs().mean(dim=1),
            "target": targets.mean(dim=1),
            "target_square": targets.square().mean(dim=1),
        }

    def check_saved(self, folder: Path, trained: DatasetInfo, info: DatasetInfo, dataset_folder: Path) -> None:
        super().check_saved(folder, trained, info, dataset_folder)
        if (trained.features, trained.targets) != (info.features, info.targets):
            raise DataError(
                f"the model predicts {trained.targets} from {trained.features}, the dataset has "
                f"{info.targets} and {info.features}",
                "measure it on a dataset with the same columns in the same order",
            )

    def metrics(self, stats: Mapping[str, np.ndarray]) -> dict[str, float]:
        """`rmse`, `mae`, and `r2` against always saying the mean (0 when the targets do not vary)."""
        squared = float(stats["squared_error"].mean(dtype=np.float64))
        variance = float(stats["target_square"].mean(dtype=np.float64) - stats["target"].mean(dtype=np.float64) ** 2)
        return {
            "rmse": squared**0.5,
            "mae": float(stats["absolute_error"].mean(dtype=np.float64)),
            "r2": 1 - squared / variance if variance > 1e-12 else 0.0,
        }

    def flops_per_row(self, model: nn.Module) -> float:
        """6 per weight: 2 forward, 4 backward."""
        return float(6 * matrix_weights(model))

    def predict(self, model: nn.Module, inputs: Sequence[Any], **options: Any) -> list[Any]:
        """The targets of each input, a list of F numbers (or one number, when F is 1).

        Raises:
            InputError: an input is no list of F numbers.
        """
        import torch

        refuse_options(self.kind, options)
        if not inputs:
            return []
        layers: Any = model
        count = layers[0].in_features
        rows = np.stack([numbers(value, count, "numbers, one for each feature") for value in inputs])
        with answering(model) as where:
            found: list[Any] = model(torch.from_numpy(rows).to(where)).float().cpu().tolist()
        return found
