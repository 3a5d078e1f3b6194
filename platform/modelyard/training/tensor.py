"""Tensor parallelism by DeepSpeed's AutoTP: what the engine must know of weights that are cut over a group.

Shoeybi et al. 2019, "Megatron-LM". DeepSpeed follows the plan that transformers keeps for each architecture
(`base_model_tp_plan`): attention by heads, the feed-forward part by features, an untied output matrix by tokens.
Everything else, a tied embedding included, is whole on every worker.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from modelyard.errors import ConfigError


def require_plan(model: torch.nn.Module, size: int) -> None:
    """Refuse a model that DeepSpeed would cut by guesswork.

    Raises:
        ConfigError: transformers has no plan for the model's architecture, or DeepSpeed cannot follow it.
    """
    from deepspeed.module_inject.tp_plan_converter import TPPlanConverter
    from deepspeed.runtime.tensor_parallel.config import _get_hf_tp_plan

    name = type(model).__name__
    todo = "use training.zero_stage=3 for it, or an architecture with a plan (Llama, Qwen, Mistral, Gemma, ...)"
    plan = _get_hf_tp_plan(model)
    if not plan or not any(style.startswith("rowwise") for style in plan.values()):
        raise ConfigError(f"training.parallel.tensor={size}: transformers has no tensor-parallel plan for {name}", todo)
    try:
        TPPlanConverter.convert(plan)
    except ValueError as error:
        raise ConfigError(f"training.parallel.tensor={size}: DeepSpeed cannot cut {name}: {error}", todo) from error


def is_shard(parameter: torch.Tensor) -> bool:
    """Whether this worker has a part of the weight only."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """The whole weight, from the parts of this worker's group. Collective; leaves the parameter alone.

    DeepSpeed's own way replaces the parameter's storage, which then is no longer the one that ZeRO updates.
    """
    if not is_shard(parameter):
        return parameter.detach()
    from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META

    layout: dict[str, Any] = getattr(parameter, DS_AUTOTP_UC_META)
    if layout["sub_param_shape"] is not None or layout["partition_dim"] is None:
        raise RuntimeError(f"a weight of shape {tuple(parameter.shape)} is cut in a way that has no plain inverse")
    mine = parameter.detach().contiguous()
    parts = [torch.empty_like(mine) for _ in layout["partition_sizes"]]
    dist.all_gather(parts, mine, group=_group())
    return torch.cat(parts, dim=layout["partition_dim"])


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> float:
    """Norm of the whole model's gradient, from the gradients of this worker's parts. Collective."""
    gradients = [(parameter.grad, is_shard(parameter)) for parameter in parameters if parameter.grad is not None]
    squares = torch.zeros(2, dtype=torch.float64)
    for gradient, is_part in gradients:
        squares[int(is_part)] += float(torch.linalg.vector_norm(gradient, dtype=torch.float32)) ** 2
    parts = squares[1].to(gradients[0][0].device)
    dist.all_reduce(parts, group=_group())
    return math.sqrt(float(squares[0]) + float(parts))


def _group() -> dist.ProcessGroup:
    from deepspeed.utils import groups

    group: dist.ProcessGroup = groups.get_tensor_model_parallel_group()
    return group
