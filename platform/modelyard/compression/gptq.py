"""Rounding one column of a weight after another, each error made good for by the columns that are left.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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
    is_grouped = layer.granularity == "group" and layer.group_size is not None
    size = layer.group_size if is_grouped and layer.group_size is not None else columns
    first = quantize_weight(left, layer)
    scale, zero_point = first.scale.clone(), first.zero_point
    codes = torch.empty(rows, columns, dtype=torch.int8)
    held: _Held | None = None
    block = size * max(1, _BLOCK // size) if is_grouped else _BLOCK
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.zeros(rows, stop - start)
        for column in range(start, stop):
            group = column // size
            if is_grouped and column % size == 0:
                fresh = quantize_weight(left[:, column : column + size], layer)
                scale[:, group] = fresh.scale[:, 0]
                if zero_point is not None and fresh.zero_point is not None:
                    zero_point[:, group] = fresh.zero_point[:, 0]
                held = _largest(left[:, column : column + size], fresh.codes, column) if layer.symmetric else None
            codes[:, column], near = _rounded(left[:, column], scale, zero_point, group, layer, held, column)
            error = (left[:, column] - near) / spread[column, column]
            left[:, column:stop] -= error[:, None] * spread[column, column:stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ spread[start:stop, stop:]
    return Codes(codes, scale, zero_point)


class _Held(NamedTuple):
    """The weight of each row that its group's scale comes from; with another code, GGUF would find another scale."""

    column: Tensor
    """(out,)"""
    code: Tensor
    """(out,)"""


def _largest(weights: Tensor, codes: Tensor, start: int) -> _Held:
    index = weights.abs().argmax(dim=1, keepdim=True)
    return _Held(index[:, 0] + start, codes.gather(1, index)[:, 0])


def _rounded(
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group: int,
    layer: StoredLayer,
    held: _Held | None,
    column: int,
) -> tuple[Tensor, Tensor]:
    """Codes of one column (out,), and what they stand for."""
    import torch

    step = scale[:, group] if scale.ndim == 2 else scale
    point = torch.zeros(1)
    if zero_point is not None:
        point = (zero_point[:, group] if zero_point.ndim == 2 else zero_point).float()
    code = (torch.round(values / step) + point).clamp(*code_range(layer))
    if held is not None:
        code = torch.where(held.column == column, held.code.float(), code)
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
