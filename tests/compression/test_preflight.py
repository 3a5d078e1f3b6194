"""Recipes that cannot end well are refused before the first step."""

from __future__ import annotations

from typing import Any

import pytest

from modelyard.compression.preflight import check_recipe, needed_modules
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
