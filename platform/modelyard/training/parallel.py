"""One model spread over several workers: which layouts there are, and what each goes together with. Pure.

Workers come in groups of `Parallel.size` neighbours (by rank). A group works on the same rows with one copy of the
model; the groups among themselves train in data parallel under ZeRO. `docs/decisions/0007-model-parallelism.md`
tells what of it a CPU can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import Field, model_validator

from modelyard.config import Config
from modelyard.errors import ConfigError

if TYPE_CHECKING:
    from modelyard.data.dataset import DatasetInfo
    from modelyard.training.checkpoints import TrainState
    from modelyard.training.config import TrainConfig

T = TypeVar("T")


class Parallel(Config):
    """How many workers hold one copy of the model together; data parallelism takes the rest."""

    tensor: int = Field(default=1, gt=0)
    """Workers that share every matrix of a layer, by attention heads and by hidden features: less memory for weights,
    gradients and optimizer states; two all-reduces per layer and pass (Shoeybi et al. 2019; DeepSpeed AutoTP)."""
    sequence: int = Field(default=1, gt=0)
    """Workers that share the tokens of every row: less memory for activations, so longer rows (Jacobs et al. 2023;
    DeepSpeed Ulysses)."""
    pipeline: int = Field(default=1, gt=0)
    """Workers that have consecutive layers, each on its own: less memory for everything, little to send, but they wait
    for each other where there are few micro-batches (Huang et al. 2019; DeepSpeed PipelineModule)."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(count > 1 for _, count in self) > 1:
            raise ValueError(
                f"{self} cannot be combined: choose one of them, and let data parallelism (ZeRO) take the other workers"
            )
        return self

    @property
    def size(self) -> int:
        """Workers of one group."""
        return self.tensor * self.sequence * self.pipeline

    @property
    def cuts_weights(self) -> bool:
        """Whether a worker has only some of the weights of its group's model."""
        return self.tensor > 1 or self.pipeline > 1

    def __str__(self) -> str:
        return ", ".join(f"{name}={count}" for name, count in self if count > 1) or "data parallel only"


ALONE = Parallel()
"""Every worker has a whole model."""


def check(config: TrainConfig) -> None:
    """Refuse what a parallel layout does not go together with.

    Raises:
        ValueError: names the field, its value, the limit and what to do.
    """
    parallel, training, workers = config.training.parallel, config.training, config.workers
    if parallel.size == 1:
        return
    said = f"training.parallel.{parallel}"
    if config.task.kind != "causal_lm":
        raise ValueError(f"{said} is for the task causal_lm (got {config.task.kind}): leave training.parallel out")
    for name, count in (("min", workers.min), ("max", workers.max)):
        if count % parallel.size:
            raise ValueError(
                f"workers.{name}={count} is no multiple of {said}: set it to a multiple of {parallel.size}"
            )
    if config.lease is not None and workers.min < workers.max:
        raise ValueError(
            f"{said} under a lease needs a fixed number of workers (got min={workers.min}, max={workers.max}), because "
            "the scheduler does not count in groups: set workers to one number"
        )
    if training.strategy.kind != "all_reduce":
        raise ValueError(
            f"{said} does not go with training.strategy={training.strategy.kind}, whose workers hold whole models: "
            "use all_reduce"
        )
    if training.compile:
        raise ValueError(f"{said} does not go with training.compile=true: set it to false")
    if parallel.tensor > 1:
        _check_tensor(config, said)
    if parallel.sequence > 1:
        _check_sequence(config, said)
    if parallel.pipeline > 1:
        _check_pipeline(config, said)


def _check_tensor(config: TrainConfig, said: str) -> None:
    if getattr(config.task, "lora", None) is not None:
        raise ValueError(
            f"{said} does not go with task.lora, whose adapters DeepSpeed cannot cut: train all weights, or use "
            "training.zero_stage=3 or training.parallel.sequence with adapters"
        )
    if config.training.zero_stage == 3 and config.workers.min < config.workers.max:
        raise ValueError(
            f"{said} with training.zero_stage=3 needs a fixed number of workers (got min={config.workers.min}, "
            f"max={config.workers.max}): DeepSpeed cannot convert its checkpoints; set one number, or zero_stage 1 or 2"
        )
    if config.optimizer.kind == "muon":
        raise ValueError(
            f"{said} does not go with optimizer muon, which has to see whole matrices: use adamw, or "
            "training.zero_stage=3 instead"
        )


def _check_sequence(config: TrainConfig, said: str) -> None:
    if config.optimizer.kind == "muon" and config.training.zero_stage == 3:
        raise ValueError(f"{said} with optimizer muon goes with training.zero_stage 1 and 2 (got 3): set it to 2")
    if config.training.noise_every_steps:
        raise ValueError(
            f"{said} does not go with training.noise_every_steps={config.training.noise_every_steps}: no worker sees "
            "the whole gradient of a micro-batch; set it to 0"
        )


def _check_pipeline(config: TrainConfig, said: str) -> None:
    training, workers = config.training, config.workers
    if training.zero_stage != 1:
        raise ValueError(
            f"{said} goes with training.zero_stage=1 (got {training.zero_stage}): DeepSpeed's pipeline adds up whole "
            "gradients, and at stage 0 it would clip by a norm that counts a shared embedding twice; set it to 1"
        )
    if workers.min < workers.max:
        raise ValueError(
            f"{said} needs a fixed number of workers (got min={workers.min}, max={workers.max}): its checkpoints are "
            "read by as many workers as wrote them; set workers to one number"
        )
    if training.noise_every_steps:
        raise ValueError(
            f"{said} does not go with training.noise_every_steps={training.noise_every_steps}: the pipeline hands over "
            "no gradient of a single micro-batch; set it to 0"
        )
    for field, refused in (
        ("precision=bf16", training.precision == "bf16"),
        ("offload_optimizer=true", training.offload_optimizer),
    ):
        if refused:
            raise ValueError(f"{said} does not go with training.{field}: leave it at its default")
    if getattr(config.task, "lora", None) is not None:
        raise ValueError(f"{said} does not go with task.lora: train all weights, or use training.zero_stage=3")
    if config.optimizer.kind == "muon":
        raise ValueError(f"{said} does not go with optimizer muon: use adamw, adam or sgd")


def check_model(config: TrainConfig, info: DatasetInfo) -> None:
    """Refuse a model or rows that cannot be cut into so many equal parts, before any worker is started.

    Raises:
        ConfigError: names the number and what has to divide it.
    """
    from modelyard.tasks.causal_lm import CausalLM

    parallel, task = config.training.parallel, config.task
    if parallel.size == 1 or not isinstance(task, CausalLM):
        return
    sizes = task.model.sizes(info)
    if parallel.pipeline > 1:
        if parallel.pipeline > sizes.layers:
            raise ConfigError(
                f"training.parallel.{parallel}: the model has {sizes.layers} layers, so a worker would have none",
                f"set it to at most {sizes.layers}",
            )
        return
    divided: dict[str, int] = {"attention heads": sizes.heads, "key/value heads": sizes.kv_heads}
    if parallel.tensor > 1:
        divided["feed-forward features"] = sizes.feed_forward
        if not sizes.tied:
            divided["tokens in the vocabulary"] = sizes.vocabulary
    if parallel.sequence > 1:
        divided["tokens in each row of the dataset"] = info.block_tokens or 0
    for what, number in divided.items():
        if number % parallel.size:
            fitting = [str(n) for n in range(2, number + 1) if all(m % n == 0 for m in divided.values())]
            raise ConfigError(
                f"training.parallel.{parallel}: it does not divide the {number} {what}",
                f"set it to one of {', '.join(fitting)}" if fitting else "leave it out, or use training.zero_stage=3",
            )


def needs_conversion(config: TrainConfig, state: TrainState, *, num_workers: int) -> bool:
    """Whether `num_workers` workers read a checkpoint in the universal format; refuses what DeepSpeed cannot convert.

    Slices of rows are no part of the state: only tensor parallelism and ZeRO cut it.

    Raises:
        ConfigError: names both layouts.
    """
    parallel, stage = config.training.parallel, config.training.zero_stage
    then, now = state.parallel.tensor, parallel.tensor
    in_stages = (state.parallel.pipeline, parallel.pipeline)
    if in_stages != (1, 1):
        if in_stages[0] == in_stages[1] and state.num_workers == num_workers:
            return False
        raise ConfigError(
            f"the checkpoint was written by {state.num_workers} worker(s) with training.parallel.pipeline="
            f"{in_stages[0]}, this is a gang of {num_workers} with pipeline={in_stages[1]}, and what a "
            "pipeline writes is not converted",
            f"set workers to {state.num_workers} and training.parallel.pipeline to {in_stages[0]}, or start a new run",
        )
    differs = then != now or (stage > 0 and state.num_workers != num_workers)
    if not differs:
        return False
    reason = ""
    if stage == 0 and then != now:
        reason = "with training.zero_stage=0 there is nothing to convert it from"
    elif stage > 0 and config.optimizer.kind == "sgd":
        reason = "DeepSpeed converts the state of Adam only"
    elif stage == 3 and now > 1:
        reason = "with training.zero_stage=3 DeepSpeed cannot cut converted weights for a tensor-parallel group"
    if reason:
        raise ConfigError(
            f"the checkpoint was written by {state.num_workers} worker(s) with training.parallel.tensor={then}, this "
            f"is a gang of {num_workers} with tensor={now}, and {reason}",
            f"set workers to {state.num_workers} and training.parallel.tensor to {then}, or start a new run",
        )
    return stage > 0


def from_groups(parts: Sequence[Sequence[T]], parallel: Parallel, added: Any = None) -> list[T]:
    """What all workers computed, each thing once, from every worker's list (by rank).

    The workers of a tensor-parallel group have computed the same; those of a sequence-parallel group have a share each,
    which `added` makes whole (a function of two shares); in a pipeline the last one has it.
    """
    groups = [parts[first : first + parallel.size] for first in range(0, len(parts), parallel.size)]
    result: list[T] = []
    for group in groups:
        whole = list(group[-1])
        if parallel.sequence > 1:
            for other in group[:-1]:
                whole = [added(one, two) for one, two in zip(whole, other, strict=True)]
        result.extend(whole)
    return result
