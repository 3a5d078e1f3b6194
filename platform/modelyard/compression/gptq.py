"""Rounding one column of a weight after another, each error made good for by the columns that are left.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelyard.tasks.compact import StoredLayer
from modelyard.tasks.rounding import Codes, code_range, quantize_weight

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 128
_DAMPING = 0.01
"""Share of the mean diagonal that is added to it, so that it can be inverted."""


def gptq(weight: Tensor, moments: Tensor, layer: StoredLayer) -> Codes:
    """Codes and scales of a weight (out, in) that lose least on inputs with second moments (in, in)."""
    import torch

    left = weight.detach().float().clone()
    spread = _inverse_root(moments)
    rows, columns = left.shape
    size = layer.group_size if layer.granularity == "group" and layer.group_size is not None else columns
    first = quantize_weight(left, layer)
    scale, zero_point = first.scale.expand(rows, -1).clone() if size < columns else first.scale, first.zero_point
    codes = torch.empty(rows, columns, dtype=torch.int8)
    block = size * max(1, _BLOCK // size) if size < columns else _BLOCK
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.zeros(rows, stop - start)
        for column in range(start, stop):
            group = column // size
            if size < columns and column % size == 0:
                fresh = quantize_weight(left[:, column : column + size], layer)
                scale[:, group] = fresh.scale[:, 0]
                if zero_point is not None and fresh.zero_point is not None:
                    zero_point[:, group] = fresh.zero_point[:, 0]
            codes[:, column], near = _rounded(left[:, column], scale, zero_point, group, layer)
            error = (left[:, column] - near) / spread[column, column]
            left[:, column:stop] -= error[:, None] * spread[column, column:stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ spread[start:stop, stop:]
    return Codes(codes, scale, zero_point)


def _rounded(
    values: Tensor, scale: Tensor, zero_point: Tensor | None, group: int, layer: StoredLayer
) -> tuple[Tensor, Tensor]:
    """Codes of one column (out,), and what they stand for."""
    import torch

    step = scale[:, group] if scale.ndim == 2 else scale
    point = torch.zeros(1)
    if zero_point is not None:
        point = (zero_point[:, group] if zero_point.ndim == 2 else zero_point).float()
    code = (torch.round(values / step) + point).clamp(*code_range(layer))
    return code.to(torch.int8), (code - point) * step


def _inverse_root(moments: Tensor) -> Tensor:
    """The upper triangular root of the inverse of the damped moments: row i tells how columns after i make good."""
    import torch

    damped = moments.double().clone()
    diagonal = damped.diagonal()
    diagonal += _DAMPING * diagonal.mean().clamp_min(1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    root: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return root.float()
