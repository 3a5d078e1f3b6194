"""From an image source to shards of pixels and labels: read, decode, deduplicate, split, write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from modelyard.data import deduplication, execution, selection, sources
from modelyard.data.cleaning import Verdict
from modelyard.data.config import ImageConfig, PrepareConfig
from modelyard.data.dataset import Column, DatasetInfo
from modelyard.data.progress import OnProgress, Progress, finished
from modelyard.data.selection import Chosen
from modelyard.data.shards import SplitWriters
from modelyard.data.sources import Part
from modelyard.errors import DataError

PIXELS = "pixels"
LABEL = "label"


def prepare_images(
    config: PrepareConfig,
    images: ImageConfig,
    parts: Sequence[Part],
    folder: Path,
    report: OnProgress,
    num_blocks: int | None,
) -> DatasetInfo:
    """Write the shards of an image source into `folder`; equal images stay once, the lowest id.

    Raises:
        DataError: nothing is left, a split is empty, or the images differ in size and none is configured.
    """
    with execution.ray_data() as data:
        to_tables = partial(_to_tables, source=config.source, images=images)
        pictures = execution.read_parts(data, parts, to_tables, num_blocks)
        chosen = selection.choose(pictures, config, None, report)
        classes, shape = _survey(pictures, chosen)
        columns = (Column(name=PIXELS, dtype="uint8", shape=shape), Column(name=LABEL, dtype="int64"))
        rows = _write(pictures, chosen, classes, columns, config, folder, report)
    return DatasetInfo(format="images", columns=columns, splits=rows, classes=classes, documents=chosen.counts)


def _to_tables(parts: Iterable[tuple[int, Part]], *, source: Any, images: ImageConfig) -> Iterator[Any]:
    """Worker: decoded images with their verdicts, digests and labels."""
    items = execution.number_items(parts, partial(sources.read, source, images=images))
    for batch in execution.in_batches(items, _size):
        pixels = [_pixels(content) for _, _, content in batch]
        verdicts = [
            Verdict.UNREADABLE if verdict is Verdict.KEPT and found.size == 0 else verdict
            for (_, verdict, _), found in zip(batch, pixels, strict=True)
        ]
        contents = [repr(found.shape).encode() + found.tobytes() for found in pixels]
        yield pa.table(
            {
                **execution.heads(batch, verdicts),
                "digest": execution.fixed_lists(deduplication.content_digests(contents)),
                "label": pa.array([getattr(content, "label", "") for _, _, content in batch], pa.string()),
                "shape": execution.fixed_lists(np.array([found.shape for found in pixels], np.int32)),
                "pixels": pa.array([found.tobytes() for found in pixels], pa.large_binary()),
            }
        )


def _pixels(content: Any) -> npt.NDArray[np.uint8]:
    found = getattr(content, "pixels", None)
    return np.zeros((0, 0, 0), np.uint8) if found is None else found


def _size(content: Any) -> int:
    return _pixels(content).nbytes + 256


def _survey(pictures: Any, chosen: Chosen) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Driver: the classes, sorted (as numbers when they are), and the one shape of all images."""
    labels: set[str] = set()
    shapes: set[tuple[int, ...]] = set()
    for table in execution.tables(pictures, ["id", "label", "shape"]):
        stays, _ = chosen.split_codes(table["id"].to_numpy())
        labels.update(table["label"].filter(pa.array(stays)).to_pylist())
        shapes.update(map(tuple, execution.from_fixed_lists(table["shape"])[stays].tolist()))
    if len(shapes) > 1:
        sizes = sorted(f"{width}x{height}" for _, height, width in shapes)
        raise DataError(
            f"the images have {len(sizes)} different sizes: {', '.join(sizes[:5])}",
            "set images.height and images.width, and they are resized",
        )
    return selection.ordered(labels), shapes.pop()


def _write(
    pictures: Any,
    chosen: Chosen,
    classes: tuple[str, ...],
    columns: tuple[Column, ...],
    config: PrepareConfig,
    folder: Path,
    report: OnProgress,
) -> dict[str, int]:
    writers = SplitWriters(folder, list(config.splits.shares()), columns, config.rows_per_shard)
    codes = {name: code for code, name in enumerate(classes)}
    done = 0
    for table in execution.tables(pictures, ["id", "label", "pixels"]):
        stays, splits = chosen.split_codes(table["id"].to_numpy())
        kept = table.filter(pa.array(stays))
        data = b"".join(kept["pixels"].to_pylist())
        pixels = np.frombuffer(data, np.uint8).reshape(-1, *columns[0].shape)
        labels = np.array([codes[label] for label in kept["label"].to_pylist()], np.int64)
        writers.write({PIXELS: pixels, LABEL: labels}, splits)
        done += len(labels)
        if done < len(chosen.ids):
            report(Progress("pack", done, len(chosen.ids), {}))
    rows = writers.close()
    report(finished("pack", classes=len(classes), **{f"{name}_rows": count for name, count in rows.items()}))
    return rows
