"""Recipes that cannot end well are refused before the first step."""

from __future__ import annotations

from typing import Any

import pytest

from modelyard.compression.preflight import check_recipe, needed_modules, why_not_fp8
from modelyard.compression.recipe import Recipe
from modelyard.errors import ConfigError, MissingExtraError

TEXT, IMAGES = ("causal_lm", ("perplexity", "min")), ("image_classification", ("accuracy", "max"))
INT8 = {"kind": "quantize"}


def recipe(*steps: dict[str, Any], **more: Any) -> Recipe:
    return Recipe.model_validate({"dataset": "datasets:/d", "steps": steps, **more})


@pytest.mark.parametrize(
    ("made", "model", "problem"),
    [
        (recipe(INT8, limits={"max_accuracy_drop": 0.1}), TEXT, "judged by perplexity"),
        (recipe(INT8, limits={"max_perplexity_increase": 0.1}), IMAGES, "judged by accuracy"),
        (recipe(INT8, {"kind": "shrink", "mlp": 0.5}), TEXT, r"steps\.1: shrink cannot follow quantize"),
        (recipe({"kind": "export", "format": "gguf"}, INT8), TEXT, "quantize cannot follow export"),
        (recipe(INT8, target={"engine": "onnx"}), TEXT, "onnx needs a file"),
        (recipe(INT8, target={"engine": "openvino"}), IMAGES, "openvino needs a file"),
        (recipe(INT8, target={"engine": "llamacpp"}), IMAGES, "does not run the task"),
        (recipe({"kind": "export", "format": "gguf"}), IMAGES, "language models only"),
        (recipe({"kind": "factorize"}, target={"engine": "openvino"}), TEXT, "no place for factorized layers"),
        (recipe(INT8), ("forecasting", ("mase", "min")), "cannot be measured"),
    ],
)
def test_what_cannot_work_is_refused(made: Recipe, model: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_recipe(made, *model, has_module=lambda module: True)


def test_a_package_that_is_missing_is_named_with_its_extra() -> None:
    made = recipe({"kind": "export", "format": "openvino", "quantize": "int8_static"}, target={"engine": "openvino"})
    with pytest.raises(MissingExtraError, match=r"'nncf'.*\n.*modelyard\[compression\]"):
        check_recipe(made, *IMAGES, has_module=lambda module: module != "nncf")


def test_only_what_a_recipe_uses_is_needed() -> None:
    assert needed_modules(recipe({"kind": "prune"})) == []
    assert needed_modules(recipe(INT8, target={"engine": "openvino"})) == ["torchao", "openvino", "openvino_genai"]


@pytest.mark.parametrize("reason", ["there is no GPU", "A100 has compute capability 8.0"])
def test_fp8_is_refused_with_the_reason_where_the_hardware_has_none(reason: str) -> None:
    made = recipe({"kind": "quantize", "codes": "fp8"})
    with pytest.raises(ConfigError, match=rf"fp8 would save nothing over int8 here: {reason}"):
        check_recipe(made, *TEXT, has_module=lambda module: True, no_fp8=lambda: reason)
    check_recipe(made, *TEXT, has_module=lambda module: True, no_fp8=lambda: None)


def test_this_machine_says_what_it_lacks_for_fp8() -> None:
    import torch

    assert (why_not_fp8() is None) == (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9))


@pytest.mark.parametrize("task", ["text_classification", "token_classification"])
def test_encoders_can_be_compressed(task: str) -> None:
    made = recipe({"kind": "export", "format": "onnx"}, target={"engine": "onnx"}, limits={"max_accuracy_drop": 0.01})
    check_recipe(made, task, ("macro_f1", "max"), has_module=lambda module: True)
