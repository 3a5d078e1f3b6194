"""The model a recipe works on: a folder per step, each one complete and loadable."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelyard.artifacts import VersionInfo
from modelyard.artifacts.manifest import MANIFEST_NAME
from modelyard.data.dataset import Dataset
from modelyard.errors import ConfigError
from modelyard.tasks import Task, load_model, read_task
from modelyard.tasks.compact import COMPACT_FILE, Compact, read_compact
from modelyard.tasks.lora import ADAPTER_FOLDER
from modelyard.tasks.saving import TASK_FILE, write_task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from modelyard.compression.recipe import Recipe

_OWN_FILES = frozenset({TASK_FILE, COMPACT_FILE, MANIFEST_NAME, "config.json", "model.safetensors.index.json"})
_KEPT_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja"})
EXPORT_FOLDERS = {"onnx": "onnx", "openvino": "openvino", "gguf": "gguf", "torch_export": "torch_export"}
"""Where in a model folder the files of each export format are."""


@dataclass(frozen=True)
class Workspace:
    """What every step is given, and returns with another `folder`."""

    recipe: Recipe
    source: VersionInfo
    source_folder: Path
    folder: Path
    """The model as it is now; never written into once a step has returned it."""
    dataset: Dataset
    dataset_version: VersionInfo
    scratch: Path
    name: str
    """Under which the result, and what training leaves on the way, is registered."""
    notes: tuple[str, ...] = ()
    """What the steps have to say, a line each."""

    @property
    def task(self) -> Task:
        """The task of the model as it is now."""
        return read_task(self.folder)[0]

    def load(self) -> tuple[Task, nn.Module]:
        """The model as it is now, fp32 on the CPU in eval mode."""
        task, model = load_model(self.folder)
        return task, model.float()

    def new_folder(self, label: str) -> Path:
        """An empty folder for a step's result."""
        folder = self.scratch / f"{sum(1 for _ in self.scratch.iterdir()):03d}-{label}"
        folder.mkdir()
        return folder

    def moved(self, folder: Path, note: str = "") -> Workspace:
        """This, with a step's result."""
        return replace(self, folder=folder, notes=(*self.notes, note) if note else self.notes)

    def save(self, model: nn.Module, label: str, task: Task | None = None, note: str = "") -> Workspace:
        """Save a plain fp32 model as the result of a step."""
        folder = self.new_folder(label)
        save_plain(model, folder, self.folder, self.dataset.folder, task or self.task)
        return self.moved(folder, note)

    def calibration_batches(self, rows: int, batch_size: int = 8) -> Iterator[dict[str, Tensor]]:
        """The first rows of the calibration split, as the task's tensors."""
        return batches(self.task, self.dataset, self.recipe.calibration_split, rows, batch_size)


def batches(
    task: Task, dataset: Dataset, split: str, rows: int | None, batch_size: int = 8
) -> Iterator[dict[str, Tensor]]:
    """The first `rows` rows of a split (all of them by default) as the task's tensors on the CPU."""
    opened = dataset.split(split)
    total = opened.num_rows if rows is None else min(rows, opened.num_rows)
    for start in range(0, total, batch_size):
        ids = np.arange(start, min(start + batch_size, total), dtype=np.int64)
        yield task.collate(opened.read(ids), "cpu")


def save_plain(model: nn.Module, folder: Path, beside: Path, dataset_folder: Path, task: Task) -> None:
    """Save a model with fp32 tensors of its own shapes; tokenizer and description are those of the folder `beside`."""
    info = read_task(beside)[1]
    task.save(model, folder, dataset_folder)
    copy_beside(beside, folder)
    write_task(folder, task, info)


def copy_beside(source: Path, target: Path) -> None:
    """Copy what belongs to a model but not to its weights: tokenizer, chat template, generation settings."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _KEPT_SUFFIXES and path.name not in _OWN_FILES:
            shutil.copyfile(path, target / path.name)


def require_plain(work: Workspace, step: str) -> None:
    """Refuse a step that changes weights after they were quantized or factorized, or beside an adapter.

    Raises:
        ConfigError: the order of the steps is wrong.
    """
    compact = read_compact(work.folder)
    if compact is not None:
        what = "quantized" if compact.quantized else "factorized"
        raise ConfigError(f"steps: {step} cannot follow, the model is {what} already", f"put {step} before it")
    if (work.folder / ADAPTER_FOLDER).is_dir():
        raise ConfigError(
            f"steps: {step} needs one set of weights, the model has a LoRA adapter beside its own",
            "put `kind: merge_lora` before it",
        )
    if exported := [name for name in EXPORT_FOLDERS.values() if (work.folder / name).is_dir()]:
        raise ConfigError(f"steps: {step} cannot follow the export {exported[0]}", "exports come last")


def matching(names: Collection[str], globs: Sequence[str]) -> set[str]:
    """The names that one of the globs matches."""
    return {name for name in names for glob in globs if fnmatch.fnmatchcase(name, glob)}


def prunable(model: nn.Module, skip: Sequence[str] = ()) -> dict[str, Any]:
    """Linear and convolution layers by name, but for the output layer of a language model and those to skip."""
    from torch import nn

    output = getattr(model, "get_output_embeddings", lambda: None)()
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module is not output
    }
    left_out = matching(found, skip)
    return {name: module for name, module in found.items() if name not in left_out}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def with_compact(folder: Path) -> Compact:
    """How the layers in `folder` are stored; of a plain folder nothing is special."""
    return read_compact(folder) or Compact()
