"""A model wrapped in a DeepSpeed engine: the only file that calls DeepSpeed to compute."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from modelyard.training.batching import RankPlan
from modelyard.training.config import SGD, AdamW, Muon, TrainConfig
from modelyard.training.cpu import broadcast_shards_over_gloo, import_muon_uncompiled, keep_freed_memory
from modelyard.training.deepspeed_config import deepspeed_config
from modelyard.training.noise import NoiseMeter, Norms
from modelyard.training.pipeline import StagedModel, gathered, in_stages
from modelyard.training.schedule import rate_factor
from modelyard.training.sequence import SliceGroups, gradient_factor, share_attention
from modelyard.training.tensor import gradient_norm, is_shard, require_plan, whole

logger = logging.getLogger(__name__)


class Engine:
    """Forward, backward and optimizer step under ZeRO.

    Built on every worker at once (it runs collectives). `module` is the plain model inside.
    """

    spread = 0
    is_claiming = False
    sent_bytes: int | None = None

    def __init__(
        self,
        model: torch.nn.Module,
        config: TrainConfig,
        plan: RankPlan,
        *,
        num_workers: int,
        from_universal: bool = False,
    ) -> None:
        deepspeed = import_deepspeed()
        self.tensor = config.training.parallel.tensor
        if self.tensor > 1:
            require_plan(model, self.tensor)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self._net, self._stages = model, config.training.parallel.pipeline
        if self._stages > 1:
            model = in_stages(model, self._stages)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        settings = deepspeed_config(
            config,
            micro_batches=len(plan.micro_batches),
            num_workers=num_workers,
            from_universal=from_universal,
            num_trainable=sum(parameter.numel() for parameter in trainable),
        )
        if trainable[0].device.type == "cpu":
            keep_freed_memory()
            import_muon_uncompiled()
            broadcast_shards_over_gloo()
        sequence = config.training.parallel.sequence
        self._scale = plan.loss_scale * gradient_factor(settings["zero_optimization"], sequence)
        self._rows_weight = plan.loss_scale / len(plan.micro_batches)  # of a row's gradient, once DeepSpeed divided
        self._meter = NoiseMeter(model) if config.training.noise_every_steps else None
        self._config, self._plan = config, plan
        self.stage = config.training.zero_stage
        slices = self._slices(model, sequence)
        self._engine, optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=None if isinstance(config.optimizer, Muon) else _optimizer(model, config.optimizer),
            model_parameters=_tagged_for_muon(model) if isinstance(config.optimizer, Muon) else trainable,
            config=settings,
            dist_init_required=False,
            mpu=slices,
        )
        self._staged = StagedModel(self._engine, self._scale) if self._stages > 1 else None
        self._optimizer = optimizer
        self._peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self._settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        if self._meter is not None and self.tensor > 1:
            self._meter.weigh([self.tensor if is_shard(parameter) else 1 for parameter in trainable])
        if config.training.compile:
            self._engine.compile()

    @staticmethod
    def _slices(model: torch.nn.Module, size: int) -> SliceGroups | None:
        from deepspeed.utils import groups

        groups.mpu = None  # of an engine before this one in the same process
        if size == 1:
            return None
        slices = SliceGroups(size)
        share_attention(model, slices.get_sequence_parallel_group())
        return slices

    @property
    def model(self) -> torch.nn.Module:
        """The engine itself, callable like the model; forward passes must go through it."""
        engine: torch.nn.Module = self._staged or self._engine
        return engine

    @property
    def module(self) -> torch.nn.Module:
        """The model inside (its parameters are partitioned under ZeRO-3, and elsewhere in a pipeline)."""
        return self._net

    @property
    def is_whole(self) -> bool:
        """Whether `module` holds all weights: they are partitioned under ZeRO-3, in tensor groups and in pipelines."""
        return self.stage < 3 and self.tensor == 1 and self._staged is None

    def parts(self, step: int) -> Iterator[RankPlan]:
        """This worker's fixed part of every global batch."""
        yield self._plan

    def backward(self, row_losses_b: torch.Tensor, *, is_last: bool, measure_rows: int = 0) -> None:
        """Add the gradient of the global batch's mean loss that comes from these rows, shape (B,).

        With `measure_rows`, the number of rows of weight 1, its norm goes into `take_norms`.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        meter = self._meter if measure_rows else None
        if meter is not None:
            meter.begin()
        # DeepSpeed divides by the number of micro-batches and of workers; loss_scale makes that a mean over rows.
        self._engine.backward(row_losses_b.sum() * self._scale)
        if meter is not None:
            meter.end(measure_rows, self._rows_weight * measure_rows)
        if not is_last:
            self._engine.step()

    def take_norms(self) -> Norms:
        """Norms of this worker's micro-batches that were measured since the last call.

        A tensor-parallel group has measured the same micro-batches: the mean of its workers' sums is what they are.
        """
        return self._meter.take() if self._meter is not None else Norms()

    def step(self, step: int) -> tuple[float, float]:
        """Apply the accumulated gradient as optimizer step `step` (0-based).

        Returns the learning rate and the global gradient norm before clipping.
        """
        factor = rate_factor(self._config.schedule, step, self._config.training.max_steps)
        # Asked for anew each time: loading a checkpoint replaces the group objects.
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        norm = self._unsharded_norm() if self.stage == 0 else None
        if self._staged is not None:
            self._staged.step()
        else:
            self._engine.step()
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        return self._peaks[0] * factor, float(norm)

    def _unsharded_norm(self) -> float:
        """DeepSpeed clips without telling the norm at stage 0."""
        if self.tensor > 1:
            return gradient_norm(self.module.parameters())
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    @contextlib.contextmanager
    def published(self) -> Iterator[torch.nn.Module]:
        """Gives `model`: all workers hold the weights that would be published, at every step."""
        yield self.model

    def save(self, folder: Path, tag: str) -> None:
        """Write this worker's part of the training state below `folder/tag`. Collective."""
        (folder / tag).mkdir(parents=True, exist_ok=True)  # DeepSpeed makes it on some workers only
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str, *, weights_only: bool = False) -> None:
        """Read the state below `folder/tag`, universal or of this very number of workers. Collective."""
        loaded, _ = self._engine.load_checkpoint(
            str(folder), tag=tag, load_module_only=weights_only, load_optimizer_states=not weights_only
        )
        if loaded is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint {tag!r} in {folder}")
        self._own_optimizer_state()

    def _own_optimizer_state(self) -> None:
        """Undo what a load does to the optimizer: its settings are the config's, and its groups share nothing.

        DeepSpeed's universal ZeRO-3 restore gives every group the settings of the first, and one `step` tensor
        to all of them, which then counts once per group and step.
        """
        for group, settings in zip(self._optimizer.param_groups, self._settings, strict=True):
            group.update(settings)
        inner = getattr(self._optimizer, "optimizer", self._optimizer)
        for state in inner.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    def full_state(self) -> dict[str, torch.Tensor]:
        """Copies of all weights on the CPU, for saving the model. Collective; only rank 0 gets them."""
        state: dict[str, torch.Tensor] = {}
        if self._staged is not None:
            return gathered(self._net, self._stages)
        is_main = torch.distributed.get_rank() == 0
        deepspeed = import_deepspeed()
        # One parameter at a time, so that no worker needs memory for the whole model beside its own part.
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            context = deepspeed.zero.GatheredParameters([parameter]) if self.stage == 3 else contextlib.nullcontext()
            with context:
                value = whole(parameter) if self.tensor > 1 else parameter.detach()
                if is_main:
                    state[name] = value.cpu().clone()
        if is_main:
            persistent = self.module.state_dict().keys()
            for name, buffer in self.module.named_buffers(remove_duplicate=False):
                if name in persistent:
                    state[name] = buffer.detach().cpu().clone()
        return state

    def close(self) -> None:
        """Nothing to let go of."""


def clipped(gradient: torch.Tensor, limit: float, square: float | None = None) -> float:
    """Scale a gradient in place to the norm `limit` (0 clips nothing); its norm before.

    `square`: the squared norm of the whole gradient, where this is a part of it.
    """
    norm = math.sqrt(square) if square is not None else float(torch.linalg.vector_norm(gradient))
    if 0 < limit < norm + 1e-6:
        gradient *= limit / (norm + 1e-6)
    return norm


def import_deepspeed() -> Any:
    """DeepSpeed without its start-up costs on a CPU and without its chatter.

    On Linux CPUs `init_distributed` compiles a shared-memory operator (a minute or more) that only inference
    uses; it is switched off. Its autotuner, which nothing here uses, imports all of MLflow (3 s of CPU on each
    worker) if it can; it is told that there is none.
    """
    if "deepspeed" not in sys.modules:
        absent = "mlflow" not in sys.modules
        if absent:
            sys.modules["mlflow"] = None  # type: ignore[assignment]
        try:
            importlib.import_module("deepspeed")
        finally:
            if absent:
                del sys.modules["mlflow"]
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def _optimizer(model: torch.nn.Module, config: AdamW | SGD) -> torch.optim.Optimizer:
    return torch_optimizer(_parameter_groups(model, config.weight_decay), config)


def torch_optimizer(groups: list[dict[str, Any]], config: AdamW | SGD) -> torch.optim.Optimizer:
    """Torch's own optimizer for `groups` of parameters, each with its `weight_decay`."""
    if isinstance(config, SGD):
        return torch.optim.SGD(
            groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.nesterov, foreach=False
        )
    kernel = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
    return kernel(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def _parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices, which decay, and vectors, which do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _tagged_for_muon(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Mark hidden matrices for Muon and embeddings, output heads and vectors for Adam, as DeepSpeed asks."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        embeddings.add(id(head.weight))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in model.parameters():
        setattr(parameter, "use_muon", parameter.ndim == 2 and id(parameter) not in embeddings)  # noqa: B010
    return trainable
