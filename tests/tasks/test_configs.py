"""The configs that are shipped can be read, and every dataset they train on can be prepared by another of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelyard.config import load
from modelyard.data.config import PrepareConfig
from modelyard.tasks import TaskConfig
from modelyard.training import TrainConfig
from modelyard.training.evaluation import EvaluateConfig

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
PREPARED = sorted(path for path in CONFIGS.glob("*.yaml") if "\nsource:" in path.read_text())
TRAINED = sorted(path for path in CONFIGS.glob("*.yaml") if "\ntask:" in path.read_text())


@pytest.mark.parametrize("path", PREPARED, ids=lambda path: path.stem)
def test_a_preparation_can_be_read(path: Path) -> None:
    assert load(PrepareConfig, path).name


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_a_training_can_be_read_and_its_dataset_is_known(path: Path) -> None:
    config = load(TrainConfig, path)
    known = {load(PrepareConfig, other).name for other in PREPARED}
    assert config.dataset.removeprefix("datasets:/") in known


def test_the_evaluation_can_be_read() -> None:
    assert load(EvaluateConfig, CONFIGS / "evaluate_tiny_gpt.yaml").split == "test"


def test_every_task_that_starts_from_data_has_a_config() -> None:
    from typing import get_args

    (union, *_) = get_args(TaskConfig)
    kinds = {task.model_fields["kind"].default for task in get_args(union)}
    assert kinds - {"refined"} == {load(TrainConfig, path).task.kind for path in TRAINED}


def test_the_smallest_config_is_the_line() -> None:
    sizes = {path.stem: len(path.read_text()) for path in TRAINED}
    assert min(sizes, key=lambda name: sizes[name]) == "points"
