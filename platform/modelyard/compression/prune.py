"""Single weights to zero: by size, by size times input, by where training moves them; or two of every four.

The shapes stay, and so do file and speed on every engine here: only 2:4 kernels on GPUs make use of zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from modelyard.compression.calibration import input_norms
from modelyard.compression.recipe import Prune
from modelyard.compression.recovery import recover
from modelyard.compression.workspace import Workspace, prunable, require_plain
from modelyard.errors import ConfigError
from modelyard.tasks.movement import Movement, keep_mask

if TYPE_CHECKING:
    from torch import Tensor, nn


def prune(work: Workspace, step: Prune) -> Workspace:
    """Zero the weights of least worth in every linear and convolution layer, in rounds, with training after each.

    By movement, the masks are learned within one training (`tasks.movement`).

    Raises:
        ConfigError: the model is quantized already, or a row is no multiple of four (2:4).
        TrainingError: training failed.
    """
    require_plain(work, "prune")
    if step.criterion == "movement":
        return _by_movement(work, step)
    for number in range(1, step.rounds + 1):
        work = _zero(work, step, sparsity_after(number, step.rounds, step.sparsity))
        if step.training is not None:
            work = recover(work, step.training, keep_zeros=True)
    return work


def sparsity_after(number: int, rounds: int, final: float) -> float:
    """Sparsity after round `number` of `rounds`: cubic, most is removed early (Zhu and Gupta 2017). Pure."""
    return final * (1 - (1 - number / rounds) ** 3)


def _by_movement(work: Workspace, step: Prune) -> Workspace:
    assert step.training is not None
    layers = _layers(work.load()[1], step)
    if step.pattern == "2:4":
        for module in layers.values():
            keep_mask(module.weight.flatten(1), 0.5, "2:4")  # refuses what it will not fit, before the training
    movement = Movement(layers=tuple(layers), sparsity=step.sparsity, pattern=step.pattern)
    moved = recover(work, step.training, movement=movement)
    return replace(moved, notes=(*moved.notes, _zeros(_layers(moved.load()[1], step))))


def _zero(work: Workspace, step: Prune, share: float) -> Workspace:
    import torch

    task, model = work.load()
    layers = _layers(model, step)
    norms: dict[str, Tensor] = {}
    if step.criterion == "wanda":
        norms = input_norms(task, model, list(layers), work.calibration_batches(step.calibration_rows))
    with torch.no_grad():
        for name, module in layers.items():
            weight = module.weight
            worth = _worth(weight, norms.get(name)).flatten(1)
            weight.mul_(keep_mask(worth, share, step.pattern, per_row=step.criterion == "wanda").view_as(weight))
    return work.save(model, "pruned", task, note=_zeros(layers))


def _layers(model: nn.Module, step: Prune) -> dict[str, Any]:
    layers = prunable(model, step.skip)
    if not layers:
        raise ConfigError("steps.prune: no layer is left to prune", "shorten skip")
    return layers


def _zeros(layers: Mapping[str, Any]) -> str:
    zeros = sum(int((m.weight == 0).sum()) for m in layers.values()) / sum(m.weight.numel() for m in layers.values())
    return f"{zeros:.1%} of the weights of {len(layers)} layers are zero"


def _worth(weight: Any, norm: Tensor | None) -> Tensor:
    """What each weight (out, ...) is worth."""
    magnitude: Tensor = weight.abs()
    if norm is None:
        return magnitude
    return magnitude * (norm[None, :, None, None] if weight.ndim == 4 else norm[None, :])
