"""Single weights to zero: by size, by size times input, by where training moves them; or two of every four."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelyard.compression.calibration import input_norms
from modelyard.compression.recipe import Prune
from modelyard.compression.recovery import recover
from modelyard.compression.workspace import Workspace, prunable, require_plain
from modelyard.errors import ConfigError
from modelyard.tasks import load_model

if TYPE_CHECKING:
    from torch import Tensor, nn


def prune(work: Workspace, step: Prune) -> Workspace:
    """Zero the weights of least worth in every linear and convolution layer, in rounds, with training after each.

    The shapes stay: files shrink only where zeros are stored cheaply, and speed comes from 2:4 kernels on GPUs alone.

    Raises:
        ConfigError: the model is quantized already, or a row is no multiple of four (2:4).
        TrainingError: training failed.
    """
    require_plain(work, "prune")
    for number in range(1, step.rounds + 1):
        share = sparsity_after(number, step.rounds, step.sparsity)
        if step.criterion == "movement":
            assert step.training is not None
            moved = recover(work, step.training, keep_zeros=True)
            work = _zero(moved, step, share, before=work)
        else:
            work = _zero(work, step, share)
        if step.training is not None:
            work = recover(work, step.training, keep_zeros=True)
    return work


def sparsity_after(number: int, rounds: int, final: float) -> float:
    """Sparsity after round `number` of `rounds`: cubic, most is removed early (Zhu and Gupta 2017). Pure."""
    return final * (1 - (1 - number / rounds) ** 3)


def _zero(work: Workspace, step: Prune, share: float, before: Workspace | None = None) -> Workspace:
    import torch

    task, model = work.load()
    layers = prunable(model, step.skip)
    if not layers:
        raise ConfigError("steps.prune: no layer is left to prune", "shorten skip")
    norms: dict[str, Tensor] = {}
    if step.criterion == "wanda":
        norms = input_norms(task, model, list(layers), work.calibration_batches(step.calibration_rows))
    earlier = load_model(before.folder)[1].float() if before is not None else None
    with torch.no_grad():
        for name, module in layers.items():
            weight = module.weight
            worth = _worth(name, weight, norms.get(name), earlier)
            weight.mul_(
                keep_mask(worth.flatten(1), share, step.pattern, per_row=step.criterion == "wanda").view_as(weight)
            )
    zeros = sum(int((m.weight == 0).sum()) for m in layers.values()) / sum(m.weight.numel() for m in layers.values())
    return work.save(model, "pruned", task, note=f"{zeros:.1%} of the weights of {len(layers)} layers are zero")


def _worth(name: str, weight: Any, norm: Tensor | None, earlier: nn.Module | None) -> Tensor:
    """What each weight (out, ...) is worth; zero weights are worth nothing."""
    if earlier is not None:
        # the integral of weight times its change: what Sanh et al. sum over the steps of training
        first: Any = earlier.get_submodule(name)
        moved: Tensor = weight.square() - first.weight.square()
        return moved.masked_fill(weight == 0, float("-inf"))
    magnitude: Tensor = weight.abs()
    if norm is None:
        return magnitude
    return magnitude * (norm[None, :, None, None] if weight.ndim == 4 else norm[None, :])


def keep_mask(worth: Tensor, sparsity: float, pattern: str = "unstructured", *, per_row: bool = False) -> Tensor:
    """Which weights (out, in) stay, as bool: all but the share of least worth, of the matrix, of each row or of each 4.

    Raises:
        ConfigError: a row is no multiple of four and the pattern is 2:4.
    """
    import torch

    rows, columns = worth.shape
    if pattern == "2:4":
        if columns % 4:
            raise ConfigError(f"pattern 2:4: a row of {columns} weights is no multiple of 4", "add the layer to skip")
        fours = worth.reshape(rows, -1, 4)
        keep = torch.zeros_like(fours, dtype=torch.bool).scatter_(2, fours.topk(2, dim=2).indices, True)
        return keep.reshape(rows, columns)
    flat = worth if per_row else worth.reshape(1, -1)
    count = round(flat.shape[1] * sparsity)
    drop = flat.topk(count, dim=1, largest=False).indices
    return torch.ones_like(flat, dtype=torch.bool).scatter_(1, drop, False).reshape(rows, columns)
