"""Scales that lose least over all of a group's weights rather than those that hold its largest one; needs no data.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". The solver is torchao's for scales
alone: a zero point that it would move lies between two codes, and the grids here hold whole ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelyard.tasks.compact import StoredLayer
from modelyard.tasks.rounding import Codes, code_range, import_torchao

if TYPE_CHECKING:
    from torch import Tensor

_SOLVER = "_choose_qparams_and_quantize_scale_only_hqq"
_OUTERMOST = 0.4
"""How far below the outermost code the largest weight of a group may lie, in codes; it must still be rounded to it."""


def hqq(weight: Tensor, layer: StoredLayer) -> Codes:
    """Codes and scales of a weight (out, ...) on a symmetric grid.

    The largest weight of a group keeps the outermost code: by it GGUF's quantizer finds the same scale again.
    """
    import torch

    rows = 1 if layer.granularity == "tensor" else weight.shape[0]
    flat = weight.detach().float().reshape(rows, -1)
    size = layer.group_size if layer.granularity == "group" and layer.group_size is not None else flat.shape[1]
    grouped = flat.reshape(rows, -1, size)
    low, high = code_range(layer)
    largest = grouped.gather(2, grouped.abs().argmax(dim=2, keepdim=True))  # (rows, groups, 1)
    turn = torch.where((largest > 0) & (-low > high), -1.0, 1.0)  # 4 bits reach one code further down than up
    turned = grouped * turn
    solve = getattr(import_torchao("quantization.quant_primitives"), _SOLVER)
    scale = solve(turned.reshape(flat.shape), [1, size], low, high)[1][:, :, None]
    scale = torch.minimum(scale, largest.abs() / (-low - _OUTERMOST)).half().float()
    scale = torch.where(scale == 0, torch.full_like(scale, 6e-8), scale)
    codes = (turned / scale).round().clamp(low, high).to(torch.int8)
    shape = (1,) if layer.granularity == "tensor" else (rows, flat.shape[1] // size)
    return Codes(codes.reshape(weight.shape), (scale * turn).reshape(shape), None)


def why_not_hqq() -> str | None:
    """Why the torchao that is installed has no solver; None if it has."""
    if hasattr(import_torchao("quantization.quant_primitives"), _SOLVER):
        return None
    return f"the torchao that is installed has no {_SOLVER.lstrip('_')}"
