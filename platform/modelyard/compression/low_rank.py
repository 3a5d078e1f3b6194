"""Linear layers as two thinner ones, and adapters of low rank added to their base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelyard.compression.calibration import input_moments
from modelyard.compression.quantize import write_compact
from modelyard.compression.recipe import Factorize, MergeLora
from modelyard.compression.workspace import Workspace, matching, prunable, require_plain
from modelyard.errors import ConfigError
from modelyard.tasks import CausalLM
from modelyard.tasks.compact import Compact
from modelyard.tasks.lora import ADAPTER_FOLDER

if TYPE_CHECKING:
    from torch import Tensor

_LEAST = 1e-6
"""Of the mean second moment: what no input of the calibration ever used is not free to change."""


def factorize(work: Workspace, step: Factorize) -> Workspace:
    """Replace linear layers by their best approximation of a lower rank.

    The result runs on torch: formats with fixed architectures (GGUF) have no place for two layers in one.

    Raises:
        ConfigError: the model is quantized already, or has no such layer.
    """
    require_plain(work, "factorize")
    task, model = work.load()
    linear = {name: module for name, module in prunable(model).items() if module.weight.ndim == 2}
    chosen = sorted(matching(linear, step.layers))
    if not chosen:
        raise ConfigError(
            f"steps.factorize.layers: no linear layer is called {' or '.join(step.layers)}",
            f"the model has, among others, {next(iter(linear), 'none')}",
        )
    moments: dict[str, Tensor] = {}
    if step.scaled:
        moments = input_moments(task, model, chosen, work.calibration_batches(step.calibration_rows))
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in _tied(model)}
    ranks, lost = {}, 0.0
    for name in chosen:
        weight = state.pop(f"{name}.weight")
        out, columns = weight.shape
        ranks[name] = rank = max(1, int(step.size * out * columns / (out + columns)))
        seen = moments.get(name)
        first, second = low_rank(weight, rank, seen)
        lost += _energy(second @ first - weight, seen) / _energy(weight, seen) / len(chosen)
        state[f"{name}.0.weight"], state[f"{name}.1.weight"] = first, second
        if f"{name}.bias" in state:
            state[f"{name}.1.bias"] = state.pop(f"{name}.bias")
    folder = work.new_folder("factorized")
    write_compact(folder, work.folder, state, Compact(ranks=ranks), (), model)
    return work.moved(folder, f"{len(chosen)} layers of {step.size:.0%} size hold {1 - lost:.1%} of their energy")


def low_rank(weight: Tensor, rank: int, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors (rank, in) and (out, rank) whose product is nearest to `weight` (out, in).

    With second moments (in, in) of the inputs, the outputs are nearest, as in Wang et al. 2025, "SVD-LLM": the inputs
    are whitened before the singular values are cut.
    """
    import torch

    if moments is None:
        moments = torch.eye(weight.shape[1])
    values, vectors = torch.linalg.eigh(moments.double())
    size = values.clamp_min(_LEAST * values.mean()).sqrt()  # of the inputs, along the directions of `vectors`
    u, s, v = torch.linalg.svd(weight.double() @ vectors * size, full_matrices=False)
    root = s[:rank].sqrt()
    first = (root[:, None] * v[:rank] / size) @ vectors.T
    return first.to(weight.dtype), (u[:, :rank] * root).to(weight.dtype)


def _energy(weight: Tensor, moments: Tensor | None) -> float:
    """Sum of squares of the outputs; without moments, of the weights."""
    return float(((weight if moments is None else weight @ moments) * weight).sum())


def merge_lora(work: Workspace, step: MergeLora) -> Workspace:
    """Add the adapter that lies beside a model's weights to them.

    Raises:
        ConfigError: there is none.
    """
    if not (work.folder / ADAPTER_FOLDER).is_dir():
        raise ConfigError(
            "steps.merge_lora: the model has no adapter beside its weights",
            "train it with lora.merge_at_end: false, or leave the step out",
        )
    task, model = work.load()
    merged: Any = model
    plain = merged.merge_and_unload()
    assert isinstance(task, CausalLM)
    return work.save(plain, "merged", task.with_changes(lora=None), note="the adapter is part of the weights")


def _tied(model: Any) -> set[str]:
    return set(getattr(model, "all_tied_weights_keys", {}) or {})
