"""From the typed config to DeepSpeed's JSON. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from modelyard.errors import ConfigError, nearest
from modelyard.training.config import TrainConfig

_OWNED = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size",
    "gradient_clipping": "training.gradient_clipping",
    "bf16.enabled": "training.precision",
    "fp16.enabled": "training.precision",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "checkpoint": "checkpoint",
    "zero_optimization.stage": "training.zero_stage",
    "zero_optimization.offload_optimizer.device": "training.offload_optimizer",
    "zero_optimization.offload_param.device": "training.offload_parameters",
    "zero_force_ds_cpu_optimizer": "optimizer",
    "tensor_parallel.autotp_size": "training.parallel.tensor",
    "tensor_parallel.tp": "training.parallel.tensor",
    "tensor_parallel.vocab_parallel_lm_head": "training.parallel.tensor",
}
"""Settings that Modelyard derives, and the field to use instead."""

_REMOVED = ("elasticity", "compression_training", "amp", "nebula", "sparse_gradients", "curriculum_learning")
"""Settings DeepSpeed no longer has; it would refuse them on the workers."""

_PASSED = (
    "activation_checkpointing", "aio", "bf16", "comms_logger", "communication_data_type", "compile",
    "csv_monitor", "data_efficiency", "data_types", "dump_state", "flops_profiler", "fp16", "gradient_predivide_factor",
    "memory_breakdown", "prescale_gradients", "seq_parallel_communication_data_type", "steps_per_print",
    "tensor_parallel", "tensorboard", "torch_autocast", "use_data_before_expert_parallelism", "wall_clock_breakdown",
    "zenflow", "zero_allow_untested_optimizer", "zero_optimization",
)  # fmt: skip
"""Settings that may be given raw. DeepSpeed ignores unknown ones without a word, so they are refused here."""


_BUCKET = 100_000_000
"""Most numbers in one collective; `training.deepspeed` changes it."""


def deepspeed_config(
    config: TrainConfig,
    *,
    micro_batches: int,
    num_workers: int,
    from_universal: bool = False,
    num_trainable: int | None = None,
) -> dict[str, Any]:
    """The config of `deepspeed.initialize` for `num_workers` workers with `micro_batches` backward passes a step.

    `num_trainable`, the number of trainable weights, keeps the buffers of a small model small.
    """
    training = config.training
    zero: dict[str, Any] = {
        "stage": training.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": config.workers.gpus > 0,
        "reduce_scatter": _reduces_by_scattering(config),
        "reduce_bucket_size": _BUCKET if num_trainable is None else max(1, min(_BUCKET, num_trainable)),
        "allgather_bucket_size": _BUCKET,
    }
    if training.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": config.workers.gpus > 0}
    if training.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": config.workers.gpus > 0}
    result: dict[str, Any] = {
        # DeepSpeed checks batch = micro * accumulation * workers; the true (possibly uneven) cut is RankPlan's.
        "train_batch_size": micro_batches * num_workers,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": training.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
        "checkpoint": {"use_node_local_storage": True, "load_universal": from_universal},
    }
    if training.precision == "bf16":
        result["bf16"] = {"enabled": True}
    if config.optimizer.kind == "muon":
        muon = config.optimizer
        result["optimizer"] = {
            "type": "muon",
            "params": {
                "lr": muon.learning_rate,
                "muon_lr": muon.learning_rate,
                "adam_lr": muon.adam_learning_rate,
                "momentum": muon.momentum,
                "weight_decay": muon.weight_decay,
            },
        }
    if training.parallel.size > 1:
        del result["train_batch_size"]  # DeepSpeed would count workers at first, groups of them later
    if training.parallel.cuts_weights:
        result["checkpoint"]["use_node_local_storage"] = False  # each worker of a group has model files to write
    if training.parallel.tensor > 1:
        # The task computes its loss from whole logits.
        result["tensor_parallel"] = {"autotp_size": training.parallel.tensor, "vocab_parallel_lm_head": False}
    check_passthrough(training.deepspeed)
    return _merged(result, training.deepspeed)


def _reduces_by_scattering(config: TrainConfig) -> bool:
    """Whether each worker gets only the gradients of its shard.

    At stages 1 and 2 DeepSpeed copies gradients to scatter them (and sends them all the same); Gloo's
    all-reduce in place is faster. DeepSpeed's Muon at stage 3 needs whole gradients.
    """
    if config.training.zero_stage == 3:
        return config.optimizer.kind != "muon"
    return config.workers.gpus > 0


def check_written_by(config: TrainConfig, *, written_by: int, num_workers: int) -> None:
    """Refuse to read a checkpoint of `written_by` workers where DeepSpeed cannot convert it for `num_workers`.

    Its universal format holds Adam's two moments; the momentum of SGD and Muon stays tied to the number of shards.

    Raises:
        ConfigError: names both numbers.
    """
    kind, stage = config.optimizer.kind, config.training.zero_stage
    if stage > 0 and kind in ("sgd", "muon") and written_by != num_workers:
        raise ConfigError(
            f"optimizer {kind} with training.zero_stage={stage}: the checkpoint of {written_by} worker(s) "
            f"can be read by as many, not {num_workers}",
            f"set workers to {written_by}, or start a new run" + (" with training.zero_stage=0" * (kind == "sgd")),
        )


def check_passthrough(raw: Mapping[str, Any]) -> None:
    """Refuse raw DeepSpeed settings that Modelyard owns, that DeepSpeed dropped, or that nobody knows.

    Raises:
        ConfigError: names the setting and the field to use instead.
    """
    for key in raw:
        if key in _REMOVED:
            raise ConfigError(f"training.deepspeed.{key}: DeepSpeed has removed this setting", "delete it")
        if key not in _PASSED and key not in _OWNED:
            raise ConfigError(f"training.deepspeed.{key}: unknown key; {nearest(key, _PASSED)}")
    for path in _paths(raw):
        if (owned := _OWNED.get(path) or _OWNED.get(path.split(".")[0])) is not None:
            raise ConfigError(f"training.deepspeed.{path}: Modelyard sets this itself", f"use `{owned}` instead")


def _paths(raw: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in raw.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")


def _merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in extra.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result
