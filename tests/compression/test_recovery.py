"""Training inside a recipe: on the training core, from any shapes, with zeros, rounding and teachers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.compression.conftest import Folders
from tests.compression.workspaces import quality
from torch.nn import functional

from modelyard.artifacts import Registry
from modelyard.compression import Recipe, compress
from modelyard.data.dataset import Dataset
from modelyard.errors import ConfigError
from modelyard.tasks import CausalLM, ImageClassification, Refined, load_model, read_task
from modelyard.tasks.compact import StoredLayer
from modelyard.tasks.distillation import Distillation, divergence

pytestmark = pytest.mark.slow  # on models that are trained first

QUICK = {"rows": 8, "prompt_tokens": 8, "new_tokens": 8, "repeats": 1}


def refined(start: Path, **settings: Any) -> Refined:
    return Refined.model_validate({"task": read_task(start)[0].model_dump(), "start": str(start), **settings})


def fit(task: Refined, dataset: Path, *, steps: int, rows: int | None = None, rate: float = 2e-3, seed: int = 0) -> Any:
    """Plain training on the first `rows` rows; returns the model."""
    opened = Dataset.open(dataset)
    torch.manual_seed(seed)
    model = task.build(opened.info, dataset).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    split, rng = opened.split("train"), np.random.default_rng(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        ids = rng.integers(rows or split.num_rows, size=32)
        task.loss(model, task.collate(split.read(ids), "cpu")).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def accuracy(task: Any, model: Any, dataset: Path) -> float:
    split = Dataset.open(dataset).split("test")
    with torch.inference_mode():
        stats = task.statistics(model, task.collate(split.read(np.arange(split.num_rows)), "cpu"))
    return float((stats["label"] == stats["prediction"]).float().mean())


def test_a_student_with_a_teacher_beats_the_same_student_alone(digits: Folders, tmp_path: Path) -> None:
    """A hundred labelled images: alone the student has only them, the teacher also judges the others. Three seeds."""
    info = Dataset.open(digits.dataset).info
    student = ImageClassification(channels=(4,), hidden=16, dropout=0.0)
    alone, taught = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        student.save(student.build(info, None), tmp_path / f"{seed}", digits.dataset)
        lesson = {"teacher": str(digits.model), "weight": 1.0, "temperature": 4.0}  # weight 1: labels are not read
        tasks = refined(tmp_path / f"{seed}"), refined(tmp_path / f"{seed}", distillation=lesson)
        settings: dict[str, Any] = {"steps": 150, "rate": 5e-3, "seed": seed}
        alone.append(accuracy(student, fit(tasks[0], digits.dataset, rows=100, **settings), digits.dataset))
        taught.append(accuracy(student, fit(tasks[1], digits.dataset, **settings), digits.dataset))
    assert np.mean(taught) > np.mean(alone) + 0.03


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_divergences_are_those_of_the_textbook(kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(4, 7, generator=generator), torch.randn(4, 7, generator=generator)
    p, q = functional.softmax(teacher / 2, dim=1), functional.softmax(student / 2, dim=1)
    middle = (p + q) / 2

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum(dim=1)

    expected = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jensen_shannon": (kl(p, middle) + kl(q, middle)) / 2}
    found = divergence(student, teacher, Distillation(divergence=kind, temperature=2.0))
    assert torch.allclose(found, expected[kind] * 4, atol=1e-5)


@pytest.mark.parametrize(
    "lesson",
    [
        {},
        {"student_text": 1.0},
        {"student_text": 1.0, "weight": 0.5},  # its own words are no labels
        {"teacher_text": 1.0},
        {"hidden": 1.0},
        {"divergence": "reverse_kl"},
    ],
)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(language: Folders, lesson: dict[str, Any]) -> None:
    task = refined(language.model, distillation={"teacher": str(language.model), "weight": 1.0, **lesson})
    opened = Dataset.open(language.dataset)
    torch.manual_seed(0)
    model = task.build(opened.info, language.dataset).eval()
    losses = task.loss(model, task.collate(opened.split("train").read(np.arange(4)), "cpu"))
    assert losses.shape == (4,)
    assert losses.abs().max() < 1e-4


def test_on_policy_text_begins_with_the_data_and_goes_on_with_the_students_own(language: Folders) -> None:
    lesson = {"teacher": str(language.model), "student_text": 1.0}
    task = refined(language.model, distillation=lesson)
    opened = Dataset.open(language.dataset)
    model = task.build(opened.info, language.dataset).train()
    batch = task.collate(opened.split("train").read(np.arange(4)), "cpu")
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    task.loss(model, batch).mean().backward()
    asked, tokens = seen[-1], batch["input_ids"]
    half = tokens.shape[1] // 2
    assert asked.shape == tokens.shape
    assert torch.equal(asked[:, :half], tokens[:, :half])
    assert not torch.equal(asked[:, half:], tokens[:, half:])


def test_sequence_level_the_teachers_words_are_the_labels_and_its_scores_are_not_asked(
    language: Folders,
) -> None:
    task = refined(language.model, distillation={"teacher": str(language.model), "teacher_text": 1.0, "weight": 0.0})
    opened = Dataset.open(language.dataset)
    model: Any = task.build(opened.info, language.dataset).train()
    asked: list[int] = []
    model.lesson._teacher.model.register_forward_hook(lambda _m, _i, out: asked.append(out.logits.shape[1]))
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    losses = task.loss(model, task.collate(opened.split("train").read(np.arange(4)), "cpu"))
    with torch.no_grad():
        logits = load_model(language.model)[1](input_ids=seen[0]).logits
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), seen[0][:, 1:].flatten(), reduction="none")
    assert torch.allclose(losses, expected.view(4, -1).mean(dim=1), atol=1e-4)
    assert max(asked) <= seen[0].shape[1] // 2  # it read the prompt and wrote, and judged nothing


def test_students_of_another_width_learn_hidden_states_and_are_saved_without_the_bridge(
    digits: Folders, tmp_path: Path
) -> None:
    student = ImageClassification(channels=(4,), hidden=16)
    info = Dataset.open(digits.dataset).info
    student.save(student.build(info, None), tmp_path / "student", digits.dataset)
    task = refined(tmp_path / "student", distillation={"teacher": str(digits.model), "hidden": 1.0})
    model = fit(task, digits.dataset, steps=3)
    assert any("distillation" in name for name in model.state_dict())
    task.save(model, tmp_path / "saved", digits.dataset)
    assert isinstance(load_model(tmp_path / "saved")[0], ImageClassification)


def test_zeros_stay_zero_and_the_rest_learns(language: Folders, tmp_path: Path) -> None:
    task, model = load_model(language.model)
    name = "model.layers.0.mlp.up_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[::2] = 0
    task.save(model, tmp_path / "sparse", language.dataset)
    trained = fit(refined(tmp_path / "sparse", keep_zeros=True), language.dataset, steps=3)
    before, after = model.get_submodule(name).weight, trained.get_submodule(name).weight
    assert (after[::2] == 0).all()
    assert not torch.equal(before[1::2], after[1::2])


@pytest.mark.slow
def test_training_under_four_bits_makes_four_bits_better(language: Folders, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from tests.compression.workspaces import workspace

    from modelyard.compression.quantize import quantize
    from modelyard.compression.recipe import Quantize
    from modelyard.compression.workspace import prunable

    step = Quantize(codes="int4", granularity="channel", embeddings=False)
    layer = StoredLayer(codes="int4", granularity="channel")
    layers = {name: layer.model_dump() for name in prunable(load_model(language.model)[1])}
    task = refined(language.model, rounded=layers)
    task.save(fit(task, language.dataset, steps=60, rate=1e-3), tmp_path / "trained", language.dataset)
    losses = [
        quality(quantize(workspace(folders, tmp_path / str(number)), step).folder, language.dataset)["loss"]
        for number, folders in enumerate((language, Folders(tmp_path / "trained", language.dataset)))
    ]
    assert losses[1] < losses[0]


def test_text_is_not_written_for_images(digits: Folders) -> None:
    task = refined(digits.model, distillation={"teacher": str(digits.model), "student_text": 0.5})
    with pytest.raises(ConfigError, match="are for language models"):
        task.check(Dataset.open(digits.dataset).info)


@pytest.mark.ray
def test_half_of_the_feed_forward_is_removed_and_training_brings_the_quality_back(
    ray_cluster: str,
    language: Folders,
    registered: Callable[[Folders, str], tuple[str, str]],
    registry: Registry,
) -> None:
    model, dataset = registered(language, "tiny")
    training = {
        "steps": 60,
        "global_batch_size": 16,
        "micro_batch_size": 8,
        "workers": 2,
        "optimizer": {"kind": "adamw", "learning_rate": 2e-3},
        "distillation": {"weight": 0.5},
    }
    steps = [{"kind": "shrink", "mlp": 0.5, "training": training}]
    recipe = {"name": "tiny-half", "dataset": dataset, "steps": steps, "measuring": QUICK}
    done = compress(model, Recipe.model_validate(recipe))
    folder = registry.open(done.model)[1]
    task, loaded = load_model(folder)
    assert isinstance(task, CausalLM)
    assert loaded.config.intermediate_size == 96
    shrunk = registry.open("models:/tiny-half-steps/1")[1]
    untrained, trained, whole = (quality(each, language.dataset)["loss"] for each in (shrunk, folder, language.model))
    assert trained < untrained
    assert trained < whole + 0.7 * (untrained - whole)
    assert task.flops_per_row(loaded) < 0.8 * task.flops_per_row(load_model(language.model)[1])


@pytest.mark.ray
def test_a_classifier_gets_six_times_smaller_and_keeps_its_accuracy(
    ray_cluster: str, digits: Folders, registered: Callable[[Folders, str], tuple[str, str]]
) -> None:
    pytest.importorskip("torchao")
    model, dataset = registered(digits, "digits")
    training = {
        "steps": 120,
        "global_batch_size": 64,
        "micro_batch_size": 64,
        "optimizer": {"kind": "adamw", "learning_rate": 2e-3},
        "distillation": {"weight": 0.7, "temperature": 2.0},
    }
    steps = [{"kind": "shrink", "mlp": 0.3, "training": training}, {"kind": "quantize", "codes": "int8"}]
    limits = {"max_accuracy_drop": 0.005, "min_size_ratio": 4}
    recipe = {"dataset": dataset, "steps": steps, "limits": limits, "measuring": {"repeats": 1}}
    done = compress(model, Recipe.model_validate(recipe))
    assert done.report.size_ratio > 6
