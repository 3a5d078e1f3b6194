"""From annotated images and recordings to shards: read, deduplicate, split, number the names, write."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from modelyard.data import deduplication, execution, selection, sources
from modelyard.data.cleaning import Verdict
from modelyard.data.config import MaskedImages, PrepareConfig
from modelyard.data.dataset import Column, DatasetInfo
from modelyard.data.progress import OnProgress, Progress, finished
from modelyard.data.selection import Chosen
from modelyard.data.shards import SplitWriters
from modelyard.data.sources import Example, Part
from modelyard.errors import DataError

PADDING = -1
"""What fills a column of numbers of names behind the last."""


class Form(NamedTuple):
    """How the rows of a format look."""

    format: Literal["boxes", "masks", "speech"]
    columns: tuple[tuple[str, str], ...]
    """Name and dtype of the arrays that a source gives."""
    names: tuple[str, int] | None
    """The column of numbers of names and its length, if there is one."""


def form(config: PrepareConfig) -> tuple[Form, Any]:
    """The form of the rows that are asked for, and their section of the config."""
    if config.boxes is not None:
        columns = (("pixels", "uint8"), ("boxes", "float32"))
        return Form("boxes", columns, ("labels", config.boxes.max_boxes)), config.boxes
    if config.masks is not None:
        return Form("masks", (("pixels", "uint8"), ("mask", "uint8")), None), config.masks
    assert config.speech is not None
    columns = (("samples", "int16"), ("length", "int32"))
    return Form("speech", columns, ("text", config.speech.max_characters)), config.speech


def prepare_examples(
    config: PrepareConfig, parts: Sequence[Part], folder: Path, report: OnProgress, num_blocks: int | None
) -> DatasetInfo:
    """Write the shards of annotated images or recordings into `folder`; equal rows stay once, the lowest id.

    Raises:
        DataError: nothing is left, a split is empty, or the images differ in size and none is configured.
    """
    shape, section = form(config)
    with execution.ray_data() as data:
        to_tables = partial(
            _to_tables, source=config.source, section=section, names=[name for name, _ in shape.columns]
        )
        examples = execution.read_parts(data, parts, to_tables, num_blocks)
        chosen = selection.choose(examples, config, None, report)
        names, shapes = _survey(examples, chosen, shape)
        if isinstance(config.source, MaskedImages):
            names = config.source.classes
        columns = _columns(shape, shapes)
        rows = _write(examples, chosen, (shape, columns, names), config, folder, report)
    return DatasetInfo(
        format=shape.format,
        columns=columns,
        splits=rows,
        classes=names,
        sample_rate=config.speech.sample_rate if config.speech is not None else None,
        documents=chosen.counts,
    )


def _to_tables(parts: Iterable[tuple[int, Part]], *, source: Any, section: Any, names: Sequence[str]) -> Iterator[Any]:
    """Worker: examples with their verdicts, digests, names and arrays."""
    items = execution.number_items(parts, partial(sources.read, source, section=section))
    for batch in execution.in_batches(items, _size):
        examples = [found if isinstance(found, Example) else Example(None) for _, _, found in batch]
        verdicts = [
            Verdict.UNREADABLE if verdict is Verdict.KEPT and example.columns is None else verdict
            for (_, verdict, _), example in zip(batch, examples, strict=True)
        ]
        arrays = {name: [_array(example, name) for example in examples] for name in names}
        columns = {
            name: pa.array([array.tobytes() for array in found], pa.large_binary()) for name, found in arrays.items()
        }
        shapes = {f"{name}_shape": pa.array([list(a.shape) for a in found]) for name, found in arrays.items()}
        yield pa.table(
            {
                **execution.heads(batch, verdicts),
                "digest": execution.fixed_lists(deduplication.content_digests([*map(_content, examples)])),
                "split": pa.array([example.split for example in examples], pa.string()),
                "names": pa.array([list(example.names) for example in examples], pa.list_(pa.string())),
                **columns,
                **{name: found.cast(pa.list_(pa.int64())) for name, found in shapes.items()},
            }
        )


def _array(example: Example, name: str) -> npt.NDArray[Any]:
    return np.zeros(0, np.uint8) if example.columns is None else np.asarray(example.columns[name], order="C")


def _content(example: Example) -> bytes:
    """What makes two examples equal: what is seen or heard, and what is said of it."""
    state = hashlib.blake2b("\0".join(example.names).encode())
    for name, array in sorted((example.columns or {}).items()):
        state.update(f"{name}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return state.digest()


def _size(content: Any) -> int:
    columns = getattr(content, "columns", None) or {}
    return 256 + sum(int(array.nbytes) for array in columns.values())


def _survey(examples: Any, chosen: Chosen, shape: Form) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """Driver: the names, sorted (as numbers when they are), and the one shape of each column."""
    names: set[str] = set()
    shapes: dict[str, set[tuple[int, ...]]] = {name: set() for name, _ in shape.columns}
    for table in execution.tables(examples, ["id", "names", *(f"{name}_shape" for name in shapes)]):
        stays, _ = chosen.split_codes(table["id"].to_numpy())
        kept = table.filter(pa.array(stays))
        names.update(name for row in kept["names"].to_pylist() for name in row)
        for name, found in shapes.items():
            found.update(map(tuple, kept[f"{name}_shape"].to_pylist()))
    if len(shapes.get("pixels", ())) > 1:
        sizes = sorted(f"{width}x{height}" for _, height, width in shapes["pixels"])
        raise DataError(
            f"the images have {len(sizes)} different sizes: {', '.join(sizes[:5])}",
            f"set {shape.format}.height and {shape.format}.width, and they are resized",
        )
    return selection.ordered(names), {name: found.pop() for name, found in shapes.items()}


def _columns(shape: Form, shapes: dict[str, tuple[int, ...]]) -> tuple[Column, ...]:
    plain = tuple(Column(name=name, dtype=dtype, shape=shapes[name]) for name, dtype in shape.columns)
    if shape.names is None:
        return plain
    name, length = shape.names
    return (*plain, Column(name=name, dtype="int16", shape=(length,)))


def _write(
    examples: Any,
    chosen: Chosen,
    form: tuple[Form, tuple[Column, ...], tuple[str, ...]],
    config: PrepareConfig,
    folder: Path,
    report: OnProgress,
) -> dict[str, int]:
    shape, columns, names = form
    writers = SplitWriters(folder, list(config.splits.shares()), columns, config.rows_per_shard)
    codes = {name: code for code, name in enumerate(names)}
    done = 0
    for table in execution.tables(examples):
        stays, places = chosen.split_codes(table["id"].to_numpy())
        kept = table.filter(pa.array(stays))
        rows = {
            column.name: np.frombuffer(b"".join(kept[column.name].to_pylist()), column.dtype).reshape(-1, *column.shape)
            for column in columns[: len(shape.columns)]
        }
        if shape.names is not None:
            rows[shape.names[0]] = _numbered(kept["names"].to_pylist(), codes, shape.names[1])
        writers.write(rows, places)
        done += kept.num_rows
        if done < len(chosen.ids):
            report(Progress("pack", done, len(chosen.ids), {}))
    counts = writers.close()
    report(finished("pack", classes=len(names), **{f"{name}_rows": count for name, count in counts.items()}))
    return counts


def _numbered(rows: Sequence[Sequence[str]], codes: dict[str, int], length: int) -> npt.NDArray[np.int16]:
    found = np.full((len(rows), length), PADDING, np.int16)
    for row, names in enumerate(rows):
        found[row, : len(names)] = [codes[name] for name in names]
    return found
