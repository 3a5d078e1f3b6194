"""Masks that are learned with the weights: how many, which, and on the training core."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.compression.conftest import Folders
from tests.compression.workspaces import quality, workspace
from torch import nn

from modelyard.artifacts import Registry
from modelyard.compression import Recipe, compress
from modelyard.compression.prune import prune, sparsity_after
from modelyard.compression.recipe import Prune
from modelyard.compression.workspace import prunable
from modelyard.data.dataset import Dataset
from modelyard.tasks import Refined, load_model, read_task
from modelyard.tasks.movement import Movement, learn_masks, masked_state

QUICK = {"rows": 8, "prompt_tokens": 8, "new_tokens": 8, "repeats": 1}


def density(module: Any) -> float:
    return float((module.weight != 0).float().mean())


def test_zeros_come_on_a_cubic_curve_between_warmup_and_cooldown() -> None:
    movement = Movement(layers=("x",), sparsity=0.8, warmup=0.2, cooldown=0.3)
    shares = [movement.sparsity_at(step, 100) for step in range(100)]
    assert shares[:21] == [0.0] * 21
    assert shares[45] == pytest.approx(0.8 * (1 - 0.5**3))
    assert shares[70:] == [pytest.approx(0.8)] * 30
    assert shares == sorted(shares)


def test_warmup_and_cooldown_leave_steps_to_prune_in() -> None:
    with pytest.raises(ValueError, match="no step is left"):
        Movement(layers=("x",), sparsity=0.5, warmup=0.6, cooldown=0.4)


def _one_layer(weight: list[float], sparsity: float = 0.5) -> Any:
    model: Any = nn.Sequential(nn.Linear(len(weight), 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([weight]))
    learn_masks(model, Movement(layers=("0",), sparsity=sparsity, warmup=0.0, cooldown=0.0))
    return model


def test_what_moves_towards_zero_goes_even_if_it_is_the_largest() -> None:
    model = _one_layer([5.0, 0.5, 4.0, 0.6])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pull = torch.tensor([1.0, -1.0, 1.0, -1.0])  # the gradient makes large weights smaller and small ones larger
    for _ in range(3):
        model(pull[None]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = masked_state(model.state_dict(), Movement(layers=("0",), sparsity=0.5))["0.weight"]
    assert (kept != 0).tolist() == [[False, True, False, True]]


def test_a_weight_that_went_comes_back_when_its_score_rises() -> None:
    model = _one_layer([1.0, 1.0])
    with torch.no_grad():
        model[0].movement_scores.copy_(torch.tensor([[1.0, 0.0]]))
    model.begin_step(99, 100)
    inputs = torch.tensor([[2.0, 3.0]])
    assert float(model(inputs)) == 2.0
    model(-inputs).sum().backward()  # descent would raise both weights
    assert model[0].weight.grad.tolist() == [[-2.0, 0.0]]
    assert model[0].movement_scores.grad.tolist() == [[-2.0, -3.0]]  # and both scores, of the one that is out too
    with torch.no_grad():
        model[0].movement_scores -= model[0].movement_scores.grad
    model.begin_step(99, 100)
    assert float(model(inputs)) == 3.0


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_language_model_is_trained_into_its_masks(language: Folders, tmp_path: Path, pattern: Any) -> None:
    layers = tuple(prunable(load_model(language.model)[1]))
    movement = {"layers": layers, "sparsity": 0.5, "pattern": pattern}
    plain = {"task": read_task(language.model)[0].model_dump(), "start": str(language.model), "movement": movement}
    task = Refined.model_validate(plain)
    opened = Dataset.open(language.dataset)
    torch.manual_seed(0)
    model: Any = task.build(opened.info, language.dataset).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    split, rng = opened.split("train"), np.random.default_rng(0)
    for step in range(60):
        model.begin_step(step, 60)
        rows = task.collate(split.read(rng.integers(split.num_rows, size=16)), "cpu")
        task.loss(model, rows).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    task.save(model, tmp_path / "saved", language.dataset)
    _, saved = load_model(tmp_path / "saved")
    assert "movement_scores" not in " ".join(saved.state_dict())
    for module in prunable(saved).values():
        assert density(module) == pytest.approx(0.5, abs=0.01)
    step = Prune.model_validate({"criterion": "l1", "pattern": pattern})
    at_once = prune(workspace(language, tmp_path / "s"), step).folder
    trained, untrained = (quality(folder, language.dataset)["loss"] for folder in (tmp_path / "saved", at_once))
    assert trained < untrained


def _training(**changes: Any) -> dict[str, Any]:
    optimizer = {"kind": "adamw", "learning_rate": 1e-3, "weight_decay": 0.0}
    return {"steps": 20, "global_batch_size": 16, "micro_batch_size": 8, "optimizer": optimizer, **changes}


@pytest.mark.ray
def test_masks_are_learned_on_the_training_core_by_two_workers(
    ray_cluster: str,
    language: Folders,
    registered: Callable[[Folders, str], tuple[str, str]],
    registry: Registry,
) -> None:
    model, dataset = registered(language, "tiny")
    step = {"kind": "prune", "criterion": "movement", "sparsity": 0.6, "training": _training(workers=2, steps=40)}
    recipe = {"name": "tiny-moved", "dataset": dataset, "steps": [step], "measuring": QUICK}
    done = compress(model, Recipe.model_validate(recipe))
    folder = registry.open(done.model)[1]
    _, pruned = load_model(folder)
    for module in prunable(pruned).values():
        assert density(module) == pytest.approx(0.4, abs=0.01)
    assert "60.0% of the weights of 14 layers are zero" in done.notes[-1]
    at_once = prune(workspace(language, Path(done.picture).parent / "s"), Prune(sparsity=0.6)).folder
    assert quality(folder, language.dataset)["loss"] < quality(at_once, language.dataset)["loss"]


@pytest.mark.ray
def test_each_round_of_a_schedule_is_a_run_of_the_training_core_and_zeros_stay(
    ray_cluster: str,
    language: Folders,
    registered: Callable[[Folders, str], tuple[str, str]],
    registry: Registry,
) -> None:
    model, dataset = registered(language, "tiny")
    step = {"kind": "prune", "sparsity": 0.7, "rounds": 3, "training": _training()}
    recipe = {"name": "tiny-rounds", "dataset": dataset, "steps": [step], "measuring": QUICK}
    done = compress(model, Recipe.model_validate(recipe))
    versions = sorted(version.version for version in registry.versions("model", "tiny-rounds-steps"))
    assert versions == [1, 2, 3, 4, 5, 6]  # pruned, trained, three times
    for number in (1, 2, 3):
        wanted = 1 - sparsity_after(number, 3, 0.7)
        for version in (2 * number - 1, 2 * number):
            _, stage = load_model(registry.open(f"models:/tiny-rounds-steps/{version}")[1])
            for module in prunable(stage).values():
                assert density(module) == pytest.approx(wanted, abs=0.01)
    losses = [
        quality(registry.open(f"models:/tiny-rounds-steps/{version}")[1], language.dataset)["loss"]
        for version in versions
    ]
    assert all(trained < pruned for pruned, trained in zip(losses[::2], losses[1::2], strict=True))
    assert len([note for note in done.notes if "steps of training" in note]) == 3
