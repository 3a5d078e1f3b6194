"""Recommendation: which item a user takes next, by what the user did before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from modelyard.errors import ConfigError, DataError, InputError, nearest
from modelyard.tasks.base import Objective
from modelyard.tasks.own_network import OwnNetwork, answering, matrix_weights, plain

if TYPE_CHECKING:
    from torch import Tensor, device, nn

    from modelyard.data.dataset import DatasetInfo

HISTORY, TARGET, POPULARITY = "history", "target", "popularity_rank"
"""Columns of a dataset of interactions: (n, L), (n,) and (n,) int32; item numbers begin at 1, 0 is no item."""
CUT = 10
"""How many recommendations the metrics look at."""


class Recommendation(OwnNetwork):
    """Scores every item after each step of a history, and is trained on the item that followed each."""

    kind: Literal["recommendation"] = "recommendation"
    architecture: Literal["sequence", "two_tower"] = "sequence"
    """`sequence`: a causal transformer over the history (Kang and McAuley 2018, "SASRec"). `two_tower`: a dense network
    on the mean of the history's items against one on each item (Covington et al. 2016)."""
    hidden_size: int = Field(default=64, gt=0)
    """Width of the items' vectors."""
    layers: int = Field(default=2, gt=0)
    """Transformer layers (sequence only)."""
    heads: int = Field(default=2, gt=0)
    """Attention heads (sequence only)."""
    dropout: float = Field(default=0.2, ge=0.0, lt=1.0)

    metric_names: ClassVar[tuple[str, ...]] = ("ndcg_at_10", "hit_rate_at_10", "mrr", "popularity_ndcg_at_10")

    @property
    def objective(self) -> Objective:
        return ("ndcg_at_10", "max")

    def check(self, info: DatasetInfo) -> None:
        if info.format != "interactions":
            raise DataError(
                f"task recommendation needs a dataset of interactions, this one holds {info.format}",
                "prepare one with source.kind `interactions`",
            )
        if self.architecture == "sequence" and self.hidden_size % self.heads:
            raise ConfigError(f"task.heads={self.heads} does not divide task.hidden_size={self.hidden_size}")

    def build(self, info: DatasetInfo, dataset_folder: Path | None) -> nn.Module:
        from modelyard.tasks import recommendation_models as models

        self.check(info)
        length = next(column.shape[0] for column in info.columns if column.name == HISTORY)
        if self.architecture == "two_tower":
            model: Any = models.TwoTower(len(info.classes), self.hidden_size, self.dropout)
        else:
            model = models.Sequence(len(info.classes), length, self.hidden_size, self.layers, self.heads, self.dropout)
        model.length, model.items = length, info.classes
        result: nn.Module = model
        return result

    def collate(self, rows: Mapping[str, np.ndarray], device: device | str) -> dict[str, Tensor]:
        import torch

        names = (HISTORY, TARGET, POPULARITY)
        return {name: torch.from_numpy(rows[name].astype(np.int64)).to(device) for name in names}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy over all items, the mean over the steps of each history, (B,)."""
        from torch.nn import functional

        history_BL = batch[HISTORY]
        following_BL = history_BL.roll(-1, dims=1)
        following_BL[:, -1] = batch[TARGET]
        scores_BLV = model(history_BL).float()
        losses = functional.cross_entropy(scores_BLV.flatten(0, 1), following_BL.flatten(), reduction="none")
        counts_BL = (history_BL > 0).float()
        return (losses.view_as(counts_BL) * counts_BL).sum(dim=1) / counts_BL.sum(dim=1)

    def statistics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`rank` and `popularity_rank`: int64, the target's place among the items not in the history, from 1."""
        scores_BV = _fresh_scores(model(batch[HISTORY])[:, -1].float(), batch[HISTORY])
        own_B1 = scores_BV.gather(1, batch[TARGET][:, None])
        above = (scores_BV > own_B1).sum(dim=1)
        return {"rank": above + 1, "popularity_rank": batch[POPULARITY]}

    def check_saved(self, folder: Path, trained: DatasetInfo, info: DatasetInfo, dataset_folder: Path) -> None:
        super().check_saved(folder, trained, info, dataset_folder)
        if trained.classes != info.classes:
            raise DataError(
                f"the model knows {len(trained.classes)} items, the dataset holds {len(info.classes)}, "
                "and they are not the same in the same order",
                "measure it on a dataset with the same items",
            )

    def metrics(self, stats: Mapping[str, np.ndarray]) -> dict[str, float]:
        """`ndcg_at_10`, `hit_rate_at_10`, `mrr` of the items really taken; `popularity_ndcg_at_10` ranks by popularity.

        All items are ranked, none is sampled (Krichene and Rendle 2020).
        """
        ranks = stats["rank"].astype(np.float64)
        return {
            "ndcg_at_10": _ndcg(ranks),
            "hit_rate_at_10": float((ranks <= CUT).mean()),
            "mrr": float((1 / ranks).mean()),
            "popularity_ndcg_at_10": _ndcg(stats["popularity_rank"].astype(np.float64)),
        }

    def flops_per_row(self, model: nn.Module) -> float:
        """6 per weight and step, the items' table counted once, as the output matrix."""
        net: Any = model
        return float(6 * net.length * matrix_weights(model, without="positions"))

    def predict(self, model: nn.Module, inputs: Sequence[Any], **options: Any) -> list[Any]:
        """The likeliest next items after each input, a list of item names, the oldest first.

        Option `top`: how many (10 by default). An answer is a list of `{"item", "score"}`, the best first.

        Raises:
            InputError: an item is unknown (the nearest name is given), or a history is empty.
        """
        import torch

        top = int(options.pop("top", CUT))
        if options or top < 1:
            wrong = sorted(options)[0] if options else "top"
            raise InputError(f"recommendation has no option {wrong!r} of this value", "it takes `top`, 1 or more")
        if not inputs:
            return []
        net: Any = model
        numbers = {name: number for number, name in enumerate(net.items, 1)}
        rows = np.stack([_row(value, numbers, net.length) for value in inputs])
        with answering(model) as where:
            history = torch.from_numpy(rows).to(where)
            scores = _fresh_scores(model(history)[:, -1].float(), history)
            best = scores.topk(min(top, len(net.items)), dim=1)
        return [
            [{"item": net.items[i - 1], "score": s} for i, s in zip(ids, values, strict=True) if s > -1e30]
            for ids, values in zip(best.indices.cpu().tolist(), best.values.cpu().tolist(), strict=True)
        ]


def _fresh_scores(scores: Tensor, history: Tensor) -> Tensor:
    """Scores (B, V) with those of the items in the history (B, L), and of no item, put below all others."""
    masked: Tensor = scores.scatter(1, history, -1e38)
    masked[:, 0] = -1e38
    return masked


def _ndcg(ranks: np.ndarray) -> float:
    gains = np.where(ranks <= CUT, 1 / np.log2(ranks + 1), 0.0)
    return float(gains.mean()) if gains.size else 0.0


def _row(value: Any, numbers: Mapping[str, int], length: int) -> np.ndarray:
    given = plain(value)
    if not isinstance(given, list) or not given:
        raise InputError(
            f"an input is no list of items: {str(given)[:80]!r}", "give the items' names, the oldest first"
        )
    row = np.zeros(length, dtype=np.int64)
    for place, name in enumerate(given[-length:], length - min(len(given), length)):
        if str(name) not in numbers:
            raise InputError(f"there is no item {str(name)[:80]!r}", nearest(str(name), numbers))
        row[place] = numbers[str(name)]
    return row
