"""A workspace without a registry, and the few figures that tests compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.compression.conftest import Folders

from modelyard.artifacts import VersionInfo
from modelyard.compression.recipe import Recipe
from modelyard.compression.workspace import Workspace
from modelyard.data.dataset import Dataset
from modelyard.tasks import load_model


def workspace(folders: Folders, scratch: Path, **recipe: Any) -> Workspace:
    """The model of `folders`, before the first step."""
    version = VersionInfo("model", "tiny", 1, "sha256:" + "0" * 64, (), {}, "", None)
    plain = {"dataset": "datasets:/tiny", "steps": [{"kind": "quantize"}], **recipe}
    scratch.mkdir(parents=True)
    return Workspace(
        recipe=Recipe.model_validate(plain),
        source=version,
        source_folder=folders.model,
        folder=folders.model,
        dataset=Dataset.open(folders.dataset),
        dataset_version=version,
        scratch=scratch,
        name="tiny-small",
    )


def quality(folder: Path, dataset: Path) -> dict[str, float]:
    """The task's metrics on the test split."""
    task, model = load_model(folder)
    split = Dataset.open(dataset).split("test")
    with torch.inference_mode():
        stats = task.statistics(model, task.collate(split.read(np.arange(split.num_rows)), "cpu"))
    return task.metrics({name: value.numpy() for name, value in stats.items()})


def weight_bytes(folder: Path) -> int:
    """Size of the weights on disk."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def parameters(folder: Path) -> int:
    """Numbers in the loaded model, shared ones once."""
    return sum(parameter.numel() for parameter in load_model(folder)[1].parameters())
