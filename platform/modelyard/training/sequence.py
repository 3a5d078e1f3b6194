"""Sequence parallelism by DeepSpeed's Ulysses: every worker of a group has a slice of each row's tokens.

Jacobs et al. 2023, "DeepSpeed Ulysses". All layers but attention work on tokens one by one; before attention two
all-to-alls give each worker all tokens of some of the heads, after it one gives the tokens back. DeepSpeed registers
its attention in place of transformers' own for the whole process and for one batch size; here it gets a name of its
own, and a kernel for each shape of a batch. The weights are ZeRO's as without it: all workers share them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from modelyard.errors import ConfigError

ATTENTION = "modelyard_ulysses"


def share_attention(model: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Let the model's attention exchange tokens for heads within `group`.

    Raises:
        ConfigError: the model's attention would not be what it was.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    net: Any = model
    size = dist.get_world_size(group)
    require_causal_attention(model, f"training.parallel.sequence={size}")
    config = net.config.get_text_config()
    AttentionInterface.register(ATTENTION, _Exchange(config, group))
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)  # causal by position
    config._attn_implementation = ATTENTION


def gradient_factor(zero: Mapping[str, Any], size: int) -> int:
    """What a slice's loss must be multiplied with so that gradients are summed over `size` slices of a row.

    DeepSpeed does so by itself, except where ZeRO-3 scatters gradients: there 0.19.8 takes the mean of the slices.
    """
    return size if zero["stage"] == 3 and zero["reduce_scatter"] else 1


class SliceGroups:
    """Who shares rows with whom, in the form that DeepSpeed asks for it ("mpu").

    Gradients are summed over the slices of a row and averaged over rows; ZeRO cuts its states over all workers.
    DeepSpeed's own (`parallel_state_sp`) takes the workers of a group for tensor-parallel ones where it clips, and can
    be made only once in a process. Made on all workers at once.
    """

    initialize_sequence_parallel = None
    """By this name DeepSpeed tells slices of rows from parts of a model."""

    def __init__(self, size: int) -> None:
        workers = range(dist.get_world_size())
        self._all = _my_group([workers])
        self._slices = _my_group([workers[first : first + size] for first in workers[::size]])
        self._alone = _my_group([[worker] for worker in workers])

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        """The workers with slices of the same rows."""
        return self._slices

    def get_sequence_parallel_world_size(self) -> int:
        """Slices of each row."""
        return dist.get_world_size(self._slices)

    def get_sequence_parallel_rank(self) -> int:
        """Which slice this worker has."""
        return dist.get_rank(self._slices)

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        """All workers: they have the same weights."""
        return self._all

    def get_sequence_data_parallel_world_size(self) -> int:
        """Number of workers."""
        return dist.get_world_size()

    def get_sequence_data_parallel_rank(self) -> int:
        """This worker."""
        return dist.get_rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """This worker alone: no weights are cut."""
        return self._alone

    def get_model_parallel_world_size(self) -> int:
        """1."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """0."""
        return 0


def _my_group(members: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """The process group among `members` that this worker is in. Every worker makes all of them."""
    mine = None
    for ranks in members:
        group = dist.new_group(list(ranks))
        mine = group if dist.get_rank() in ranks else mine
    assert isinstance(mine, dist.ProcessGroup)
    return mine


def require_causal_attention(model: torch.nn.Module, said: str) -> None:
    """Refuse a model whose attention needs more than causality: no mask comes with slices of rows, or with layers.

    Raises:
        ConfigError: names the model.
    """
    net: Any = model
    config = net.config.get_text_config()
    name, todo = type(net).__name__, "use training.zero_stage=3 and training.activation_checkpointing for it"
    if getattr(config, "_attn_implementation", None) not in ("sdpa", ATTENTION):
        raise ConfigError(f"{said}: the attention of {name} cannot be run on its own", todo)
    window = getattr(config, "sliding_window", None)
    if window is not None and window < net.row_tokens:
        raise ConfigError(
            f"{said}: {name} sees a window of {window} tokens, rows have {net.row_tokens}: it would see them all", todo
        )


class _Exchange:
    """An attention function for transformers: DeepSpeed's, one for each shape of a batch."""

    def __init__(self, config: Any, group: dist.ProcessGroup) -> None:
        self._config, self._group = config, group
        self._kernels: dict[tuple[int, int], torch.nn.Module] = {}

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention over whole rows: (B, heads, S, width) in, (B, S, heads, width) out."""
        shape = (query.shape[0], query.shape[2])
        if shape not in self._kernels:
            self._kernels[shape] = self._kernel(*shape)
        output: tuple[torch.Tensor, torch.Tensor | None]
        output = self._kernels[shape](module, query, key, value, None, **options)
        return output

    def _kernel(self, rows: int, slice_tokens: int) -> torch.nn.Module:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        config, group = self._config, self._group
        heads = config.num_attention_heads
        kernel: torch.nn.Module = UlyssesSPAttentionHF(
            attn=ALL_ATTENTION_FUNCTIONS["sdpa"],
            batch_size=rows,
            attn_head_count=heads,
            attn_head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            kv_head_count=getattr(config, "num_key_value_heads", None) or heads,
            num_hidden_layers=config.num_hidden_layers,
            process_group=group,
            local_seq_length=slice_tokens,
            global_seq_length=slice_tokens * dist.get_world_size(group),
        )
        return kernel
