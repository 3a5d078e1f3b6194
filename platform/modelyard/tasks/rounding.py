"""Weights to codes and scales, and training that already feels the rounding.

The arithmetic is torchao's, but for 4 bits symmetric. Two grids are those of GGUF, so that engines that run GGUF files
compute with the very same weights: 8 bits symmetric in groups of 32 is Q8_0, 4 bits symmetric in groups of 32 is Q4_0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from modelyard.extras import optional
from modelyard.tasks.compact import StoredLayer, dequantize

if TYPE_CHECKING:
    from torch import Tensor, nn

_RANGES = {"int8": (-127, 127), "int4": (-8, 7)}
_FP8_MAX = 448.0
_TINY = 1e-12


class Codes(NamedTuple):
    """A quantized weight."""

    codes: Tensor
    """int8 or float8, of the weight's shape."""
    scale: Tensor
    """fp16-valued fp32 (out, groups), (out, 1) or (1,)."""
    zero_point: Tensor | None
    """int8, of the shape of `scale`."""


def quantize_weight(weight: Tensor, layer: StoredLayer) -> Codes:
    """Codes and scales of a weight (out, ...)."""
    import torch

    primitives = import_torchao("quantization.quant_primitives")
    rows = weight.shape[0]
    flat = weight.detach().float().reshape(rows, -1)
    if layer.codes == "fp8":
        largest = flat.abs().max() if layer.granularity == "tensor" else flat.abs().amax(dim=1, keepdim=True)
        scale = (largest / _FP8_MAX).clamp_min(_TINY).reshape(-1, 1)
        codes = (flat / scale).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
        return Codes(codes.reshape(weight.shape), scale if scale.numel() > 1 else scale.reshape(1), None)
    size = {"tensor": flat.shape[1], "channel": flat.shape[1], "group": layer.group_size or 1}[layer.granularity]
    block = (rows if layer.granularity == "tensor" else 1, size)
    low, high = code_range(layer)
    kind = primitives.MappingType.SYMMETRIC if layer.symmetric else primitives.MappingType.ASYMMETRIC
    scale, zero_point = primitives.choose_qparams_affine(
        flat, kind, block, torch.int8, low, high, eps=_TINY, scale_dtype=torch.float32, zero_point_dtype=torch.int32
    )
    if layer.codes == "int4" and layer.symmetric:
        scale = _signed_scale(flat, block)
    scale = scale.half().float()  # 16 bits are enough, and exact for engines that store scales so
    scale = torch.where(scale.abs() < _TINY, torch.full_like(scale, 6e-8), scale)
    codes = primitives.quantize_affine(flat, block, scale, zero_point, torch.int8, low, high)
    shape = (1,) if layer.granularity == "tensor" else (rows, flat.shape[1] // size)
    point = None if layer.symmetric else zero_point.to(torch.int8).reshape(shape)
    return Codes(codes.reshape(weight.shape), scale.reshape(shape), point)


def code_range(layer: StoredLayer) -> tuple[int, int]:
    """Least and greatest integer code."""
    return _RANGES[layer.codes] if layer.symmetric or layer.codes == "int4" else (-128, 127)


def _signed_scale(flat: Tensor, block: tuple[int, int]) -> Tensor:
    """Scales by which the largest weight of a group becomes the code -8: the whole range of 4 bits, GGUF's Q4_0."""
    rows, size = block
    grouped = flat.reshape(flat.shape[0] // rows, -1, rows * size) if rows == 1 else flat.reshape(1, 1, -1)
    index = grouped.abs().argmax(dim=2, keepdim=True)
    return grouped.gather(2, index).squeeze(2) / -8


def train_rounded(model: nn.Module, layers: Mapping[str, StoredLayer]) -> None:
    """Have the named layers compute with rounded weights (and inputs) while their own weights stay exact.

    Gradients pass the rounding unchanged (Bengio et al. 2013, straight-through). The weights are then already where
    `quantize_weight` will put them. Linear, convolution and embedding layers.
    """
    for name, layer in layers.items():
        module: Any = model.get_submodule(name)
        module.forward = _rounded_forward(module, layer)


def _rounded_forward(module: Any, layer: StoredLayer) -> Any:
    import torch
    from torch.nn import functional

    def rounded(weight: Tensor) -> Tensor:
        with torch.no_grad():
            result = quantize_weight(weight, layer)
            near = dequantize(result.codes, result.scale, result.zero_point)
        return weight + (near - weight).detach()

    def forward(x: Tensor) -> Tensor:
        weight = rounded(module.weight)
        if isinstance(module, torch.nn.Embedding):
            return functional.embedding(x, weight)
        if layer.activations != "none":
            is_image = x.ndim == 4
            step = (x.detach().abs().amax(dim=(1, 2, 3) if is_image else -1, keepdim=True) / 127).clamp_min(_TINY)
            x = x + ((x / step).round() * step - x).detach()
        if isinstance(module, torch.nn.Conv2d):
            convolved: Tensor = module._conv_forward(x, weight, module.bias)
            return convolved
        return functional.linear(x, weight, module.bias)

    return forward


def import_torchao(module: str) -> Any:
    """A module of torchao.

    Raises:
        MissingExtraError: it is not installed.
    """
    return optional(f"torchao.{module}", "torchao", "compression")
