"""Recipes that cannot end well are refused before the first step."""

from __future__ import annotations

from typing import Any

import pytest

from modelyard.compression.preflight import check_recipe, needed_modules, why_not_fp8
from modelyard.compression.recipe import Recipe
from modelyard.errors import ConfigError, MissingExtraError

TEXT, IMAGES = ("causal_lm", ("perplexity", "min")), ("image_classification", ("accuracy", "max"))
INT8 = {"kind": "quantize"}
INT4 = {**INT8, "codes": "int4"}
ONNX_INT8 = {"kind": "export", "format": "onnx", "quantize": "int8_static"}
NNCF = {"kind": "export", "format": "openvino", "quantize": "int4"}


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
        (recipe(INT8, {"kind": "export", "format": "onnx"}), TEXT, r"steps\.1\.quantize: none after the step quantize"),
        (recipe(INT8, {"kind": "export", "format": "torch_export"}), IMAGES, "torch_export would write .* in fp32"),
        (recipe(INT4, ONNX_INT8), IMAGES, "(?s)round them again by its own 8 bits.*take the step quantize out"),
        (
            recipe(ONNX_INT8, {"kind": "export", "format": "onnx"}),
            IMAGES,
            r"steps\.1: the recipe exports to onnx twice",
        ),
        (recipe({**NNCF, "quantize": "int8_static"}), TEXT, r"steps\.0\.quantize: openvino takes none or int4"),
        (recipe(NNCF), IMAGES, r"openvino takes none or int8_static .* \(got int4\)"),
        (recipe(INT8, calibration_split="test"), TEXT, "calibration_split: test is the split that quality is measured"),
        (recipe({"kind": "train"}, split="train", calibration_split="test"), TEXT, "split: train is what"),
        (recipe(INT8, {"kind": "export", "format": "openvino"}), IMAGES, r"(?s)fp32.*`quantize: int8_static`"),
        (recipe(INT8, NNCF), TEXT, "would round weights again"),
        (recipe(INT4, target={"engine": "openvino"}), TEXT, "would store these 4-bit weights in 8 bits"),
        (recipe(INT4, {"kind": "export", "format": "gguf"}), TEXT, "gguf would store these 4-bit weights in 8 bits"),
        (recipe({**INT8, "activations": "dynamic"}, target={"engine": "llamacpp"}), TEXT, "llamacpp would ignore it"),
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


@pytest.mark.parametrize(
    "steps",
    [
        (INT8, {"kind": "export", "format": "onnx", "quantize": "int8_static"}),
        ({**INT4, "granularity": "group"}, {"kind": "export", "format": "gguf"}),
        (INT4,),
    ],
)
def test_quantized_weights_may_be_exported_to_files_that_keep_them_small(steps: Any) -> None:
    check_recipe(recipe(*steps), *TEXT, has_module=lambda module: True)


def test_hqq_is_refused_with_the_reason_where_torchao_has_no_solver() -> None:
    made = recipe({**INT8, "method": "hqq"})
    with pytest.raises(ConfigError, match="hqq cannot be used here: torchao is old"):
        check_recipe(made, *TEXT, has_module=lambda module: True, no_hqq=lambda: "torchao is old")
    check_recipe(recipe(INT8), *TEXT, has_module=lambda module: True, no_hqq=lambda: "torchao is old")


@pytest.mark.parametrize("task", ["text_classification", "token_classification"])
def test_encoders_can_be_compressed(task: str) -> None:
    made = recipe({"kind": "export", "format": "onnx"}, target={"engine": "onnx"}, limits={"max_accuracy_drop": 0.01})
    check_recipe(made, task, ("macro_f1", "max"), has_module=lambda module: True)
