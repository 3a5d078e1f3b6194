"""What can be known of a recipe before any work: steps that cannot follow, engines that cannot run the result."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection

from modelyard.compression.engines import EXTRA
from modelyard.compression.hqq import why_not_hqq
from modelyard.compression.recipe import Export, Quantize, Recipe
from modelyard.errors import ConfigError, MissingExtraError
from modelyard.tasks.base import Objective

_MEASURED = ("causal_lm", "image_classification", "text_classification", "token_classification")
_FP8_CAPABILITY = (8, 9)
_BLOCK = 32
"""Weights that share a scale in a GGUF file."""
_OPENVINO_QUANTIZE = {True: ("none", "int4", "int4_awq"), False: ("none", "int8_static")}
"""Of language models, and of others."""
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",), "gguf": ("gguf",)}
_ENGINES = {"onnx": ("onnxruntime",), "openvino": ("openvino", "openvino_genai"), "llamacpp": ("xllamacpp", "gguf")}
_DISTRIBUTIONS = {"openvino": "openvino-genai", "openvino_genai": "openvino-genai"}


def check_recipe(
    recipe: Recipe,
    task: str,
    objective: Objective,
    has_module: Callable[[str], bool] | None = None,
    no_fp8: Callable[[], str | None] | None = None,
    no_hqq: Callable[[], str | None] | None = None,
) -> None:
    """Refuse a recipe that would fail later, perhaps after hours of training.

    Args:
        task: kind of the model's task.
        objective: its deciding metric.
        has_module: whether a module is installed; by default it is looked for here.
        no_fp8: why nothing here computes with fp8, or None; by default this machine's GPU is asked.
        no_hqq: why HQQ has no solver here, or None; by default torchao is asked.

    Raises:
        ConfigError: a limit, a step or the target does not fit the model, or the steps do not fit each other.
        MissingExtraError: a package that a step or the target needs is not installed.
    """
    if task not in _MEASURED:
        raise ConfigError(
            f"a model of the task {task} cannot be measured on other engines yet", f"known: {', '.join(_MEASURED)}"
        )
    _check_limits(recipe, objective)
    _check_splits(recipe)
    _check_order(recipe)
    _check_target(recipe, task)
    _check_formats(recipe, task)
    if _uses(recipe, codes="fp8") and (reason := (no_fp8 or why_not_fp8)()) is not None:
        raise ConfigError(
            f"codes: fp8 would save nothing over int8 here: {reason}",
            "use int8, or run the recipe where there is a GPU of compute capability 8.9 or more (Ada, Hopper, ...)",
        )
    for module in needed_modules(recipe):
        if not (has_module or _has)(module):
            raise MissingExtraError(_DISTRIBUTIONS.get(module, module), EXTRA)
    if _uses(recipe, method="hqq") and (reason := (no_hqq or why_not_hqq)()) is not None:
        raise ConfigError(
            f"steps.quantize.method: hqq cannot be used here: {reason}", "install torchao 0.18, or use gptq"
        )


def needed_modules(recipe: Recipe) -> list[str]:
    """Modules that the steps and the target import. Pure."""
    needed: list[str] = []
    for step in recipe.steps:
        if isinstance(step, Quantize):
            needed.append("torchao")
        if isinstance(step, Export):
            needed += _PACKAGES.get(step.format, ())
            needed += ["nncf"] if step.format == "openvino" and step.quantize != "none" else []
    return list(dict.fromkeys([*needed, *_ENGINES.get(recipe.target.engine, ())]))


def why_not_fp8() -> str | None:
    """Why this machine has no arithmetic in 8-bit floating point; None if it has."""
    import torch

    if not torch.cuda.is_available():
        return "there is no GPU"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < _FP8_CAPABILITY:
        return f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}"
    return None


def _uses(recipe: Recipe, **fields: str) -> bool:
    """Whether a step `quantize` has these values."""
    quantizations = [step for step in recipe.steps if isinstance(step, Quantize)]
    return any(all(getattr(step, name) == value for name, value in fields.items()) for step in quantizations)


def _check_limits(recipe: Recipe, objective: Objective) -> None:
    name, direction = objective
    limits = recipe.limits
    if limits.max_perplexity_increase is not None and direction == "max":
        raise ConfigError(f"limits.max_perplexity_increase: the model is judged by {name}", "use max_accuracy_drop")
    if limits.max_accuracy_drop is not None and direction == "min":
        raise ConfigError(f"limits.max_accuracy_drop: the model is judged by {name}", "use max_perplexity_increase")


def _check_splits(recipe: Recipe) -> None:
    """What is measured must not have been seen."""
    if recipe.split == recipe.calibration_split:
        problem = f"calibration_split: {recipe.calibration_split} is the split that quality is measured on"
        raise ConfigError(problem, "choose another for one of the two")
    if recipe.split == "train" and any(getattr(step, "training", None) is not None for step in recipe.steps):
        raise ConfigError("split: train is what the recipe's training learns from", "measure quality on another split")


def _check_order(recipe: Recipe) -> None:
    done, exported = "", set[str]()
    for number, step in enumerate(recipe.steps):
        if isinstance(step, Export):
            if step.format in exported:
                problem = f"steps.{number}: the recipe exports to {step.format} twice"
                raise ConfigError(problem, "take one of the two out")
            exported.add(step.format)
        if done and not isinstance(step, Export):
            raise ConfigError(f"steps.{number}: {step.kind} cannot follow {done}", f"put {step.kind} before it")
        if step.kind in ("quantize", "factorize", "export"):
            done = step.kind


def _check_target(recipe: Recipe, task: str) -> None:
    engine, exports = recipe.target.engine, formats(recipe)
    is_text = task == "causal_lm"
    if engine == "llamacpp" and not is_text:
        raise ConfigError(f"target.engine: llamacpp does not run the task {task}", "choose onnx, openvino or torch")
    if "gguf" in exports and not is_text:
        raise ConfigError("steps.export.format: GGUF holds language models only", "choose onnx or openvino")
    if engine == "onnx" and "onnx" not in exports:
        raise ConfigError("target.engine: onnx needs a file to run", "add a step `kind: export, format: onnx`")
    if engine == "openvino" and not is_text and "openvino" not in exports:
        raise ConfigError("target.engine: openvino needs a file to run", "add a step `kind: export, format: openvino`")
    if engine in ("openvino", "llamacpp") and any(step.kind == "factorize" for step in recipe.steps):
        raise ConfigError(f"target.engine: {engine} has no place for factorized layers", "choose torch or onnx")


def _check_formats(recipe: Recipe, task: str) -> None:
    """What the files of other engines would make of the weights."""
    is_text = task == "causal_lm"
    quantized: Quantize | None = None
    for number, step in enumerate(recipe.steps):
        if isinstance(step, Quantize):
            quantized = step
        if isinstance(step, Export):
            field = f"steps.{number}.quantize"
            known = _OPENVINO_QUANTIZE[is_text] if step.format == "openvino" else (step.quantize,)
            if step.quantize not in known:
                problem = f"{field}: openvino takes {' or '.join(known)} for the task {task} (got {step.quantize})"
                raise ConfigError(problem, "choose one of these, or another format")
            if quantized is not None:
                _check_export(field, step, quantized, is_text)
    if quantized is None:
        return
    in_blocks = {"openvino", "gguf"} & set(formats(recipe)) or {"openvino", "llamacpp"} & {recipe.target.engine}
    if is_text and in_blocks:
        _check_blocks(quantized, " and ".join(sorted(in_blocks)))


def _check_export(field: str, step: Export, quantized: Quantize, is_text: bool) -> None:
    if step.format == "gguf" or (step.format == "openvino" and is_text):
        if step.quantize != "none":
            raise ConfigError(
                f"{field}: {step.quantize} would round weights again that the step quantize has rounded",
                "take out one of the two",
            )
        return
    own = {"onnx": "int8_static (or int8_dynamic)", "openvino": "int8_static"}.get(step.format)
    is_same = (quantized.codes, quantized.granularity, quantized.symmetric) == ("int8", "channel", True)
    if own is None or not is_same:
        raise ConfigError(
            f"{field}: {step.format} would write these weights in fp32, or round them again by its own 8 bits",
            f"take the step quantize out, and write `quantize: {own}` here" if own else "take this export out",
        )
    if step.quantize == "none":
        raise ConfigError(
            f"{field}: none after the step quantize would write its weights in fp32, a larger file than the model",
            f"write `quantize: {own}` in this export, or take it out",
        )


def _check_blocks(step: Quantize, engines: str) -> None:
    """GGUF's blocks, which OpenVINO reads too: 4 bits symmetric in groups of 32, or 8 bits; inputs are not rounded."""
    if step.activations != "none":
        raise ConfigError(
            f"steps.quantize.activations: {step.activations} is felt on torch only, {engines} would ignore it",
            "set activations to none",
        )
    if step.codes == "int4" and not (step.symmetric and step.group_size == _BLOCK):
        got = f"granularity={step.granularity}, group_size={step.group_size}, symmetric={step.symmetric}"
        raise ConfigError(
            f"steps.quantize: {engines} would store these 4-bit weights in 8 bits (got {got.lower()})",
            f"set granularity to group, group_size to {_BLOCK}, symmetric to true",
        )


def formats(recipe: Recipe) -> Collection[str]:
    """The formats that the recipe exports to."""
    return {step.format for step in recipe.steps if isinstance(step, Export)}


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
