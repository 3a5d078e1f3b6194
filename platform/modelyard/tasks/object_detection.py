"""Object detection: boxes around things, each with its class."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, Tag, model_validator

from modelyard.config import Config
from modelyard.errors import ConfigError
from modelyard.tasks.average_precision import average_precisions, matched
from modelyard.tasks.base import Objective
from modelyard.tasks.classification_metrics import BoxScore, Score
from modelyard.tasks.image_classification import PIXELS
from modelyard.tasks.language_models import PretrainedModel, folder_or
from modelyard.tasks.own_network import answering, plain_module, refuse_options
from modelyard.tasks.vision import (
    VisionTask,
    colour,
    image_shape,
    normalise,
    open_picture,
    picture,
    pixel_tensor,
    stacked,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, device, nn

    from modelyard.data.dataset import DatasetInfo
    from modelyard.tasks.detection_models import Answer

BOXES, LABELS = "boxes", "labels"
"""Columns of a dataset of boxes: (n, M, 4) float32 and (n, M), -1 behind the last box."""
MAX_FOUND = 100
"""Boxes of one picture that are counted, the surest first, as COCO does."""


class DeformableDetrModel(Config):
    """A small two-stage Deformable DETR on a ConvNeXt, from scratch; no batch statistics anywhere."""

    architecture: Literal["deformable_detr"] = "deformable_detr"
    stride: int = Field(default=4, ge=2, le=16)
    """Side in pixels of the backbone's first patches; boxes are sought at 2 and 4 times this, and 8 times."""
    widths: tuple[int, int, int] = (32, 64, 128)
    """Channels of the stages of the backbone."""
    layers: tuple[int, int, int] = (1, 2, 2)
    """Blocks of each stage."""
    hidden_size: int = Field(default=64, gt=0)
    """Width of encoder and decoder; a multiple of 32."""
    heads: int = Field(default=4, gt=0)
    encoder_layers: int = Field(default=1, gt=0)
    decoder_layers: int = Field(default=2, gt=0)
    queries: int = Field(default=20, gt=0)
    """Boxes that the model can find in one picture."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.hidden_size % 32 or self.hidden_size % self.heads:
            raise ValueError(f"hidden_size={self.hidden_size} is no multiple of 32 and of heads={self.heads}")
        if min(*self.widths, *self.layers) < 1:
            raise ValueError("widths and layers hold a number below 1")
        return self


DetectorSource = Annotated[
    Annotated[DeformableDetrModel, Tag("deformable_detr")] | Annotated[PretrainedModel, Tag("pretrained")],
    folder_or("deformable_detr"),
]


class ObjectDetection(VisionTask):
    """Boxes and classes in images of one size."""

    kind: Literal["object_detection"] = "object_detection"
    model: DetectorSource = DeformableDetrModel()
    """A Deformable DETR from scratch (sizes), or a folder to go on from (`pretrained: FOLDER`): deformable_detr, detr,
    conditional_detr, yolos, or another whose boxes are found as a set."""
    threshold: float = Field(default=0.3, ge=0.0, lt=1.0)
    """What a box must be sure of to be told; metrics count all of them."""

    format: ClassVar[str] = "boxes"
    auto_class: ClassVar[str] = "AutoModelForObjectDetection"

    metric_names: ClassVar[tuple[str, ...]] = ("map", "map_50", "map_75", "loss")

    @property
    def objective(self) -> Objective:
        return ("map", "max")

    def check(self, info: DatasetInfo) -> None:
        super().check(info)
        _, height, width = image_shape(info)
        most = {column.name: column.shape for column in info.columns}[BOXES][0]
        if isinstance(self.model, DeformableDetrModel):
            coarsest = 4 * self.model.stride
            if min(height, width) < 2 * coarsest:
                raise ConfigError(
                    f"images of {width} x {height} pixels are too small for task.model.stride={self.model.stride}",
                    f"lower the stride, or prepare the dataset with images of at least {2 * coarsest} pixels",
                )
            places = sum((height // side) * (width // side) for side in (coarsest // 2, coarsest, 2 * coarsest))
            if self.model.queries > places:
                raise ConfigError(
                    f"task.model.queries={self.model.queries} is more than the {places} places of an image",
                    "lower it, or lower task.model.stride",
                )
            if self.model.queries < most:
                raise ConfigError(
                    f"task.model.queries={self.model.queries} is below the {most} boxes an image may hold",
                    "raise it, or prepare the dataset with a lower boxes.max_boxes",
                )

    def _from_scratch(self, info: DatasetInfo, labels: dict[str, Any]) -> nn.Module:
        from modelyard.tasks.detection_models import deformable_detr

        return deformable_detr(image_shape(info)[0], self.model, labels)

    def _check_kind(self, model: nn.Module) -> None:
        net: Any = model
        queries = getattr(net.config, "num_queries", None) or getattr(net.config, "num_detection_tokens", None)
        if queries is None:
            raise ConfigError(
                f"task.model.pretrained holds a {net.config.model_type} model, which does not find a set of boxes",
                "choose a deformable_detr, detr, conditional_detr or yolos folder",
            )

    def collate(self, rows: Mapping[str, np.ndarray], device: device | str) -> dict[str, Tensor]:
        import torch

        boxes = torch.from_numpy(rows[BOXES].astype(np.float32)).to(device)
        labels = torch.from_numpy(rows[LABELS].astype(np.int64)).to(device)
        return {PIXELS: pixel_tensor(rows).to(device, non_blocking=True), BOXES: boxes, LABELS: labels}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Of every layer of the decoder and of the proposals: class, place and overlap, per true box of a row, (B,)."""
        import torch

        from modelyard.tasks.detection_models import Truth, proposal_loss, set_loss

        layers, proposals = self._answers(model, batch[PIXELS])
        truth, classes = Truth(batch[LABELS], batch[BOXES]), _classes(model)
        losses = [set_loss(layer, truth, classes) for layer in layers]
        if proposals is not None:
            losses.append(proposal_loss(proposals, truth, classes))
        return torch.stack(losses).sum(dim=0)

    def statistics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the K surest boxes `score` fp32 (B, K), `found` their classes (B, K), `right` at which overlaps they are
        (B, K) bits; `truths` (B, C), true boxes of each class; `loss` (B,), of the last layer.
        """
        import torch
        from torch.nn import functional

        from modelyard.tasks.detection_models import Truth, corners, set_loss, strongest

        layers, _ = self._answers(model, batch[PIXELS])
        truth, classes = Truth(batch[LABELS], batch[BOXES]), _classes(model)
        scores, found, boxes = strongest(layers[-1], classes, min(MAX_FOUND, layers[-1].logits.shape[1]))
        there = truth.is_there
        parts = (scores, found, boxes, truth.labels, corners(truth.boxes), there)
        right = [
            matched(score, place, box, labels[kept], true[kept])
            for score, place, box, labels, true, kept in zip(
                *(part.detach().cpu().numpy() for part in parts), strict=True
            )
        ]
        return {
            "score": scores,
            "found": found,
            "right": torch.from_numpy(np.stack(right)).to(scores.device),
            "truths": (functional.one_hot(truth.labels.clamp_min(0), classes) * there[..., None]).sum(dim=1),
            "loss": set_loss(layers[-1], truth, classes),
        }

    def metrics(self, stats: Mapping[str, np.ndarray]) -> dict[str, float]:
        """As COCO: `map`, the mean of average precision over classes and overlaps of .5 to .95; `map_50`, `map_75` at
        one overlap. `loss`: of the last layer of the decoder.
        """
        found = _precisions(stats)
        occur = found[~np.isnan(found).all(axis=1)]
        whole, half, three_quarters = (
            (float(values.mean()) if len(occur) else 0.0) for values in (occur, occur[:, 0], occur[:, 5])
        )
        return {
            "map": whole,
            "map_50": half,
            "map_75": three_quarters,
            "loss": float(stats["loss"].mean(dtype=np.float64)),
        }

    def class_table(self, stats: Mapping[str, np.ndarray], info: DatasetInfo) -> list[tuple[str, Score]]:
        """Average precision of each class."""
        totals = stats["truths"].sum(axis=0).tolist()
        scores = [
            BoxScore(float(row.mean()), float(row[0]), total)
            for row, total in zip(_precisions(stats), totals, strict=True)
        ]
        return list(zip(info.classes, scores, strict=True))

    def predict(self, model: nn.Module, inputs: Sequence[Any], **options: Any) -> list[Any]:
        """For each picture of any size, the boxes of which the model is sure enough, the surest first: `label`,
        `score` and `box`, x0, y0, x1, y1 in pixels of the picture.

        A picture is an array (C, H, W), (H, W) or (H, W, 3) uint8, or an image file in base64.

        Raises:
            InputError: an input is no picture.
        """
        from modelyard.tasks.detection_models import strongest

        refuse_options(self.kind, options)
        net: Any = model
        pictures = [picture(value, net.image_shape) for value in inputs]
        if not pictures:
            return []
        with answering(model) as where:
            layers, _ = self._answers(model, stacked(pictures).to(where))
            kept = min(MAX_FOUND, layers[-1].logits.shape[1])
            found = [part.cpu().numpy() for part in strongest(layers[-1], _classes(model), kept)]
        names = net.config.id2label
        answers = []
        for one, scores, classes, boxes in zip(pictures, *found, strict=True):
            scale = np.array([one.width, one.height] * 2, np.float64)
            answers.append(
                [
                    {"label": names[int(c)], "score": float(s), "box": (np.clip(box, 0, 1) * scale).tolist()}
                    for s, c, box in zip(scores, classes, boxes, strict=True)
                    if s >= self.threshold
                ]
            )
        return answers

    def draw(self, given: Any, answer: Any) -> Image:
        """The picture with each box, its class and how sure the model is of it."""
        from PIL.ImageDraw import Draw

        drawn = open_picture(given).convert("RGB")
        pen = Draw(drawn)
        for found in reversed(answer):  # the surest last, on top
            shade = colour(zlib.crc32(found["label"].encode()))  # the same in every picture
            pen.rectangle(found["box"], outline=shade)
            pen.text(found["box"][:2], f"{found['label']} {found['score']:.2f}", fill=shade, anchor="lb")
        return drawn

    def _answers(self, model: nn.Module, pixels: Tensor) -> tuple[list[Answer], Answer | None]:
        from modelyard.tasks.detection_models import answers

        return answers(plain_module(model), model(pixel_values=normalise(pixels, model)))


def _classes(model: nn.Module) -> int:
    return int(plain_module(model).config.num_labels)


def _precisions(stats: Mapping[str, np.ndarray]) -> np.ndarray:
    return average_precisions(stats["score"], stats["found"], stats["right"], stats["truths"])
