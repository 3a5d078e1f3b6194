"""What the tasks on whole pictures share: pixels of one size in, answers in the units of the picture that came."""

from __future__ import annotations

import base64
import binascii
import io
import json
from abc import ABC
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from modelyard.errors import ConfigError, DataError, InputError
from modelyard.tasks.base import Uploads
from modelyard.tasks.folders import FolderTask, freeze_batch_statistics, require_same_classes
from modelyard.tasks.image_classification import PIXELS, read_image
from modelyard.tasks.language_models import PretrainedModel
from modelyard.tasks.own_network import plain_module

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from modelyard.data.dataset import DatasetInfo

MAX_PIXELS = 64_000_000
"""A larger picture is refused before it is unpacked."""
_PLAIN = {"image_mean": [0.5], "image_std": [0.5]}


class VisionTask(FolderTask, ABC):
    """A task whose model of transformers looks at pictures of one size, (C, H, W) uint8 pixels."""

    uploads: ClassVar[Uploads] = "pictures"
    format: ClassVar[str]
    """The format of dataset it is trained on."""

    def check(self, info: DatasetInfo) -> None:
        if info.format != self.format:
            raise DataError(
                f"task {self.kind} needs a dataset of {self.format}, this one holds {info.format}",
                f"prepare one with source.kind `{self.format}`",
            )
        if not info.classes:
            raise DataError("the dataset names no class", "prepare it again with `modelyard data prepare`")
        channels = image_shape(info)[0]
        if isinstance(self.model, PretrainedModel) and channels != 3:
            raise ConfigError(
                f"task.model.pretrained: the dataset's pictures have {channels} channel, such models take 3",
                f"prepare the dataset with {self.format}.channels=3",
            )

    def build(self, info: DatasetInfo, dataset_folder: Path | None) -> nn.Module:
        self.check(info)
        names = dict(enumerate(info.classes))
        labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
        if isinstance(self.model, PretrainedModel):
            folder = self.model.folder()
            model: Any = self._from_folder(folder, ignore_mismatched_sizes=True, **labels)
            self._check_kind(model)
            means = _preprocessing(folder)
        else:
            model, means = self._from_scratch(info, labels), _PLAIN
        for name, values in means.items():
            setattr(model.config, name, values)
        self._remember(model, info)
        built: nn.Module = model
        return built

    def _from_scratch(self, info: DatasetInfo, labels: dict[str, Any]) -> nn.Module:
        """A new model of the sizes in `self.model`."""
        raise NotImplementedError

    def _check_kind(self, model: nn.Module) -> None:
        """Refuse a folder whose model answers in another way than this task reads."""

    def _remember(self, model: nn.Module, info: DatasetInfo) -> None:
        freeze_batch_statistics(model)
        remembering: Any = model
        remembering.image_shape = image_shape(info)

    def check_saved(self, folder: Path, trained: DatasetInfo, info: DatasetInfo, dataset_folder: Path) -> None:
        super().check_saved(folder, trained, info, dataset_folder)
        require_same_classes(trained, info)
        if image_shape(trained) != image_shape(info):
            raise DataError(
                f"images are {image_shape(info)}, the model takes {image_shape(trained)}",
                "prepare the dataset with the same image size",
            )

    def flops_per_row(self, model: nn.Module) -> float:
        """Multiply-adds of convolutions and dense layers, counted as two each, forward and backward."""
        from modelyard.tasks.image_models import forward_flops

        net: Any = plain_module(model)
        if (known := getattr(net, "_flops", None)) is None:
            known = net._flops = 3 * forward_flops(_OnPixels(net).module, net.image_shape)
        return float(known)

    def parse_input(self, text: str) -> Any:
        return read_image(text)


class _OnPixels:
    """A model that takes uint8 pixels, as `forward_flops` asks it."""

    def __init__(self, net: Any) -> None:
        from torch import nn

        class Asked(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def forward(self, pixels: Tensor) -> Any:
                return net(pixel_values=normalise(pixels, net))

        self.module = Asked()


class Picture(NamedTuple):
    """A picture as it came, and as the model sees it."""

    width: int
    height: int
    pixels: np.ndarray
    """(C, H, W) uint8 of the model's shape."""


def image_shape(info: DatasetInfo) -> tuple[int, ...]:
    """(channels, height, width) of the pictures of a dataset.

    Raises:
        DataError: it has none.
    """
    shapes = {column.name: column.shape for column in info.columns}
    if len(shapes.get(PIXELS, ())) != 3:
        raise DataError(
            f"a dataset of pictures needs the column {PIXELS!r} (channels, height, width), "
            f"this one has {', '.join(sorted(shapes)) or 'none'}",
            "prepare it again with `modelyard data prepare`",
        )
    return shapes[PIXELS]


def normalise(pixels: Tensor, model: nn.Module) -> Tensor:
    """uint8 pixels (B, C, H, W) as the model wants them, in the dtype of its weights."""
    import torch

    net = plain_module(model)
    mean, std = (
        torch.tensor(getattr(net.config, name), device=pixels.device).view(1, -1, 1, 1)
        for name in ("image_mean", "image_std")
    )
    return ((pixels.float() / 255 - mean) / std).to(next(net.parameters()).dtype)


def picture(value: Any, shape: Sequence[int]) -> Picture:
    """An input, resized and in the channels the model takes.

    It may be an array (C, H, W), (H, W) or (H, W, 3) uint8, the bytes of an image file, or these in base64.

    Raises:
        InputError: it is no picture, or too large a one.
    """
    from PIL.Image import Resampling

    opened = open_picture(value)
    channels, height, width = shape
    fitted = opened.convert("L" if channels == 1 else "RGB").resize((width, height), Resampling.BILINEAR)
    pixels = np.asarray(fitted, np.uint8)
    return Picture(*opened.size, pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0))


def open_picture(value: Any) -> Image:
    """An input of `picture` in its own size.

    Raises:
        InputError: it is no picture, or too large a one.
    """
    from PIL.Image import fromarray

    value = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if isinstance(value, bytes | str):
        return _opened(value)
    array = np.asarray(value)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or array.size == 0 or (array.ndim == 3 and array.shape[2] != 3):
        raise InputError(f"an input of the shape {np.shape(value)} is no picture", "give (channels, height, width)")
    if array.dtype != np.uint8 and not (
        np.issubdtype(array.dtype, np.integer) and 0 <= array.min() <= array.max() < 256
    ):
        raise InputError(f"a picture holds {array.dtype} numbers", "give whole numbers from 0 to 255 (uint8)")
    return fromarray(array.astype(np.uint8))


def colour(number: int) -> tuple[int, int, int]:
    """The colour of a class in drawings, as matplotlib's qualitative map `tab20` has it."""
    from matplotlib import colormaps

    red, green, blue, _ = colormaps["tab20"](number % 20, bytes=True)
    return int(red), int(green), int(blue)


def _opened(value: bytes | str) -> Image:
    import PIL.Image

    try:
        data = base64.b64decode(value.rpartition(",")[2], validate=True) if isinstance(value, str) else value
        found = PIL.Image.open(io.BytesIO(data))
        if found.width * found.height > MAX_PIXELS:
            raise InputError(f"a picture of {found.width} x {found.height} pixels is too large", "make it smaller")
        found.load()
    except (binascii.Error, OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
        raise InputError("an input is no picture", "give an image file in base64") from None
    return found


def stacked(pictures: Sequence[Picture]) -> Tensor:
    """The pixels of pictures, (B, C, H, W) uint8."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.stack([one.pixels for one in pictures])))


def pixel_tensor(rows: Mapping[str, np.ndarray]) -> Tensor:
    """The column of pixels as a tensor."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(rows[PIXELS]))


def _preprocessing(folder: Path) -> dict[str, list[float]]:
    """Mean and deviation that a folder's model was trained with; those of ImageNet when it does not say."""
    plain = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    for name in ("preprocessor_config.json", "config.json"):
        if (folder / name).is_file():
            given = json.loads((folder / name).read_text(encoding="utf-8"))
            found = {key: [float(value) for value in given[key]] for key in plain if given.get(key)}
            if found.keys() == plain.keys():
                return found
    return plain
