"""Semantic segmentation: a class for each pixel."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, Tag, model_validator

from modelyard.config import Config
from modelyard.errors import ConfigError
from modelyard.tasks.base import Objective
from modelyard.tasks.classification_metrics import RegionScore, Score
from modelyard.tasks.image_classification import PIXELS
from modelyard.tasks.language_models import PretrainedModel, folder_or
from modelyard.tasks.own_network import answering, refuse_options
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

MASK = "mask"
"""Column of a dataset of masks: (n, H, W) uint8."""
IGNORED = 255
"""Number of the pixels of a mask that do not count."""


class SegformerModel(Config):
    """A SegFormer from scratch (Xie et al. 2021): four stages, each at half the resolution of the one before."""

    architecture: Literal["segformer"] = "segformer"
    widths: tuple[int, int, int, int] = (16, 32, 64, 128)
    """Channels of each stage."""
    layers: tuple[int, int, int, int] = (1, 1, 1, 1)
    """Transformer layers of each stage."""
    heads: tuple[int, int, int, int] = (1, 2, 4, 8)
    """Attention heads of each stage."""
    stride: Literal[2, 4] = 4
    """Pixels from one patch of the first stage to the next: 2 sees finer, and costs four times as much."""
    decoder_width: int = Field(default=64, gt=0)
    """Channels in which the stages are joined."""
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Dropout before the scores."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        for name, values in (("widths", self.widths), ("layers", self.layers), ("heads", self.heads)):
            if min(values) < 1:
                raise ValueError(f"{name}={values} holds a number below 1")
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads:
                raise ValueError(f"heads={heads} does not divide a width of {width}")
        return self


SegmenterSource = Annotated[
    Annotated[SegformerModel, Tag("segformer")] | Annotated[PretrainedModel, Tag("pretrained")],
    folder_or("segformer"),
]


class SemanticSegmentation(VisionTask):
    """A class for each pixel of images of one size."""

    kind: Literal["semantic_segmentation"] = "semantic_segmentation"
    model: SegmenterSource = SegformerModel()
    """A SegFormer from scratch (sizes), or a folder to go on from (`pretrained: FOLDER`)."""

    overlap_weight: float = Field(default=1.0, ge=0.0)
    """Weight of the soft Dice loss (Milletari et al. 2016) beside cross-entropy: small regions count like large."""

    format: ClassVar[str] = "masks"
    auto_class: ClassVar[str] = "AutoModelForSemanticSegmentation"

    metric_names: ClassVar[tuple[str, ...]] = ("mean_iou", "pixel_accuracy", "loss")

    @property
    def objective(self) -> Objective:
        return ("mean_iou", "max")

    def check(self, info: DatasetInfo) -> None:
        super().check(info)
        _, height, width = image_shape(info)
        if isinstance(self.model, SegformerModel) and min(height, width) < 8 * self.model.stride:
            raise ConfigError(
                f"images of {width} x {height} pixels are too small for task.model.stride={self.model.stride}: "
                f"the last stage sees one place in {8 * self.model.stride} pixels",
                "lower the stride, or prepare the dataset with a larger image size",
            )

    def _from_scratch(self, info: DatasetInfo, labels: dict[str, Any]) -> nn.Module:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        assert isinstance(self.model, SegformerModel)
        sizes = self.model
        config = SegformerConfig(
            num_channels=image_shape(info)[0],
            hidden_sizes=list(sizes.widths),
            depths=list(sizes.layers),
            num_attention_heads=list(sizes.heads),
            strides=[sizes.stride, 2, 2, 2],
            patch_sizes=[2 * sizes.stride - 1, 3, 3, 3],
            sr_ratios=[8, 4, 2, 1],
            decoder_hidden_size=sizes.decoder_width,
            classifier_dropout_prob=sizes.dropout,
            drop_path_rate=0.0,
            **labels,
        )
        built: nn.Module = SegformerForSemanticSegmentation(config)
        return built

    def collate(self, rows: Mapping[str, np.ndarray], device: device | str) -> dict[str, Tensor]:
        import torch

        mask = torch.from_numpy(rows[MASK].astype(np.int64)).to(device, non_blocking=True)
        return {PIXELS: pixel_tensor(rows).to(device, non_blocking=True), MASK: mask}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the pixels that count, and 1 less the overlap of each class of the row, (B,)."""
        scores = _scores(model, batch[PIXELS])
        counted = (batch[MASK] != IGNORED).sum(dim=(1, 2)).clamp_min(1)
        loss = _losses(scores, batch[MASK]).sum(dim=(1, 2)) / counted
        return loss + self.overlap_weight * _no_overlap(scores, batch[MASK]) if self.overlap_weight else loss

    def statistics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`hit`, `found`, `true`: int64 (B, C), pixels of each class; `nll`: fp32 sum over pixels."""
        from torch.nn import functional

        scores = _scores(model, batch[PIXELS])
        classes = scores.shape[1]
        counts = batch[MASK] != IGNORED
        truth = functional.one_hot(batch[MASK].masked_fill(~counts, 0), classes) * counts[..., None]
        found = functional.one_hot(scores.argmax(dim=1), classes) * counts[..., None]
        return {
            "hit": (truth * found).sum(dim=(1, 2)),
            "found": found.sum(dim=(1, 2)),
            "true": truth.sum(dim=(1, 2)),
            "nll": _losses(scores, batch[MASK]).sum(dim=(1, 2)),
        }

    def metrics(self, stats: Mapping[str, np.ndarray]) -> dict[str, float]:
        """`mean_iou`: over the classes that occur, of all pixels together (as in PASCAL VOC). `pixel_accuracy`: share
        of pixels with the right class. `loss`: nats per pixel.
        """
        hit, found, true = (stats[name].sum(axis=0) for name in ("hit", "found", "true"))
        either = found + true - hit
        pixels = max(1, int(true.sum()))
        return {
            "mean_iou": float((hit[either > 0] / either[either > 0]).mean()) if either.any() else 0.0,
            "pixel_accuracy": float(hit.sum() / pixels),
            "loss": float(stats["nll"].sum(dtype=np.float64)) / pixels,
        }

    def class_table(self, stats: Mapping[str, np.ndarray], info: DatasetInfo) -> list[tuple[str, Score]]:
        """Intersection over union, precision and recall of each class, counted in pixels."""
        counts = zip(*(stats[name].sum(axis=0).tolist() for name in ("hit", "found", "true")), strict=True)
        scores = [
            RegionScore(hit / max(found + true - hit, 1), hit / max(found, 1), hit / max(true, 1), true)
            for hit, found, true in counts
        ]
        return list(zip(info.classes, scores, strict=True))

    def predict(self, model: nn.Module, inputs: Sequence[Any], **options: Any) -> list[Any]:
        """For each picture of any size: `mask`, a grey PNG of class numbers in base64, of the size of the picture;
        `classes`, the names of the numbers; and `shares`, how much of the picture each class takes.

        A picture is an array (C, H, W), (H, W) or (H, W, 3) uint8, or an image file in base64.

        Raises:
            InputError: an input is no picture.
        """
        from torch.nn import functional

        refuse_options(self.kind, options)
        net: Any = model
        pictures = [picture(value, net.image_shape) for value in inputs]
        if not pictures:
            return []
        with answering(model) as where:
            scores = _scores(model, stacked(pictures).to(where))
        names = [net.config.id2label[number] for number in range(scores.shape[1])]
        answers = []
        for one, held in zip(pictures, scores, strict=True):
            large = functional.interpolate(held[None], (one.height, one.width), mode="bilinear", align_corners=False)
            numbers = large[0].argmax(dim=0).cpu().numpy().astype(np.uint8)
            shares = np.bincount(numbers.reshape(-1), minlength=len(names)) / numbers.size
            seen = {name: float(share) for name, share in zip(names, shares, strict=True) if share}
            answers.append({"mask": _png(numbers), "classes": names, "shares": seen})
        return answers

    def draw(self, given: Any, answer: Any) -> Image:
        """The picture with each class but the first in a colour over it, and the names of those it holds."""
        import PIL.Image
        from PIL.ImageDraw import Draw

        shown = np.asarray(open_picture(given).convert("RGB"))
        numbers = np.asarray(open_picture(answer["mask"]))
        shades = np.array([colour(number) for number in range(len(answer["classes"]))], np.uint8)
        mixed = np.where(numbers[..., None] > 0, shown // 2 + shades[numbers] // 2, shown)
        drawn = PIL.Image.fromarray(mixed.astype(np.uint8))
        pen, place = Draw(drawn), 0
        for number, name in enumerate(answer["classes"]):
            if number and name in answer["shares"]:
                pen.text((1, place), name, fill=tuple(shades[number].tolist()))
                place += 10
        return drawn


def _scores(model: nn.Module, pixels: Tensor) -> Tensor:
    """(B, C, H, W) scores at the size of the pixels."""
    from torch.nn import functional

    logits = model(pixel_values=normalise(pixels, model)).logits.float()
    return functional.interpolate(logits, pixels.shape[-2:], mode="bilinear", align_corners=False)


def _losses(scores: Tensor, mask: Tensor) -> Tensor:
    from torch.nn import functional

    return functional.cross_entropy(scores, mask, ignore_index=IGNORED, reduction="none")  # (B, H, W), 0 where ignored


def _no_overlap(scores: Tensor, mask: Tensor) -> Tensor:
    """1 less the soft Dice overlap, the mean over the classes that a row holds, (B,)."""
    from torch.nn import functional

    counts = (mask != IGNORED)[:, None]
    truth = functional.one_hot(mask.masked_fill(~counts[:, 0], 0), scores.shape[1]).permute(0, 3, 1, 2) * counts
    found = scores.softmax(dim=1) * counts
    both, either = (truth * found).sum(dim=(2, 3)), (truth + found).sum(dim=(2, 3))
    there = truth.sum(dim=(2, 3)) > 0
    losses = (1 - 2 * both / either.clamp_min(1e-6)) * there
    return losses.sum(dim=1) / there.sum(dim=1).clamp_min(1)


def _png(numbers: np.ndarray) -> str:
    from PIL import Image

    held = io.BytesIO()
    Image.fromarray(numbers).save(held, "PNG")
    return base64.b64encode(held.getvalue()).decode("ascii")
