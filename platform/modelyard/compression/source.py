"""What the files of a recipe's source say against it, before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from modelyard.compression.recipe import Export, Factorize, MergeLora, Prune, Quantize, Recipe, Shrink
from modelyard.compression.workspace import EXPORT_FOLDERS, matching
from modelyard.errors import ConfigError
from modelyard.tasks.compact import read_compact
from modelyard.tasks.lora import ADAPTER_FOLDER


def check_source(recipe: Recipe, task: str, folder: Path, reference: str, original: str) -> None:
    """Refuse steps that the model in `folder` has no place for.

    Args:
        task: kind of the model's task.
        reference: of the model.
        original: what it was made from.

    Raises:
        ConfigError: it is compressed already, has no adapter to merge, or has no layer of that name or size.
    """
    _check_state(recipe, task == "causal_lm", folder, f"{reference} is", original)
    if read_compact(folder) is None:
        _check_layers(recipe, task, tensor_shapes(folder))


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a model folder, by name, from the headers of its files."""
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def _check_state(recipe: Recipe, is_text: bool, folder: Path, it_is: str, original: str) -> None:
    instead = f"compress what it was made from: {original}"
    compact = read_compact(folder)
    state = None if compact is None else "quantized" if compact.quantized else "factorized"
    exported = [form for form, name in EXPORT_FOLDERS.items() if (folder / name).is_dir()]
    has_adapter = (folder / ADAPTER_FOLDER).is_dir()
    for number, step in enumerate(recipe.steps):
        field = f"steps.{number}"
        if isinstance(step, MergeLora):
            if not has_adapter:
                raise ConfigError(f"{field}: the model has no adapter to merge", "take this step out")
            has_adapter = False
        elif has_adapter and not isinstance(step, Export):
            raise ConfigError(f"{field}: {it_is} a base with a LoRA adapter", "put `kind: merge_lora` first")
        elif not isinstance(step, Export):
            if state or exported:
                raise ConfigError(f"{field}: {it_is} {state or f'exported to {exported[0]}'} already", instead)
        elif step.format in exported:
            raise ConfigError(f"{field}: {it_is} exported to {step.format} already", instead)
        elif state == "quantized" and not (is_text and step.format in ("openvino", "gguf")):
            problem = f"{field}: {it_is} quantized already, {step.format} would hold it in fp32 or round it again"
            raise ConfigError(problem, instead)
        elif state == "factorized" and step.format in ("openvino", "gguf") and is_text:
            raise ConfigError(f"{field}: {step.format} has no place for factorized layers", instead)


def _check_layers(recipe: Recipe, task: str, shapes: dict[str, tuple[int, ...]]) -> None:
    layers = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) > 1
    }
    names = [*layers, *(["lm_head"] if task == "causal_lm" else [])]  # where it is tied, it has no tensor of its own
    for number, step in enumerate(recipe.steps):
        field = f"steps.{number}"
        if isinstance(step, Shrink):
            if task == "image_classification" and (step.heads or step.layers):
                raise ConfigError(f"{field}: an image classifier has neither heads nor layers to remove", "give mlp")
            return  # what follows has other sizes
        if isinstance(step, Quantize | Prune):
            _check_globs(f"{field}.skip", step.skip, names)
        if isinstance(step, Factorize):
            _check_globs(f"{field}.layers", step.layers, names)
        if isinstance(step, Quantize) and step.embeddings and step.group_size is not None:
            for name in sorted(set(layers) - matching(layers, step.skip)):
                columns = math.prod(layers[name][1:])
                if columns % step.group_size:
                    raise ConfigError(
                        f"{field}.group_size: rows of {name} have {columns} weights, no multiple of {step.group_size}",
                        "choose another group_size, granularity channel, or add the layer to skip",
                    )


def _check_globs(field: str, globs: Sequence[str], names: Sequence[str]) -> None:
    for glob in globs:
        if not matching(names, [glob]):
            some = ", ".join(names[:3])
            raise ConfigError(f"{field}: no layer is called {glob!r}", f"the model has, among others, {some}")
