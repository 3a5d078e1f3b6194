"""Model folders: `task.json` beside the weights, tokenizers copied whole, pickles refused unread."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard.errors import IntegrityError, NotFoundError, UnsafeFileError

if TYPE_CHECKING:
    from torch import Tensor

    from modelyard.data.dataset import DatasetInfo
    from modelyard.tasks.base import Task

TASK_FILE = "task.json"
FORMAT_VERSION = 1
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


def read_info(dataset_folder: Path) -> DatasetInfo:
    """The `DatasetInfo` of a dataset artifact's folder.

    Raises:
        DataError: the folder is no dataset.
    """
    from modelyard.data.dataset import Dataset

    return Dataset.open(dataset_folder).info


def drop_aliases(model: Any, weights: dict[str, Tensor]) -> None:
    """Leave each tied weight of a model of transformers once in `weights`.

    By name: copies that were gathered no longer share memory.
    """
    for alias, source in model.all_tied_weights_keys.items():
        if source in weights:
            weights.pop(alias, None)


def write_task(folder: Path, task: Task, info: DatasetInfo) -> None:
    """Write `task.json`: the task's config and what it must know of its dataset."""
    record = {
        "format_version": FORMAT_VERSION,
        "task": task.model_dump(mode="json"),
        "dataset": info.model_dump(mode="json"),
    }
    (folder / TASK_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_task(folder: Path) -> dict[str, Any]:
    """The record in `task.json`: keys `task` and `dataset`, not yet validated.

    Raises:
        NotFoundError: there is no `task.json`.
        IntegrityError: it is not what `write_task` writes.
    """
    path = folder / TASK_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(
            f"{str(folder)!r} has no {TASK_FILE}, so it is no model folder of Modelyard",
            "give a folder that training wrote; a Hugging Face folder goes into `task.model.pretrained`",
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise IntegrityError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION or "task" not in record:
        raise IntegrityError(
            f"{str(path)!r} is not a task record of format {FORMAT_VERSION}",
            "it was written by another version of Modelyard, or edited",
        )
    return record


def require_safe_weights(folder: Path) -> None:
    """Pass when the folder holds safetensors; refuse pickled weights without opening them.

    Raises:
        NotFoundError: no folder, or no weights in it.
        UnsafeFileError: the only weights are pickles.
    """
    if not folder.is_dir():
        raise NotFoundError(f"model folder {str(folder)!r} does not exist", "check the path")
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if any(name.endswith(".safetensors") for name in names):
        return
    pickles = [name for name in names if Path(name).suffix in PICKLE_SUFFIXES]
    if pickles:
        raise UnsafeFileError(
            f"{str(folder)!r} holds its weights as a pickle ({', '.join(pickles)}), which can run code",
            "if you trust its author, convert it once on a machine you can lose: "
            'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained({str(folder)!r}).save_pretrained('converted')\"",
        )
    raise NotFoundError(f"{str(folder)!r} holds no *.safetensors file", "give the folder that has the weights in it")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files unchanged, so that text becomes the same tokens as in training."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in {".json", ".txt", ".model", ".jinja"}:
            shutil.copyfile(path, folder / path.name)
