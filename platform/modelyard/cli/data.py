"""`modelyard data`: prepare a corpus, look into a dataset."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from modelyard.cli.options import config_options
from modelyard.config import Config
from modelyard.errors import ModelyardError

if TYPE_CHECKING:
    from modelyard.data.config import PrepareConfig
    from modelyard.data.dataset import Dataset
    from modelyard.data.progress import OnProgress, Progress

_STEP_WIDTH = 14
_SAMPLE_CHARACTERS = 300


@click.group()
def data() -> None:
    """Prepare and inspect datasets."""


def _config_type() -> type[Config]:
    from modelyard.data.config import PrepareConfig

    return PrepareConfig


@data.command("prepare")
@config_options(_config_type)
def prepare_command(config: PrepareConfig) -> None:
    """Turn a corpus into a registered dataset, as a config file says."""
    from modelyard.data.prepare import prepare

    version = prepare(config, on_progress=_printer())
    click.echo(f"{'dataset':<{_STEP_WIDTH}}{version.reference}")
    click.echo(f"{'digest':<{_STEP_WIDTH}}{version.digest}")


def _complete_reference(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from modelyard.artifacts import Registry

    try:
        known = [info.reference for info in Registry.from_settings().versions("dataset")]
    except ModelyardError:
        return []  # a shell cannot show the error, and the command itself will
    names = [*known, *(reference.removeprefix("datasets:/") for reference in known)]
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


@data.command("show")
@click.argument("ref", shell_complete=_complete_reference)
@click.option("--samples", type=click.IntRange(0, 100), default=3, show_default=True, help="Rows to show.")
def show_command(ref: str, samples: int) -> None:
    """Show a dataset (`datasets:/pydocs/1`, or `pydocs` for the newest): splits, counts, a few rows."""
    from modelyard.artifacts import Registry
    from modelyard.data.dataset import Dataset

    version, folder = Registry.from_settings().open(ref, "dataset")
    dataset = Dataset.open(folder)
    _show_lines(
        [
            ("dataset", version.reference + "".join(f" @{alias}" for alias in version.aliases)),
            ("digest", version.digest),
            ("created", version.created_at),
            ("format", dataset.info.format),
            *_describe(dataset),
        ]
    )
    _show_samples(dataset, samples)


def _printer() -> OnProgress:
    """Prints each step when it is over; on a terminal also how far the current one is."""
    terminal = sys.stdout.isatty()

    def show(progress: Progress) -> None:
        over = progress.done >= progress.total
        if over:
            counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in progress.counts.items())
            click.echo(("\r\x1b[K" if terminal else "") + f"{progress.step:<{_STEP_WIDTH}}{counts}")
        elif terminal:
            click.echo(f"\r{progress.step:<{_STEP_WIDTH}}{progress.done / progress.total:.0%}", nl=False)

    return show


def _describe(dataset: Dataset) -> list[tuple[str, str]]:
    info = dataset.info
    lines = []
    for name, rows in info.splits.items():
        tokens = f", {rows * info.block_tokens:,} tokens" if info.block_tokens else ""
        lines.append((f"  {name}", f"{rows:,} rows{tokens}"))
    if info.block_tokens is not None:
        lines += [("row", f"{info.block_tokens} tokens"), ("vocabulary", f"{info.vocab_size:,} tokens")]
    for column in info.columns:
        shape = "x".join(str(size) for size in column.shape) or "scalar"
        lines.append(("column", f"{column.name}: {column.dtype} {shape}"))
    if info.classes:
        shown = ", ".join(info.classes[:20]) + (" ..." if len(info.classes) > 20 else "")
        lines.append(("classes", f"{len(info.classes)}: {shown}"))
    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in info.documents.items())
    return [*lines, ("documents", counts)]


def _show_lines(lines: list[tuple[str, str]]) -> None:
    for name, value in lines:
        click.echo(f"{name:<{_STEP_WIDTH}}{value}")


def _show_samples(dataset: Dataset, samples: int) -> None:
    import numpy as np

    name = next(iter(dataset.info.splits))
    split = dataset.split(name)
    count = min(samples, split.num_rows)
    rows = split.read(np.arange(count, dtype=np.int64) * (split.num_rows // max(count, 1)))
    for index in range(count):
        click.echo(f"--- {name}, row {index * (split.num_rows // count)}")
        click.echo(_sample({column: values[index] for column, values in rows.items()}, dataset))


def _sample(row: dict[str, Any], dataset: Dataset) -> str:
    if dataset.info.format == "tokens":
        text = _decode(dataset, row["input_ids"].tolist())
        return text if len(text) <= _SAMPLE_CHARACTERS else text[:_SAMPLE_CHARACTERS] + " ..."
    if dataset.info.format != "images":
        return _fields(row, dataset)
    pixels = row["pixels"]
    lines = [f"label {dataset.info.classes[int(row['label'])]}, {pixels.min()}..{pixels.max()}"]
    if max(pixels.shape[1:]) <= 32:
        grey = pixels.mean(axis=0)
        lines += ["".join(" .:-=+*#%@"[int(value) * 10 // 256] * 2 for value in line) for line in grey]
    return "\n".join(lines)


def _fields(row: dict[str, Any], dataset: Dataset) -> str:
    """The columns of a row by name; tokens as text, labels and tags by their names."""
    import numpy as np

    names, lines = dataset.info.classes, []
    for column, value in row.items():
        shown = np.array2string(value, threshold=12, precision=4)
        if column == "input_ids":
            shown = _decode(dataset, value[: int(row["length"])].tolist())
        elif column == "label":
            shown = names[int(value)]
        elif column == "tags":
            shown = " ".join(names[tag] for tag in value.tolist() if tag >= 0)
        elif column == "text":  # spoken characters, -1 behind the last
            shown = "".join(names[character] for character in value.tolist() if character >= 0)
        elif column == "labels":
            shown = _boxes(row, names)
        elif column == "boxes":
            continue
        lines.append(f"{column}: {shown[:_SAMPLE_CHARACTERS]}")
    return "\n".join(lines)


def _boxes(row: dict[str, Any], names: Sequence[str]) -> str:
    """`cat at [14, 38, 32, 58]`: corners in pixels of the picture as it is stored."""
    height, width = row["pixels"].shape[1:]
    shown = []
    for label, (x, y, w, h) in zip(row["labels"].tolist(), row["boxes"].tolist(), strict=True):
        if label >= 0:
            corners = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
            shown.append(f"{names[label]} at {[round(corner) for corner in corners]}")
    return ", ".join(shown) or "none"


def _decode(dataset: Dataset, ids: list[int]) -> str:
    import tokenizers

    assert dataset.tokenizer_folder is not None, "a dataset of tokens has its tokenizer"
    path = dataset.tokenizer_folder / "tokenizer.json"
    return str(tokenizers.Tokenizer.from_file(str(path)).decode(ids, skip_special_tokens=False))
