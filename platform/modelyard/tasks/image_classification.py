"""Image classification: one label per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from modelyard.errors import ConfigError, DataError, InputError
from modelyard.tasks.base import Objective, Uploads
from modelyard.tasks.classification_metrics import accuracy, macro_f1
from modelyard.tasks.own_network import OwnNetwork, answering, refuse_options

if TYPE_CHECKING:
    from torch import Tensor, device, nn

    from modelyard.data.dataset import DatasetInfo

PIXELS, LABEL = "pixels", "label"
"""Columns of an image dataset: (n, C, H, W) uint8 and (n,) int64."""


class ImageClassification(OwnNetwork):
    """A network from scratch on images of one size, (C, H, W) uint8 pixels."""

    uploads: ClassVar[Uploads] = "pictures"
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "loss")
    kind: Literal["image_classification"] = "image_classification"
    architecture: Literal["cnn", "mlp", "linear", "resnet18", "vit_tiny"] = "cnn"
    """`cnn`: convolutions with pooling, then two dense layers. `mlp`: the two dense layers alone. `linear`: one layer,
    the baseline. `resnet18` (He et al. 2016) and `vit_tiny` (Touvron et al. 2021): by transformers."""
    channels: tuple[int, ...] = Field(default=(32, 64), min_length=1)
    """Output channels of each convolution (cnn only)."""
    hidden: int = Field(default=128, gt=0)
    """Width of the dense layer before the scores (cnn and mlp only)."""
    patch: int = Field(default=4, gt=0)
    """Side of a patch in pixels (vit_tiny only)."""
    layers: int = Field(default=12, gt=0)
    """Transformer layers (vit_tiny only); fewer learn faster, and suffice for small images."""
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Dropout before the scores."""
    jitter: float = Field(default=0.0, ge=0.0, le=0.5)
    """In training each image is shifted, scaled and turned at random by up to this share of its side (and this angle in
    radians): few images last longer."""

    @property
    def objective(self) -> Objective:
        return ("accuracy", "max")

    def check(self, info: DatasetInfo) -> None:
        if info.format != "images":
            raise DataError(
                f"task image_classification needs a dataset of images, this one holds {info.format}",
                "choose another dataset, or the task `causal_lm`",
            )
        if len(info.classes) < 2:
            raise DataError(f"the dataset names {len(info.classes)} classes", "a classifier needs at least 2")
        if self.architecture == "cnn" and min(self.channels) < 1:
            raise ConfigError(f"task.channels: {self.channels} holds a number below 1")
        _, height, width = _image_shape(info)
        if self.architecture == "vit_tiny" and (height % self.patch or width % self.patch):
            raise ConfigError(
                f"task.patch={self.patch} does not divide images of {height} x {width} pixels",
                "choose a patch that does, or prepare the dataset with another image size",
            )

    def build(self, info: DatasetInfo, dataset_folder: Path | None) -> nn.Module:
        from modelyard.tasks import image_models

        self.check(info)
        shape, classes = _image_shape(info), len(info.classes)
        if self.architecture == "mlp":
            model = image_models.mlp(shape, self.hidden, classes, self.dropout)
        elif self.architecture == "linear":
            model = image_models.linear(shape, classes)
        elif self.architecture == "resnet18":
            model = image_models.resnet18(shape, classes)
        elif self.architecture == "vit_tiny":
            model = image_models.vit_tiny(shape, classes, self.patch, self.layers, self.dropout)
        else:
            model = image_models.cnn(shape, self.channels, self.hidden, classes, self.dropout)
        remembering: Any = model
        remembering.image_shape = shape
        return model

    def collate(self, rows: Mapping[str, np.ndarray], device: device | str) -> dict[str, Tensor]:
        import torch

        pixels = torch.from_numpy(np.ascontiguousarray(rows[PIXELS]))
        labels = torch.from_numpy(rows[LABEL].astype(np.int64))
        return {PIXELS: pixels.to(device, non_blocking=True), LABEL: labels.to(device, non_blocking=True)}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        from torch.nn import functional

        pixels = batch[PIXELS]
        if self.jitter and model.training:
            from modelyard.tasks.image_models import jittered

            pixels = jittered(pixels, self.jitter)
        return functional.cross_entropy(model(pixels).float(), batch[LABEL], reduction="none")

    def statistics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`loss`: fp32 nats; `label` and `prediction`: int64 class numbers."""
        from torch.nn import functional

        scores = model(batch[PIXELS]).float()
        losses = functional.cross_entropy(scores, batch[LABEL], reduction="none")
        return {"loss": losses, "label": batch[LABEL], "prediction": scores.argmax(dim=1)}

    def check_saved(self, folder: Path, trained: DatasetInfo, info: DatasetInfo, dataset_folder: Path) -> None:
        super().check_saved(folder, trained, info, dataset_folder)
        if trained.classes != info.classes:
            raise DataError(
                f"the model knows {len(trained.classes)} classes, the dataset has {len(info.classes)}"
                if len(trained.classes) != len(info.classes)
                else "the dataset's classes are other ones, or in another order, than the model's",
                "measure it on a dataset with the same classes",
            )
        if _image_shape(trained) != _image_shape(info):
            raise DataError(
                f"images are {_image_shape(info)}, the model takes {_image_shape(trained)}",
                "prepare the dataset with the same image size",
            )

    def metrics(self, stats: Mapping[str, np.ndarray]) -> dict[str, float]:
        """`accuracy`, `macro_f1` and `loss` (nats per image)."""
        labels, predictions = stats["label"], stats["prediction"]
        return {
            "accuracy": accuracy(labels, predictions),
            "macro_f1": macro_f1(labels, predictions),
            "loss": float(stats["loss"].mean(dtype=np.float64)) if labels.size else 0.0,
        }

    def flops_per_row(self, model: nn.Module) -> float:
        """Three times the forward pass: the backward pass makes two products for each of its own."""
        from modelyard.tasks.image_models import forward_flops

        net: Any = model
        return 3 * forward_flops(model, net.image_shape)

    def predict(self, model: nn.Module, inputs: Sequence[Any], **options: Any) -> list[Any]:
        """The class number and its probability for each image, a (C, H, W) uint8 array.

        Raises:
            InputError: an image is of another shape than those the model was trained on.
        """
        import torch

        refuse_options(self.kind, options)
        net: Any = model
        for image in inputs:
            if tuple(np.shape(image)) != tuple(net.image_shape):
                raise InputError(
                    f"an image has the shape {np.shape(image)}, the model takes {tuple(net.image_shape)}",
                    "give (channels, height, width) and resize it first",
                )
        if not inputs:
            return []
        pixels = torch.from_numpy(np.stack([np.asarray(image, dtype=np.uint8) for image in inputs]))
        with answering(model) as where:
            shares = model(pixels.to(where)).float().softmax(dim=1)
        best = shares.max(dim=1)
        return [{"label": int(i), "probability": float(p)} for p, i in zip(*best, strict=True)]

    def parse_input(self, text: str) -> Any:
        return read_image(text)


def read_image(path: str) -> np.ndarray:
    """The pixels of an image file, (1, H, W) for grey and (3, H, W) for other pictures, uint8.

    Raises:
        ConfigError: it is no image file.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB"))
    except (OSError, UnidentifiedImageError) as error:
        todo = "give the path of a picture (PNG, JPEG, ...)"
        raise ConfigError(
            f"{path[:200]!r} is not an image file: {error.strerror or 'it cannot be read'}", todo
        ) from error
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def _image_shape(info: DatasetInfo) -> tuple[int, ...]:
    columns = {column.name: column for column in info.columns}
    if PIXELS not in columns or LABEL not in columns or len(columns[PIXELS].shape) != 3:
        raise DataError(
            f"an image dataset needs the columns {PIXELS!r} (channels, height, width) and {LABEL!r}, "
            f"this one has {', '.join(sorted(columns)) or 'none'}",
            "prepare it again with `modelyard data prepare`",
        )
    return columns[PIXELS].shape
