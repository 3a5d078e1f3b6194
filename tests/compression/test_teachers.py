"""Teachers in other places tell less, and what they tell is right: behind Ray Serve, behind a gateway."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.compression.conftest import Folders
from tests.compression.workspaces import quality
from torch.nn import functional

from modelyard.artifacts import Registry
from modelyard.cluster import FakeCluster, Node
from modelyard.compression import Recipe, compress
from modelyard.compression.teaching import check_room
from modelyard.data.dataset import Dataset
from modelyard.errors import CapacityError, ConfigError, TrainingError
from modelyard.tasks import Refined, load_model, read_task
from modelyard.tasks.distillation import Distillation, Likely, TeacherService, divergence, likely
from modelyard.tasks.teachers import unambiguous
from modelyard.training.config import Workers

KINDS = ("forward_kl", "reverse_kl", "jensen_shannon")
QUICK = {"rows": 8, "prompt_tokens": 8, "new_tokens": 8, "repeats": 1}


def scores(seed: int, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_answers_give_a_lower_bound_that_grows_to_the_whole(kind: Any) -> None:
    student, teacher = scores(0, 6, 50), scores(1, 6, 50)
    config = Distillation(divergence=kind, temperature=1.5)
    whole = divergence(student, teacher, config)
    found = [divergence(student, likely(teacher, top, 1.5), config) for top in (1, 5, 20, 49, 50)]
    for less, more in zip(found, [*found[1:], whole], strict=True):
        assert (less <= more + 2e-3).all()
    assert torch.allclose(found[-1], whole, atol=1e-5)
    assert (found[2] > 0.4 * whole).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_on_all_other_answers_counts_as_one(kind: Any) -> None:
    student, teacher = scores(0, 4, 9), scores(1, 4, 9)
    config = Distillation(divergence=kind)
    told = likely(teacher, 3, 1.0)
    p, q = functional.softmax(teacher, dim=-1), functional.softmax(student, dim=-1)
    p, q = (torch.cat([x.gather(1, told.ids), 1 - x.gather(1, told.ids).sum(1, keepdim=True)], 1) for x in (p, q))
    expected = divergence(q.log(), p.log(), config)
    assert torch.allclose(divergence(student, told, config), expected, atol=1e-4)


def test_a_place_of_which_nothing_is_known_teaches_nothing() -> None:
    student = scores(0, 2, 9).requires_grad_()
    nothing = Likely(torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), float("-inf")))
    found = divergence(student, nothing, Distillation())
    assert found.abs().max() < 1e-3
    found.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(("beta", "like"), [(0.001, "forward_kl"), (0.999, "reverse_kl")])
def test_the_mixture_goes_from_forward_to_reverse(beta: float, like: Any) -> None:
    """Agarwal et al. 2024: JSD(beta) / beta -> forward KL as beta -> 0, and / (1 - beta) -> reverse as beta -> 1."""
    student, teacher = scores(0, 5, 8) / 3, scores(1, 5, 8) / 3
    found = divergence(student, teacher, Distillation(divergence="jensen_shannon", beta=beta)) / 0.001
    assert torch.allclose(found, divergence(student, teacher, Distillation(divergence=like)), rtol=0.03)


def test_texts_that_two_tokens_have_name_none() -> None:
    assert unambiguous(["a", "\ufffd", "b", "\ufffd"]) == {"a": 0, "b": 2}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"service": {}, "gateway": {"url": "http://x", "model": "m"}}, "two places for the teacher"),
        ({"service": {}, "hidden": 1.0}, "hidden states stay"),
        ({"gateway": {"url": "http://x", "model": "m"}, "temperature": 2.0}, "at temperature 1 only"),
        ({"gateway": {"url": "http://x", "model": "m"}, "teacher_text": 0.5}, "not its tokens"),
        ({"gateway": {"url": "http://x", "model": "m"}, "teacher": "models:/m"}, "names the teacher"),
    ],
)
def test_what_a_distant_teacher_cannot_do_is_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Distillation.model_validate(given)


def test_a_teacher_that_leaves_its_students_no_room_is_refused() -> None:
    cluster = FakeCluster([Node("a", total={"CPU": 2.0}, free={"CPU": 0.0})])
    check_room(cluster, TeacherService(), Workers(min=1, max=1))
    with pytest.raises(CapacityError, match="the teacher needs 1 CPU and its students 2, the cluster has 2"):
        check_room(cluster, TeacherService(), Workers(min=2, max=2))


def refined(start: Path, **lesson: Any) -> Refined:
    return Refined.model_validate(
        {"task": read_task(start)[0].model_dump(), "start": str(start), "distillation": lesson}
    )


def test_a_gateway_teaches_tokens_only(digits: Folders) -> None:
    task = refined(digits.model, gateway={"url": "http://x", "model": "m"})
    with pytest.raises(ConfigError, match="tells the probabilities of tokens, the dataset holds images"):
        task.check(Dataset.open(digits.dataset).info)


@pytest.fixture
def student(language: Folders, tmp_path: Path) -> Path:
    """The language model with noise on its weights."""
    task, model = load_model(language.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.7 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    task.save(model, tmp_path / "student", language.dataset)
    return tmp_path / "student"


@pytest.mark.slow
def test_a_teacher_behind_the_gateway_judges_as_one_in_the_worker(
    language: Folders, student: Path, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.serving.gateway.process import serving

    from modelyard.security import KeyStore

    registry.register(registry.store.put(language.model, kind="model", name="tiny"))
    database = f"sqlite:///{tmp_path / 'keys.db'}"
    opened = Dataset.open(language.dataset)
    with serving(database, "tiny=transformers", log=tmp_path / "gateway.log") as gateway:
        keys = KeyStore(database)
        key = keys.create(tenant="tests")
        keys.close()
        told = {"url": gateway.url, "model": "tiny-transformers", "places": 64, "prompts": 32}
        task = refined(student, gateway=told, weight=1.0)
        model = task.build(opened.info, language.dataset).eval()
        batch = task.collate(opened.split("train").read(np.arange(2)), "cpu")
        with pytest.raises(TrainingError, match="set MODELYARD_API_KEY on every worker"):
            task.loss(model, batch)
        monkeypatch.setenv("MODELYARD_API_KEY", key)
        found = task.loss(model, batch)
    found.sum().backward()
    with torch.no_grad():
        asked = {"input_ids": batch["input_ids"]}
        aim, mine = (load_model(folder)[1](**asked).logits[:, :-1] for folder in (language.model, student))
        expected = divergence(mine, likely(aim, 5, 1.0), Distillation()).mean(dim=1)
    assert torch.allclose(found, expected, rtol=0.05)  # a token whose text is not its alone counts as "any other"


def _learning(**lesson: Any) -> dict[str, Any]:
    optimizer = {"kind": "adamw", "learning_rate": 1e-3, "weight_decay": 0.0}
    return {
        "kind": "distill",
        "training": {
            "steps": 20,
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "optimizer": optimizer,
            "distillation": {"weight": 1.0, **lesson},
        },
    }


@pytest.mark.ray
def test_a_teacher_is_deployed_teaches_and_is_gone_afterwards(
    ray_cluster: str,
    language: Folders,
    student: Path,
    registered: Callable[[Folders, str], tuple[str, str]],
    registry: Registry,
) -> None:
    from modelyard.compression.teaching import is_serve_running

    was_there = is_serve_running()
    teacher, dataset = registered(language, "tiny")
    version = registry.register(registry.store.put(student, kind="model", name="student"))
    lesson = {"teacher": teacher, "service": {"top": 16}, "student_text": 0.3, "teacher_text": 0.3}
    recipe = {"name": "taught", "dataset": dataset, "steps": [_learning(**lesson)], "measuring": QUICK}
    done = compress(version.reference, Recipe.model_validate(recipe))
    folder = registry.open(done.model)[1]
    before, after = (quality(each, language.dataset)["loss"] for each in (student, folder))
    assert after < before - 0.1
    assert is_serve_running() == was_there


@pytest.mark.ray
def test_a_teacher_for_a_pool_that_is_not_there_is_refused(
    ray_cluster: str, language: Folders, registered: Callable[[Folders, str], tuple[str, str]]
) -> None:
    model, dataset = registered(language, "tiny")
    recipe = {"dataset": dataset, "steps": [_learning(service={"pool": "h100"})], "measuring": QUICK}
    with pytest.raises(CapacityError, match=r"distillation\.service: no node matches"):
        compress(model, Recipe.model_validate(recipe))
