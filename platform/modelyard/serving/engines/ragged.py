"""Attention over sequences of unlike lengths in one forward pass, each with a key-value cache of its own.

The new tokens of all sequences stand in one row; linear layers see them as one matrix, attention sees each sequence
alone. So nothing is padded, prompts and answers mix, and a sequence may join or leave between any two steps (iteration-
level scheduling: Yu et al. 2022, "Orca"). transformers lets a model call a registered attention function instead of its
own; that is the only hook used.

Letters in shape comments: T new tokens of all sequences, H heads, K key-value heads, D width of a head, S tokens of one
sequence so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from modelyard.errors import InputError

ATTENTION = "modelyard_ragged"
BLOCK_TOKENS = 64
"""Caches grow by this many tokens, and budgets are counted in them."""


@dataclass(frozen=True)
class CacheShape:
    """What a token of a sequence costs."""

    layers: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token in all layers."""
        return 2 * self.layers * self.heads * self.width * self.dtype.itemsize

    def blocks(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // BLOCK_TOKENS)


class SequenceCache:
    """Keys and values of one sequence, one tensor (layers, 2, K, capacity, D)."""

    def __init__(self, shape: CacheShape) -> None:
        self._shape = shape
        self.tokens = 0
        """Tokens that all layers have seen."""
        self._data = self._empty(0)

    @property
    def blocks(self) -> int:
        """Blocks it holds now."""
        return int(self._data.shape[3]) // BLOCK_TOKENS

    def grow(self, blocks: int) -> None:
        """Make room for `blocks` in all. What is there is copied, once in `BLOCK_TOKENS` tokens."""
        if blocks > self.blocks:
            larger = self._empty(blocks)
            larger[..., : self.tokens, :] = self._data[..., : self.tokens, :]
            self._data = larger

    def write(self, layer: int, new: Tensor) -> Tensor:
        """Add a layer's keys and values of the next tokens, (2, K, T, D); all so far as (2, K, S, D)."""
        end = self.tokens + new.shape[2]
        stored = self._data[layer]
        stored[:, :, self.tokens : end] = new
        return stored[:, :, :end]

    def _empty(self, blocks: int) -> Tensor:
        s = self._shape
        return torch.empty(s.layers, 2, s.heads, blocks * BLOCK_TOKENS, s.width, dtype=s.dtype, device=s.device)


@dataclass(frozen=True)
class Segment:
    """The new tokens of one sequence: `start` to `end` of the row."""

    start: int
    end: int
    cache: SequenceCache | None
    """None: they are the whole sequence, and nothing is kept."""


def forward(
    model: nn.Module, sequences: Sequence[tuple[Sequence[int], SequenceCache | None]], **options: Any
) -> tuple[Any, list[Segment]]:
    """Run `model` over the new tokens of several sequences; their caches must have the room, and hold them after.

    Returns:
        The model's output on one row of T tokens, and where each sequence stands in it.
    """
    device = next(model.parameters()).device
    segments: list[Segment] = []
    ids: list[int] = []
    positions: list[int] = []
    for tokens, cache in sequences:
        first = cache.tokens if cache is not None else 0
        segments.append(Segment(len(ids), len(ids) + len(tokens), cache))
        ids.extend(tokens)
        positions.extend(range(first, first + len(tokens)))
    output = model(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        use_cache=False,
        segments=segments,
        **options,
    )
    for tokens, cache in sequences:
        if cache is not None:
            cache.tokens += len(tokens)
    return output, segments


def prepare(model: nn.Module) -> CacheShape:
    """Switch a transformers model to ragged attention, and find by one pass what its caches must hold.

    Raises:
        InputError: the model does not keep plain keys and values of one shape in every layer (state-space layers,
            caps on the scores, an attention of its own).
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **options: None)
    net: Any = model
    layers = int(net.config.get_text_config().num_hidden_layers)
    seen: list[tuple[int, int]] = []
    device = next(model.parameters()).device
    try:
        net.set_attn_implementation(ATTENTION)
        with torch.inference_mode():
            net(
                input_ids=torch.zeros(1, 2, dtype=torch.long, device=device),
                position_ids=torch.arange(2, device=device)[None],
                use_cache=False,
                segments=[Segment(0, 2, None)],
                seen=seen,
            )
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{type(model).__name__} cannot run on ragged attention: {error}", _OTHER) from error
    if len(seen) != layers or len(set(seen)) != 1:
        raise InputError(
            f"{type(model).__name__} has {layers} layers, {len(seen)} of them with plain attention "
            f"of {len(set(seen))} shapes",
            _OTHER,
        )
    heads, width = seen[0]
    return CacheShape(layers, heads, width, next(model.parameters()).dtype, device)


_OTHER = "choose another engine; vllm knows most architectures"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    segments: Sequence[Segment] | None = None,
    seen: list[tuple[int, int]] | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (1, H, T, D), key and value (1, K, T, D) to (1, T, H, D)."""
    if segments is None:
        raise ValueError("the model keeps its options from its attention")
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ValueError("its attention caps or shifts the scores")
    if key.shape != value.shape:
        raise ValueError("its keys and values are of unlike width")
    if seen is not None:
        seen.append((key.shape[1], key.shape[3]))
    new_2KTD = torch.stack((key[0], value[0]))
    parts = []
    for segment in segments:
        mine = new_2KTD[:, :, segment.start : segment.end]
        layer: int = module.layer_idx  # type: ignore[assignment]
        all_2KSD = mine if segment.cache is None else segment.cache.write(layer, mine)
        parts.append(_attend(query[0, :, segment.start : segment.end], all_2KSD, scaling, sliding_window))
    return torch.cat(parts)[None], None


def _attend(query: Tensor, cached: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """query (H, T, D), cached (2, K, S, D) to (T, H, D): the last T of S tokens look at all before, and themselves."""
    heads, new, width = query.shape
    kv_heads, total = cached.shape[1], cached.shape[2]
    if new == 1:
        if window is not None:
            cached = cached[:, :, -window:]
        # the heads that share keys become rows of one query, so that nothing is repeated
        grouped = query.reshape(1, kv_heads, heads // kv_heads, width)
        out = scaled_dot_product_attention(grouped, cached[0][None], cached[1][None], scale=scaling)
        return out.reshape(1, heads, width)
    mask = None
    if window is not None or new != total:
        age = torch.arange(total - new, total, device=query.device)[:, None] - torch.arange(total, device=query.device)
        mask = age >= 0 if window is None else (age >= 0) & (age < window)
    keys, values = cached.repeat_interleave(heads // kv_heads, dim=1)
    out = scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None, scale=scaling
    )
    return out[0].transpose(0, 1)
