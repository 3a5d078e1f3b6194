"""What can be known of a recipe before any work: steps that cannot follow, engines that cannot run the result."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection

from modelyard.compression.engines import EXTRA
from modelyard.compression.recipe import Export, Quantize, Recipe
from modelyard.errors import ConfigError, MissingExtraError
from modelyard.tasks.base import Objective

_MEASURED = ("causal_lm", "image_classification", "text_classification", "token_classification")
_FP8_CAPABILITY = (8, 9)
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",), "gguf": ("gguf",)}
_ENGINES = {"onnx": ("onnxruntime",), "openvino": ("openvino", "openvino_genai"), "llamacpp": ("xllamacpp", "gguf")}
_DISTRIBUTIONS = {"openvino": "openvino-genai", "openvino_genai": "openvino-genai"}


def check_recipe(
    recipe: Recipe,
    task: str,
    objective: Objective,
    has_module: Callable[[str], bool] | None = None,
    no_fp8: Callable[[], str | None] | None = None,
) -> None:
    """Refuse a recipe that would fail later, perhaps after hours of training.

    Args:
        task: kind of the model's task.
        objective: its deciding metric.
        has_module: whether a module is installed; by default it is looked for here.
        no_fp8: why nothing here computes with fp8, or None; by default this machine's GPU is asked.

    Raises:
        ConfigError: a limit, a step or the target does not fit the model, or the steps do not fit each other.
        MissingExtraError: a package that a step or the target needs is not installed.
    """
    if task not in _MEASURED:
        raise ConfigError(
            f"a model of the task {task} cannot be measured on other engines yet", f"known: {', '.join(_MEASURED)}"
        )
    _check_limits(recipe, objective)
    _check_order(recipe)
    _check_target(recipe, task)
    if _uses_fp8(recipe) and (reason := (no_fp8 or why_not_fp8)()) is not None:
        raise ConfigError(
            f"codes: fp8 would save nothing over int8 here: {reason}",
            "use int8, or run the recipe where there is a GPU of compute capability 8.9 or more (Ada, Hopper, ...)",
        )
    for module in needed_modules(recipe):
        if not (has_module or _has)(module):
            raise MissingExtraError(_DISTRIBUTIONS.get(module, module), EXTRA)


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


def _uses_fp8(recipe: Recipe) -> bool:
    return any(isinstance(step, Quantize) and step.codes == "fp8" for step in recipe.steps)


def _check_limits(recipe: Recipe, objective: Objective) -> None:
    name, direction = objective
    limits = recipe.limits
    if limits.max_perplexity_increase is not None and direction == "max":
        raise ConfigError(f"limits.max_perplexity_increase: the model is judged by {name}", "use max_accuracy_drop")
    if limits.max_accuracy_drop is not None and direction == "min":
        raise ConfigError(f"limits.max_accuracy_drop: the model is judged by {name}", "use max_perplexity_increase")


def _check_order(recipe: Recipe) -> None:
    done = ""
    for number, step in enumerate(recipe.steps):
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


def formats(recipe: Recipe) -> Collection[str]:
    """The formats that the recipe exports to."""
    return {step.format for step in recipe.steps if isinstance(step, Export)}


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
