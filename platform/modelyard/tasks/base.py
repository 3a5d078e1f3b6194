"""The protocol between a workload and everything that runs it.

A task is a config: its fields say which model to build. Trainer, evaluator and predictor know only the
methods below, so a new workload is one new file here. Importing this module does not import torch, because
configs are read by the command line, which must start fast.

Letters in shape comments: B rows of a batch, T tokens of a row, V vocabulary, n rows of a whole split.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from modelyard.config import Config
from modelyard.errors import DataError
from modelyard.tasks.classification_metrics import Score, class_scores

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor, device, nn

    from modelyard.data.dataset import DatasetInfo

Objective = tuple[str, Literal["min", "max"]]
"""Name of the metric that decides which of two models is better, and which direction is better."""

Uploads = Literal["none", "pictures", "files"]
"""What callers of a served model may send as files: pictures, which `predict` gets as arrays, or files, as bytes."""


class Task(Config, ABC):
    """What a model is for: how to build it, feed it, score it, save it and ask it."""

    kind: str
    """Name of the task; each task fixes its own, by which configs choose it."""

    uploads: ClassVar[Uploads] = "none"
    metric_names: ClassVar[tuple[str, ...]] = ()
    """What `metrics` may return, so that a misspelt name is refused before any work; empty where it is not known."""

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """The deciding metric of `metrics` and its better direction, e.g. `("perplexity", "min")`."""

    @abstractmethod
    def check(self, info: DatasetInfo) -> None:
        """Refuse a dataset this task cannot be trained on. Pure and cheap: reads at most a small JSON file.

        Raises:
            ConfigError: a field does not fit the dataset (both numbers are named).
            DataError: the dataset is of another format.
        """

    def bases(self) -> tuple[str, ...]:
        """References of the registered models that `build` starts from; the trainer fetches them on every node."""
        return ()

    def with_bases(self, folders: Mapping[str, Path]) -> Task:
        """The same task, reading each of `bases` from a local folder."""
        return self

    @abstractmethod
    def build(self, info: DatasetInfo, dataset_folder: Path | None) -> nn.Module:
        """A new fp32 model on the CPU. Deterministic: the caller has called `torch.manual_seed`."""

    @abstractmethod
    def collate(self, rows: Mapping[str, np.ndarray], device: device | str) -> dict[str, Tensor]:
        """Columns of B rows, as `Split.read` returns them, to the tensors that `loss` takes."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean loss of each row in nats, fp32 (B,). `model` may be wrapped (DeepSpeed): it is only called."""

    @abstractmethod
    def statistics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `metrics` needs of each row: named tensors (B, ...), float32 or int64; most are (B,).

        Where a row has several numbers, as one per class, their count is the same in every batch. The statistics of a
        row do not depend on the others in its batch: ranks may split it anyhow.
        """

    def begin_step(self, model: nn.Module, step: int, total: int) -> None:
        """Called before optimizer step `step` (from 0) of `total`, for a model whose form follows the step.

        `model` is the plain module. Default: nothing.
        """

    def check_saved(self, folder: Path, trained: DatasetInfo, info: DatasetInfo, dataset_folder: Path) -> None:
        """Refuse to measure the model saved in `folder`, trained on `trained`, on a dataset it cannot read.

        Raises:
            DataError: the dataset does not fit; both sides are named.
        """
        if trained.format != info.format:
            raise DataError(
                f"the model was trained on {trained.format}, the dataset holds {info.format}",
                "choose a dataset of the same kind",
            )

    def row_statistics(self, folder: Path) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
        """Further statistics of rows that need the model's folder (its tokenizer) but not its weights.

        The function that is returned turns columns of B rows into named arrays (B,). Default: none.
        """
        return lambda rows: {}

    @abstractmethod
    def metrics(self, stats: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Metrics of n rows from their gathered statistics, each (n, ...). Pure numpy; called often."""

    def class_table(self, stats: Mapping[str, np.ndarray], info: DatasetInfo) -> list[tuple[str, Score]]:
        """The score of each class by name, from the statistics `label` and `prediction`; empty without these."""
        if not {"label", "prediction"} <= set(stats):
            return []
        scores = class_scores(stats["label"], stats["prediction"], len(info.classes))
        return list(zip(info.classes, scores, strict=True))

    @abstractmethod
    def flops_per_row(self, model: nn.Module) -> float:
        """Model FLOPs (not hardware FLOPs: no recomputation) of one row, forward and backward."""

    @abstractmethod
    def save(
        self,
        model: nn.Module,
        folder: Path,
        dataset_folder: Path,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write what `load_model` reads: safetensors, configs, `task.json`. Leaves `model` as it was.

        Args:
            model: the plain module (not the DeepSpeed engine).
            folder: written into; made when absent.
            dataset_folder: the dataset artifact it was trained on (its description and tokenizer are kept).
            state: full state dict by the names of `model.state_dict()`, for a model whose own parameters are
                partitioned (ZeRO-3). Tied weights may come once or under every name. Default: the model's.
        """

    @abstractmethod
    def load(self, folder: Path, info: DatasetInfo) -> nn.Module:
        """The model that `save` wrote, on the CPU, in eval mode. Use `modelyard.tasks.load_model`."""

    @abstractmethod
    def predict(self, model: nn.Module, inputs: Sequence[Any], **options: Any) -> list[Any]:
        """One answer per input, in order; inputs may come as plain Python values or as numpy arrays."""

    def draw(self, given: Any, answer: Any) -> Image | None:
        """A picture of `answer`, an answer of `predict` to `given`; None where there is nothing to look at."""
        return None

    def parse_input(self, text: str) -> Any:
        """What `predict` takes, from what a person wrote on a command line. Default: JSON, else the text itself.

        Raises:
            ModelyardError: the text names a file that cannot be read.
        """
        try:
            return json.loads(text)
        except ValueError:
            return text

    def enable_activation_checkpointing(self, model: nn.Module) -> None:
        """Recompute activations in the backward pass instead of keeping them: less memory, a third more work.

        Default: nothing, for models whose activations are small.
        """
