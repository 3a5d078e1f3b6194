"""What training on CPUs gains over DeepSpeed's and glibc's defaults; measured in decisions/0002."""

from __future__ import annotations

import ctypes
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT_BYTES = 1 << 30
"""Allocations below this size are served from memory the process already has."""


def keep_freed_memory() -> None:
    """Let malloc keep what it frees, for the rest of this process.

    glibc gives every large block back to the kernel, which clears its pages anew at the next step. Training
    allocates the same tensors at every step, so keeping them costs no memory beyond the peak. Does nothing on
    another C library.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        logger.debug("no glibc: malloc keeps its defaults")
        return
    mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, which its ZeRO does in any case, with plain functions for its compiled ones.

    Their decorator alone imports torch's whole compiler (1.3 s of CPU on each worker), and on a CPU the first Muon
    step would then wait for g++.
    """
    name = "deepspeed.runtime.zero.muon.original_muon"
    if name in sys.modules:
        return
    from deepspeed.runtime import compiler

    compile_decorator = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module(name)
    finally:
        compiler.compile = compile_decorator


def broadcast_shards_over_gloo() -> None:
    """Have ZeRO-1 and 2 spread updated parameters by broadcasts wherever the process group is Gloo's.

    DeepSpeed gathers them with one all-gather, for which Gloo copies the whole model twice more. A broadcast of
    each owner's shard sends the same bytes, straight from and into the parameters. DeepSpeed has no setting for
    it, so its module's function is replaced; a process group of another kind goes on with the original.
    """
    import deepspeed.runtime.zero.stage_1_and_2 as zero

    original = zero.all_gather_dp_groups
    if getattr(original, "broadcasts_over_gloo", False):
        return

    def all_gather_dp_groups(
        groups_flat: Any, partitioned_param_groups: Any, dp_process_group: Any, *args: Any, **kwargs: Any
    ) -> None:
        if any(dist.get_backend(group) != "gloo" for group in dp_process_group):
            original(groups_flat, partitioned_param_groups, dp_process_group, *args, **kwargs)
        else:
            _broadcast(partitioned_param_groups, dp_process_group)

    all_gather_dp_groups.broadcasts_over_gloo = True  # type: ignore[attr-defined]
    zero.all_gather_dp_groups = all_gather_dp_groups


def _broadcast(partitioned_groups: Sequence[Sequence[Any]], process_groups: Sequence[Any]) -> None:
    """Send shard i of each parameter group from worker i of its process group to all others, in place."""
    pending = [
        dist.broadcast(shard.detach(), group_src=owner, group=process_group, async_op=True)
        for shards, process_group in zip(partitioned_groups, process_groups, strict=True)
        if len(shards) > 1
        for owner, shard in enumerate(shards)
        if shard.numel() > 0
    ]
    for work in pending:
        work.wait()
