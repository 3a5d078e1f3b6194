"""Model folders whose layers are stored smaller than they are built: quantized weights, and weights of low rank.

`compact.json` says how each layer is stored. The tensors are laid out as the `compressed-tensors` package does
(https://github.com/neuralmagic/compressed-tensors), which vLLM and transformers read too: `X.weight` holds codes (int8
or float8), or `X.weight_packed` 4-bit codes, eight to an int32; `X.weight_scale` and `X.weight_zero_point` turn them
back: `weight = (code - zero_point) * scale`. A layer of low rank is stored as two factors, `X.0.weight`, `X.1.weight`.

Reading needs torch alone. On the CPU the weights become fp32 again, so that whatever runs the model runs it as before;
an engine with kernels for small weights is given the codes on their own grid.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError

from modelyard.config import Config
from modelyard.errors import IntegrityError

if TYPE_CHECKING:
    from torch import Tensor, nn

COMPACT_FILE = "compact.json"
_CODES_PER_INT32 = 8


class StoredLayer(Config):
    """How the weight of one layer is stored."""

    codes: Literal["int8", "int4", "fp8"]
    """`fp8` is e4m3."""
    symmetric: bool = True
    """Whether the zero point is 0 everywhere."""
    granularity: Literal["tensor", "channel", "group"] = "channel"
    """What shares a scale: all of the weight, each row, or `group_size` weights of a row."""
    group_size: int | None = None
    activations: Literal["none", "dynamic", "static"] = "none"
    """How the layer's inputs are rounded to the same kind of codes: not, per token, or on a calibrated scale."""


class Compact(Config):
    """The content of `compact.json`."""

    format_version: Literal[1] = 1
    quantized: dict[str, StoredLayer] = {}
    """Layer name to how it is stored."""
    ranks: dict[str, int] = Field(default_factory=dict)
    """Layer name to the rank of its two factors."""

    def write(self, folder: Path) -> None:
        """Write `compact.json`; nothing when no layer is special."""
        if self.quantized or self.ranks:
            (folder / COMPACT_FILE).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_compact(folder: Path) -> Compact | None:
    """How the layers in `folder` are stored; None for a plain folder.

    Raises:
        IntegrityError: `compact.json` is damaged.
    """
    path = folder / COMPACT_FILE
    if not path.is_file():
        return None
    try:
        return Compact.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise IntegrityError(f"{str(path)!r} is damaged: {error}") from error


def load_compact(model: nn.Module, folder: Path, compact: Compact) -> nn.Module:
    """`model`, freshly built and fp32, with the layers and weights of `folder`.

    Raises:
        IntegrityError: the weights are not those that the model needs.
    """
    import torch

    state = read_state(folder, compact)
    for name, rank in compact.ranks.items():
        set_layer(model, name, low_rank_layer(model.get_submodule(name), rank))
    scales = {name: state.pop(name) for name in list(state) if name.endswith((".input_scale", ".input_zero_point"))}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    if wrong := sorted((set(missing) - tied) | set(unexpected)):
        raise IntegrityError(
            f"{str(folder)!r} does not hold this model: {len(wrong)} tensors differ, e.g. {wrong[0]!r}"
        )
    if (tie := getattr(model, "tie_weights", None)) is not None:
        tie()
    for name, layer in compact.quantized.items():
        if layer.activations != "none":
            scale = scales.get(f"{name}.input_scale")
            zero_point = scales.get(f"{name}.input_zero_point", torch.zeros(1))
            round_inputs(model.get_submodule(name), layer, scale, zero_point)
    return model


def read_state(folder: Path, compact: Compact) -> dict[str, Tensor]:
    """All tensors of a folder by the names of the built model, quantized ones back in fp32.

    Raises:
        IntegrityError: a file is damaged, or a layer's tensors are not all there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            state |= load_file(path)
        for name, layer in compact.quantized.items():
            state[f"{name}.weight"] = _weight(state, name, layer)
    except (SafetensorError, OSError, KeyError, RuntimeError, ValueError) as error:
        raise IntegrityError(f"the weights in {str(folder)!r} cannot be read: {error}") from error
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _weight(state: dict[str, Tensor], name: str, layer: StoredLayer) -> Tensor:
    scale = state.pop(f"{name}.weight_scale").float()
    zero_point = state.pop(f"{name}.weight_zero_point", None)
    shape = state.pop(f"{name}.weight_shape", None)
    if layer.codes == "int4":
        assert shape is not None
        codes = unpack_int4(state.pop(f"{name}.weight_packed"), tuple(shape.tolist()))
        if zero_point is not None:
            groups = scale.shape[1] if scale.ndim == 2 else 1
            zero_point = unpack_int4(zero_point.T.contiguous(), (groups, scale.numel() // groups)).T
    else:
        codes = state.pop(f"{name}.weight")
    return dequantize(codes, scale, zero_point)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Codes (out, ...) and scales (out, groups), (out, 1) or (1,) -> fp32 weights of the shape of the codes."""
    rows = codes.shape[0]
    if scale.numel() == 1:
        scale = scale.reshape(1, 1)
        zero_point = zero_point.reshape(1, 1) if zero_point is not None else None
    grouped = codes.float().reshape(rows, scale.shape[1], -1)
    if zero_point is not None:
        grouped = grouped - zero_point.float()[:, :, None]
    return (grouped * scale.float()[:, :, None]).reshape(codes.shape)


def pack_int4(codes: Tensor) -> Tensor:
    """int8 codes in -8..7 (out, in) -> int32 (out, ceil(in / 8)): code + 8 in four bits, the first lowest."""
    import torch
    from torch.nn import functional

    padded = functional.pad((codes.to(torch.int32) + 8) & 15, (0, -codes.shape[1] % _CODES_PER_INT32))
    grouped = padded.reshape(codes.shape[0], -1, _CODES_PER_INT32).to(torch.int64)
    packed = (grouped << torch.arange(0, 32, 4)).sum(dim=2)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def unpack_int4(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The int8 codes that `pack_int4` was given; `shape` is theirs, (out, in)."""
    import torch

    codes = (packed[:, :, None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    return (codes.reshape(packed.shape[0], -1)[:, : shape[1]] - 8).to(torch.int8)


def set_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the one called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def low_rank_layer(linear: nn.Module, rank: int) -> nn.Sequential:
    """Two linear layers, fresh, that stand for `linear` (out, in): (rank, in), then (out, rank) with its bias."""
    from torch import nn

    assert isinstance(linear, nn.Linear)
    has_bias = linear.bias is not None
    return nn.Sequential(
        nn.Linear(linear.in_features, rank, bias=False), nn.Linear(rank, linear.out_features, bias=has_bias)
    )


def round_inputs(module: nn.Module, layer: StoredLayer, scale: Tensor | None, zero_point: Tensor) -> None:
    """Have `module` round its inputs as an integer kernel would; `scale` and `zero_point` (1,) when static.

    Dynamic: symmetric, one scale for each token (row of the last axis), or for each image.
    """
    import torch
    from torch import nn

    low, high = (-128, 127) if layer.codes != "fp8" else (0, 0)
    is_image = isinstance(module, nn.Conv2d)

    def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        if layer.activations == "static":
            assert scale is not None
            step, shift = scale, zero_point
        else:
            largest = x.abs().amax(dim=(1, 2, 3) if is_image else -1, keepdim=True)
            step = (largest / (448.0 if layer.codes == "fp8" else 127.0)).clamp_min(1e-12)
            shift = torch.zeros(1)
        if layer.codes == "fp8":
            rounded = (x / step).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * step
        else:
            rounded = (torch.clamp(torch.round(x / step) + shift, low, high) - shift) * step
        return (rounded, *inputs[1:])

    module.register_forward_pre_hook(before)
