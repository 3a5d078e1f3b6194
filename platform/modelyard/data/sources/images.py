"""Images with labels: scikit-learn's digits, a folder per class, Parquet."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from modelyard.artifacts import filesystem
from modelyard.data.config import ImageConfig, ImageFolder, ImageParquet, SklearnDigits
from modelyard.data.sources import Part, Picture, parquet, paths, plan, read
from modelyard.errors import DataError
from modelyard.extras import optional

Pixels = npt.NDArray[np.uint8]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_DIGITS_WHITE = 16.0


@plan.register
def plan_digits(source: SklearnDigits) -> list[Part]:
    """One part: they are few."""
    optional("sklearn", "scikit-learn", "examples")
    return [Part("digits")]


@read.register
def read_digits(source: SklearnDigits, part: Part, images: ImageConfig) -> Iterator[Picture]:
    """The digits as grey images, white = 255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for picture, label in zip(digits.images, digits.target, strict=True):
        yield Picture(from_numbers(picture, _DIGITS_WHITE, images), str(label))


@plan.register
def plan_folder(source: ImageFolder) -> list[Part]:
    """One part per image file, class by class."""
    root = source.path.partition("?")[0].rstrip("/")
    patterns = [f"*{variant}" for suffix in SUFFIXES for variant in (suffix, suffix.upper())]
    parts = [Part(file.uri) for file in paths.find_files([source.path], patterns)]
    loose = [part.uri for part in parts if "/" not in _below(part.uri, root)]
    if loose:
        raise DataError(f"{loose[0]} lies in no class folder", "put each image into a folder named after its class")
    return parts


@read.register
def read_folder(source: ImageFolder, part: Part, images: ImageConfig) -> Iterator[Picture]:
    """One image; its class is the first folder below the source."""
    label = _below(part.uri, source.path.partition("?")[0].rstrip("/")).partition("/")[0]
    fs, path = filesystem.resolve(part.uri)
    yield Picture(from_bytes(filesystem.read_bytes(fs, path), images), label)


@plan.register
def plan_image_parquet(source: ImageParquet) -> list[Part]:
    """One part per row group."""
    files = [file.uri for file in paths.find_files(source.paths, ["*.parquet"])]
    columns = {source.image_column: lambda kind: True, source.label_column: lambda kind: True}
    return parquet.plan_row_groups(files, columns, "source.image_column and source.label_column")


@read.register
def read_image_parquet(source: ImageParquet, part: Part, images: ImageConfig) -> Iterator[Picture]:
    """The images of one row group: encoded bytes, or numbers."""
    for table in parquet.read_row_group(part, [source.image_column, source.label_column]):
        for image, label in zip(table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True):
            if isinstance(image, dict):
                image = image.get("bytes")
            pixels = None
            if isinstance(image, bytes):
                pixels = from_bytes(image, images)
            elif image is not None:
                pixels = from_numbers(_numbers(image, part), source.pixel_max, images)
            yield Picture(pixels, str(label))


def from_bytes(data: bytes, images: ImageConfig) -> Pixels | None:
    """Decode an image file; None when it is none."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            return fitted(picture, images)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def from_numbers(numbers: npt.NDArray[Any], white: float, images: ImageConfig) -> Pixels | None:
    """Pixels from numbers in 0..white: (height, width), (height, width, 1 or 3), or flat with a size configured."""
    from PIL import Image

    if numbers.ndim == 1 and images.height is not None and images.width is not None:
        if numbers.size % (images.height * images.width):
            return None
        numbers = numbers.reshape(images.height, images.width, -1)
    if numbers.ndim == 3 and numbers.shape[2] == 1:
        numbers = numbers[:, :, 0]
    if not (numbers.ndim == 2 or (numbers.ndim == 3 and numbers.shape[2] == 3)) or not np.isfinite(numbers).all():
        return None
    values = np.clip(np.rint(numbers * (255.0 / white)), 0, 255).astype(np.uint8)
    return fitted(Image.fromarray(values), images)


def fitted(picture: Any, images: ImageConfig) -> Pixels:
    """The pixels of a PIL image, in the size and channels that are configured."""
    from PIL import Image

    picture = picture.convert("L" if images.channels == 1 else "RGB")
    if images.height is not None and images.width is not None and picture.size != (images.width, images.height):
        picture = picture.resize((images.width, images.height), Image.Resampling.BILINEAR)
    values = np.asarray(picture, dtype=np.uint8)
    return np.ascontiguousarray(values[None] if values.ndim == 2 else values.transpose(2, 0, 1))


def _numbers(image: Any, part: Part) -> npt.NDArray[Any]:
    try:
        return np.asarray(image, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{part.uri}: the image column holds neither bytes nor arrays of numbers") from None


def _below(uri: str, root: str) -> str:
    return uri.partition("?")[0].removeprefix(root).lstrip("/")
