"""Post-training quantization: weights to codes with scales, inputs to calibrated or per-token scales.

The arithmetic is torchao's, but for GPTQ; GPTQ and HQQ choose other codes on the same grids. Two of them are those of
GGUF, so that engines that run GGUF files compute with the very same weights: 8 bits symmetric in groups of 32 is Q8_0,
4 bits symmetric in groups of 32 is Q4_0.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard.compression.calibration import input_moments, input_ranges
from modelyard.compression.gptq import gptq
from modelyard.compression.hqq import hqq
from modelyard.compression.recipe import Quantize
from modelyard.compression.recovery import recover
from modelyard.compression.workspace import Workspace, copy_beside, matching, require_plain, with_compact
from modelyard.errors import ConfigError
from modelyard.tasks import Task, read_task
from modelyard.tasks.compact import Compact, StoredLayer, pack_int4
from modelyard.tasks.rounding import Codes, quantize_weight
from modelyard.tasks.saving import TASK_FILE

if TYPE_CHECKING:
    from torch import Tensor, nn

_FP8_MAX = 448.0
_TINY = 1e-12


def quantize(work: Workspace, step: Quantize) -> Workspace:
    """Round the weights of every linear and convolution layer, and of the embeddings.

    Raises:
        ConfigError: a layer cannot be cut into groups, or the model is quantized already.
        MissingExtraError: torchao is not installed.
        TrainingError: quantization-aware training failed.
    """
    require_plain(work, "quantize")
    if step.training is not None:
        work = recover(work, step.training, rounded=_felt(work.load()[1], step))
    task, model = work.load()
    layers = _layers(model, step)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    stored = {name: _stored(name, module, step) for name, module in layers.items()}
    scales: dict[str, Tensor] = {}
    if step.activations == "static":
        rounded = [name for name, layer in stored.items() if layer.activations == "static"]
        seen = input_ranges(task, model, rounded, work.calibration_batches(step.calibration_rows), step.percentile)
        for name, (low, high) in seen.items():
            scales |= _input_scale(name, stored[name], low, high)
    folder = work.new_folder("quantized")
    compact = Compact(quantized=stored)
    state = _state(model, layers, stored, _codes(work, step, task, model, layers, stored)) | scales
    is_table_shared = output is not None and any(output.weight is m.weight for m in layers.values() if m is not output)
    linear = {n for n, m in model.named_modules() if _is_linear(m) and not (is_table_shared and m is output)}
    write_compact(folder, work.folder, state, compact, linear, model)
    counts = Counter(4 if layer.codes == "int4" else 8 for layer in stored.values())
    bits = " and ".join(f"{count} in {number} bits" for number, count in sorted(counts.items()))
    by = "" if step.method == "nearest" else f", {step.method}"
    return work.moved(folder, f"layers: {bits}, {step.granularity} scales{by}")


def write_compact(
    folder: Path,
    source: Path,
    state: Mapping[str, Tensor],
    compact: Compact,
    linear: Iterable[str],
    model: nn.Module,
) -> None:
    """A model folder with these tensors; config, task and tokenizer come from `source`."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    copy_beside(source, folder)
    (folder / TASK_FILE).write_bytes((source / TASK_FILE).read_bytes())
    compact.write(folder)
    if hasattr(model, "config"):
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        if compact.quantized and not compact.ranks:
            config["quantization_config"] = compressed_tensors_config(compact, set(linear))
        if compact.ranks:
            config["factorized_layers"] = len(compact.ranks)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    read_task(folder)


def compressed_tensors_config(compact: Compact, linear: set[str]) -> dict[str, Any]:
    """The `quantization_config` of `config.json`, by which vLLM and transformers read the folder."""
    schemes: dict[str, list[str]] = {}
    for name, layer in compact.quantized.items():
        schemes.setdefault(layer.model_dump_json(), []).append(name)
    kinds = {"int4": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}
    used = {kinds[layer.codes] for layer in compact.quantized.values()}
    groups = {}
    for number, (plain, names) in enumerate(schemes.items()):
        layer = StoredLayer.model_validate_json(plain)
        inputs = _arguments(layer, "tensor" if layer.activations == "static" else "token", None)
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(schemes) == 1 and set(names) <= linear else names,
            "weights": _arguments(layer, layer.granularity, layer.group_size),
            "input_activations": None
            if layer.activations == "none"
            else inputs | {"symmetric": layer.activations == "dynamic", "dynamic": layer.activations == "dynamic"},
            "format": kinds[layer.codes],
        }
    return {
        "quant_method": "compressed-tensors",
        "format": used.pop() if len(used) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(linear - set(compact.quantized)),
    }


def _arguments(layer: StoredLayer, strategy: str, group_size: int | None) -> dict[str, Any]:
    return {
        "num_bits": 4 if layer.codes == "int4" else 8,
        "type": "float" if layer.codes == "fp8" else "int",
        "symmetric": layer.symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": False,
    }


def _felt(model: nn.Module, step: Quantize) -> dict[str, StoredLayer]:
    """The layers that compute with rounded weights in training; those that share a weight do so alike."""
    stored = {name: _stored(name, module, step) for name, module in _layers(model, step).items()}
    kinds = {id(model.get_submodule(name).weight): layer for name, layer in stored.items()}
    shared = {
        name: kinds[id(module.weight)]
        for name, module in model.named_modules()
        if id(getattr(module, "weight", None)) in kinds
    }
    return shared | stored


def _layers(model: nn.Module, step: Quantize) -> dict[str, Any]:
    """What is quantized, by name: a weight that two layers share is listed once, under the embedding's name."""
    from torch import nn

    found: dict[str, Any] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding) or id(module.weight) in seen:
            continue
        seen.add(id(module.weight))
        if not isinstance(module, nn.Embedding) or step.embeddings:
            found[name] = module
    for name in matching(found, step.skip):
        del found[name]
    if not found:
        raise ConfigError("steps.quantize: no layer is left to quantize", "shorten skip")
    return found


def _stored(name: str, module: Any, step: Quantize) -> StoredLayer:
    from torch import nn

    is_table = isinstance(module, nn.Embedding)
    columns = module.weight[0].numel()
    if step.group_size is not None and columns % step.group_size:
        raise ConfigError(
            f"steps.quantize: rows of {name} have {columns} weights, no multiple of group_size={step.group_size}",
            "choose another group_size, granularity channel, or add the layer to skip",
        )
    # a 4-bit table costs more quality than all layers together, and engines keep 8 bits there; codes are packed by rows
    # of matrices, which convolutions are not
    keeps_8 = is_table or module.weight.ndim != 2
    codes = "int8" if keeps_8 and step.codes == "int4" else step.codes
    return StoredLayer(
        codes=codes,
        symmetric=step.symmetric,
        granularity=step.granularity,
        group_size=step.group_size,
        activations="none" if is_table else step.activations,
    )


def _is_linear(module: nn.Module) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear)


def _codes(
    work: Workspace,
    step: Quantize,
    task: Task,
    model: nn.Module,
    layers: Mapping[str, Any],
    stored: Mapping[str, StoredLayer],
) -> Mapping[str, Codes]:
    """The codes of layers that are not simply rounded to the nearest."""
    if step.method == "nearest":
        return {}
    if step.method == "hqq":
        return {name: hqq(module.weight, stored[name]) for name, module in layers.items()}
    linear = [name for name, module in layers.items() if _is_linear(module)]
    moments = input_moments(task, model, linear, work.calibration_batches(step.calibration_rows))
    return {name: gptq(layers[name].weight, moments.pop(name), stored[name]) for name in linear}


def _state(
    model: nn.Module, layers: Mapping[str, Any], stored: Mapping[str, StoredLayer], codes: Mapping[str, Codes]
) -> dict[str, Tensor]:
    """All tensors as they are saved."""
    import torch

    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    for name, module in layers.items():
        layer = stored[name]
        weight = state.pop(f"{name}.weight")
        result = codes[name] if name in codes else quantize_weight(weight, layer)
        if layer.codes == "int4":
            state[f"{name}.weight_packed"] = pack_int4(result.codes.reshape(result.codes.shape[0], -1))
            state[f"{name}.weight_shape"] = torch.tensor(module.weight.shape)
            if result.zero_point is not None:
                packed = pack_int4(
                    result.zero_point.reshape(-1, 1 if result.scale.ndim < 2 else result.scale.shape[1]).T.contiguous()
                )
                state[f"{name}.weight_zero_point"] = packed.T.contiguous()
        else:
            state[f"{name}.weight"] = result.codes
            if result.zero_point is not None:
                state[f"{name}.weight_zero_point"] = result.zero_point
        state[f"{name}.weight_scale"] = result.scale.half() if layer.codes != "fp8" else result.scale
    return state


def _input_scale(name: str, layer: StoredLayer, low: float, high: float) -> dict[str, Tensor]:
    """Scale and zero point (1,) of inputs between `low` and `high`, which always hold 0."""
    import torch

    low, high = min(low, 0.0), max(high, 0.0)
    if layer.codes == "fp8":
        return {f"{name}.input_scale": torch.tensor([max(-low, high, _TINY) / _FP8_MAX])}
    scale = max((high - low) / 255, _TINY)
    zero_point = round(-128 - low / scale)
    return {
        f"{name}.input_scale": torch.tensor([scale]),
        f"{name}.input_zero_point": torch.tensor([zero_point], dtype=torch.int8),
    }


def weight_codes(folder: Path) -> dict[str, StoredLayer]:
    """How each quantized layer of a model folder is stored."""
    return dict(with_compact(folder).quantized)
