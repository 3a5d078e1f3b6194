"""What a source's files say against a recipe, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.compression.conftest import Folders
from tests.compression.workspaces import quality, workspace

from modelyard.compression import compress
from modelyard.compression.low_rank import factorize
from modelyard.compression.quantize import quantize
from modelyard.compression.recipe import Factorize, Quantize, Recipe
from modelyard.compression.source import check_source, tensor_shapes
from modelyard.errors import ConfigError, NotFoundError

INT8 = {"kind": "quantize"}


def check(folder: Path, *steps: dict[str, Any], task: str = "causal_lm") -> None:
    recipe = Recipe.model_validate({"dataset": "datasets:/d", "steps": steps})
    check_source(recipe, task, folder, "models:/small/2", "models:/large/1")


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        ({**INT8, "skip": ["nothing*"]}, r"steps\.1\.skip: no layer is called 'nothing\*'"),
        ({"kind": "prune", "skip": ["no.such"]}, r"steps\.1\.skip: no layer is called 'no\.such'"),
        ({"kind": "factorize", "layers": ["conv*"]}, r"steps\.1\.layers: no layer is called 'conv\*'"),
        ({**INT8, "granularity": "group", "group_size": 7}, r"steps\.1\.group_size: rows of .* no multiple of 7"),
        ({"kind": "merge_lora"}, r"steps\.1: the model has no adapter"),
    ],
)
def test_layers_and_adapters_that_are_not_there_are_named(language: Folders, step: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check(language.model, {"kind": "train"}, step)


def test_an_output_layer_that_is_tied_may_be_named(language: Folders) -> None:
    assert "lm_head.weight" not in tensor_shapes(language.model)
    check(language.model, {**INT8, "skip": ["*.down_proj", "lm_head"]})


def test_an_image_classifier_has_no_heads(digits: Folders) -> None:
    check(digits.model, {"kind": "shrink", "mlp": 0.5}, task="image_classification")
    with pytest.raises(ConfigError, match=r"steps\.0: an image classifier has neither heads nor layers"):
        check(digits.model, {"kind": "shrink", "heads": 0.5}, task="image_classification")


def test_a_quantized_source_is_exported_as_it_is_or_not_at_all(language: Folders, tmp_path: Path) -> None:
    folder = quantize(workspace(language, tmp_path / "s"), Quantize()).folder
    check(folder, {"kind": "export", "format": "gguf"})
    for step in (INT8, {"kind": "shrink", "mlp": 0.5}, {"kind": "export", "format": "onnx"}):
        with pytest.raises(ConfigError, match=r"(?s)small/2 is quantized already.*made from: models:/large/1"):
            check(folder, step)


def test_a_factorized_or_exported_source_is_not_compressed_again(language: Folders, tmp_path: Path) -> None:
    folder = factorize(workspace(language, tmp_path / "s"), Factorize()).folder
    with pytest.raises(ConfigError, match="is factorized already"):
        check(folder, INT8)
    with pytest.raises(ConfigError, match="gguf has no place for factorized layers"):
        check(folder, {"kind": "export", "format": "gguf"})
    (folder / "onnx").mkdir()
    with pytest.raises(ConfigError, match="exported to onnx already"):
        check(folder, {"kind": "export", "format": "onnx"})


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_four_asymmetric_bits_are_read_as_they_were_written(
    language: Folders, tmp_path: Path, granularity: Any
) -> None:
    step = Quantize.model_validate({**INT8, "codes": "int4", "symmetric": False, "granularity": granularity})
    folder = quantize(workspace(language, tmp_path / "s"), step).folder
    before, after = (quality(each, language.dataset)["perplexity"] for each in (language.model, folder))
    assert after < 3 * before


@pytest.mark.parametrize(
    ("training", "error", "problem"),
    [
        ({"workers": 9}, ConfigError, "steps.1: .*global_batch_size"),
        ({"distillation": {"teacher": "models:/nobody"}}, NotFoundError, "nobody"),
    ],
)
def test_a_training_that_cannot_work_is_refused_before_the_first_step(
    digits: Folders,
    registered: Callable[[Folders, str], tuple[str, str]],
    training: dict[str, Any],
    error: type[Exception],
    problem: str,
) -> None:
    model, dataset = registered(digits, "tiny")
    recipe = {"dataset": dataset, "steps": [{"kind": "prune"}, {"kind": "train", "training": training}]}
    lines: list[str] = []
    with pytest.raises(error, match=problem):
        compress(model, Recipe.model_validate(recipe), on_step=lines.append)
    assert lines == []
