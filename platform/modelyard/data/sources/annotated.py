"""Images with boxes, and images with masks."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from modelyard.artifacts import filesystem
from modelyard.data.config import BoxConfig, BoxedImages, CocoImages, MaskConfig, MaskedImages
from modelyard.data.sources import Example, Part, images, manifests, paths, plan, read
from modelyard.errors import DataError

IGNORED = 255
"""What stands in a prepared mask where no class counts."""
_IMAGES_PER_PART = 64
_SLACK = 1.0
"""Pixels by which annotators' boxes may stand over the edge; they are cut off."""


@plan.register
def plan_boxed(source: BoxedImages) -> list[Part]:
    """Some lines of a file a part."""
    return manifests.plan_lines(source.paths)


@read.register
def read_boxed(source: BoxedImages, part: Part, section: BoxConfig) -> Iterator[Example]:
    """The images of some lines with their boxes.

    Raises:
        DataError: an image is missing, or a box is empty, outside of its image or without a class.
    """
    for row in manifests.read_lines(part):
        uri = row.file(source.image_column)
        boxes, labels = row.get(source.boxes_column), row.get(source.labels_column)
        yield _boxed(uri, boxes, labels, section, row.split(source.split_column), row.where)


@plan.register
def plan_coco(source: CocoImages) -> list[Part]:
    """Some images a part."""
    count = len(_coco(source.path).images)
    starts = range(0, count, _IMAGES_PER_PART)
    return [Part(source.path, start, min(start + _IMAGES_PER_PART, count)) for start in starts]


@read.register
def read_coco(source: CocoImages, part: Part, section: BoxConfig) -> Iterator[Example]:
    """Some of the images with their boxes, in the order of the file.

    Raises:
        DataError: as for `boxes`, or a box belongs to an unknown class.
    """
    found = _coco(source.path)
    for image in found.images[part.start : part.stop]:
        where = f"{source.path}, image {image['id']}"
        uri = manifests.existing(f"{source.images.rstrip('/')}/{image['file_name']}", where)
        boxes, labels = [], []
        for box, category in found.boxes.get(image["id"], []):
            if category not in found.categories:
                raise DataError(f"{where}: a box is of category {category}, which `categories` does not name")
            x, y, width, height = box
            boxes.append([x, y, x + width, y + height])
            labels.append(found.categories[category])
        yield _boxed(uri, boxes, labels, section, "", where)


class _Coco(NamedTuple):
    images: list[dict[str, Any]]
    boxes: dict[Any, list[tuple[list[float], Any]]]
    """(x, y, width, height) and category, by image."""
    categories: dict[Any, str]


def _coco(uri: str) -> _Coco:
    manifests.existing(uri, "source.path")
    fs, path = filesystem.resolve(uri)
    info = fs.get_file_info(path)
    return _parsed_coco(uri, info.size, info.mtime_ns)


@functools.lru_cache(maxsize=2)
def _parsed_coco(uri: str, size: int, changed_ns: int) -> _Coco:
    """Parsed once a process and version of the file: each part of it asks for it."""
    fs, path = filesystem.resolve(uri)
    try:
        record = json.loads(filesystem.read_bytes(fs, path))
        categories = {one["id"]: str(one["name"]) for one in record["categories"]}
        pictures = [{"id": one["id"], "file_name": str(one["file_name"])} for one in record["images"]]
        boxes: dict[Any, list[tuple[list[float], Any]]] = {}
        for one in record["annotations"]:
            if not one.get("iscrowd"):
                x, y, width, height = map(float, one["bbox"])
                boxes.setdefault(one["image_id"], []).append(([x, y, width, height], one["category_id"]))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{uri} is no COCO file: {type(error).__name__}: {error}", "check source.path") from error
    unknown = sorted(set(map(str, boxes)) - {str(one["id"]) for one in pictures})
    if unknown:
        raise DataError(f"{uri}: a box belongs to image {unknown[0]}, which `images` does not name")
    return _Coco(pictures, boxes, categories)


def _boxed(uri: str, boxes: Any, labels: Any, section: BoxConfig, split: str, where: str) -> Example:
    opened = _open(uri)
    if opened is None:
        return Example(None, split=split)
    numbers = check_boxes(boxes, labels, opened.size, section.max_boxes, where)
    padded = np.zeros((section.max_boxes, 4), np.float32)
    padded[: len(numbers)] = centred(numbers, opened.size)
    columns: dict[str, Any] = {"pixels": images.fitted(opened, section), "boxes": padded}
    return Example(columns, tuple(map(str, labels)), split)


def check_boxes(boxes: Any, labels: Any, size: tuple[int, int], most: int, where: str) -> npt.NDArray[np.float64]:
    """Boxes as corners (n, 4), within an image of `size` (width, height) pixels.

    Raises:
        DataError: one is empty, outside of the image, or no four finite numbers; or they are too many, or not as many
            as the labels.
    """
    try:
        numbers = np.asarray(boxes, np.float64).reshape(-1, 4) if len(boxes) else np.zeros((0, 4))
        if len(numbers) != len(boxes):
            raise ValueError
    except (TypeError, ValueError):
        raise DataError(f"{where}: boxes are no list of [x0, y0, x1, y1]: {str(boxes)[:80]}") from None
    if not isinstance(labels, list | tuple) or len(labels) != len(numbers):
        held = len(labels) if isinstance(labels, list | tuple) else "no list of"
        raise DataError(f"{where}: {len(numbers)} boxes, but {held} labels", "give each box its class")
    if len(numbers) > most:
        raise DataError(f"{where}: {len(numbers)} boxes, more than boxes.max_boxes={most}", "raise boxes.max_boxes")
    limits = np.array([*size, *size], np.float64)
    for box in numbers:
        shown = "[" + ", ".join(f"{value:g}" for value in box) + "]"
        if not np.isfinite(box).all():
            raise DataError(f"{where}: box {shown} holds a number that is not finite", "correct it or leave it out")
        if (box < -_SLACK).any() or (box > limits + _SLACK).any():
            raise DataError(
                f"{where}: box {shown} lies outside of its image of {size[0]} x {size[1]} pixels",
                "boxes are [x0, y0, x1, y1] in pixels; correct it or leave it out",
            )
        if not (np.minimum(box, limits)[2:] > np.maximum(box, 0)[:2]).all():
            raise DataError(f"{where}: box {shown} is empty", "boxes are [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
    return np.clip(numbers, 0, limits)


def centred(corners: npt.NDArray[np.float64], size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Corners (n, 4) in pixels as centre x, centre y, width and height, shares of an image of (width, height)."""
    low, high = corners[:, :2] / size, corners[:, 2:] / size
    return np.concatenate([(low + high) / 2, high - low], axis=1).astype(np.float32)


@plan.register
def plan_masked(source: MaskedImages) -> list[Part]:
    """One part per image, each with its mask."""
    patterns = [f"*{variant}" for suffix in images.SUFFIXES for variant in (suffix, suffix.upper())]
    pictures = paths.find_files([source.images], patterns)
    masks = {_stem(file.uri, source.masks) for file in paths.find_files([source.masks], ["*.png", "*.PNG"])}
    for file in pictures:
        stem = _stem(file.uri, source.images)
        if stem not in masks:
            raise DataError(f"{file.uri} has no mask {source.masks.rstrip('/')}/{stem}.png", "add it")
        if source.split_folders and "/" not in stem:
            raise DataError(f"{file.uri} lies in no folder of a split", "set source.split_folders to false, or move it")
    return [Part(file.uri) for file in pictures]


@read.register
def read_masked(source: MaskedImages, part: Part, section: MaskConfig) -> Iterator[Example]:
    """One image with its mask.

    Raises:
        DataError: the mask is of another size, or holds a number that is no class.
    """
    stem = _stem(part.uri, source.images)
    split = stem.partition("/")[0] if source.split_folders else ""
    opened = _open(part.uri)
    uri = f"{source.masks.partition('?')[0].rstrip('/')}/{stem}.png"
    mask = _open(manifests.existing(uri, part.uri) + _query(source.masks))
    if opened is None or mask is None:
        yield Example(None, split=split)
        return
    if opened.size != mask.size:
        sizes = " and ".join(f"{width} x {height}" for width, height in (opened.size, mask.size))
        raise DataError(f"{part.uri} and its mask {uri} are {sizes} pixels", "a mask is as large as its image")
    if mask.mode not in ("L", "P", "1"):
        raise DataError(f"{uri} is a {mask.mode} picture", "save masks as grey or palette PNG with class numbers")
    if section.height is not None and section.width is not None:
        mask = mask.resize((section.width, section.height), 0)  # nearest
    numbers = check_classes(np.asarray(mask, np.uint8), source, uri)
    yield Example({"pixels": images.fitted(opened, section), "mask": numbers}, split=split)


def check_classes(mask: npt.NDArray[np.uint8], source: MaskedImages, where: str) -> npt.NDArray[np.uint8]:
    """The mask with `IGNORED` for the pixels that do not count.

    Raises:
        DataError: a number is no class.
    """
    skipped = np.zeros(mask.shape, np.bool_) if source.ignored is None else mask == source.ignored
    seen = np.unique(mask[~skipped])
    if seen.size and seen.max() >= len(source.classes):
        raise DataError(
            f"{where} holds the number {seen.max()}, but source.classes names only 0..{len(source.classes) - 1}",
            "name the class, or set source.ignored to this number",
        )
    return np.where(skipped, np.uint8(IGNORED), mask)


def _open(uri: str) -> Any:
    """The image, decoded; None when it is none."""
    from PIL import Image

    fs, path = filesystem.resolve(uri)
    try:
        picture = Image.open(io.BytesIO(filesystem.read_bytes(fs, path)))
        picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return picture


def _stem(uri: str, root: str) -> str:
    """Path below the root, without the suffix."""
    return uri.partition("?")[0].removeprefix(root.partition("?")[0].rstrip("/")).lstrip("/").rpartition(".")[0]


def _query(uri: str) -> str:
    return "?" + uri.partition("?")[2] if "?" in uri else ""
