"""What DeepSpeed is told, and which raw settings it is not given."""

from __future__ import annotations

from typing import Any

import pytest

from modelyard.config import parse
from modelyard.errors import ConfigError
from modelyard.training import TrainConfig
from modelyard.training.deepspeed_config import check_passthrough, deepspeed_config


def told(micro_batches: int = 2, num_workers: int = 3, universal: bool = False, **sections: Any) -> dict[str, Any]:
    model = {"layers": 1, "hidden_size": 8, "heads": 1}
    plain = {"name": "x", "dataset": "d", "task": {"kind": "causal_lm", "model": model}, **sections}
    config = parse(TrainConfig, plain)
    return deepspeed_config(config, micro_batches=micro_batches, num_workers=num_workers, from_universal=universal)


@pytest.mark.parametrize(
    ("raw", "path", "instead"),
    [
        ({"train_batch_size": 8}, "train_batch_size", "training.global_batch_size"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu", "training.micro_batch_size"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps", "training.micro_batch_size"),
        ({"gradient_clipping": 1.0}, "gradient_clipping", "training.gradient_clipping"),
        ({"bf16": {"enabled": True}}, "bf16.enabled", "training.precision"),
        ({"fp16": {"enabled": True}}, "fp16.enabled", "training.precision"),
        ({"optimizer": {"type": "Adam"}}, "optimizer", "optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler", "schedule"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint", "checkpoint"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage", "training.zero_stage"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device",
            "training.offload_optimizer",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            "zero_optimization.offload_param.device",
            "training.offload_parameters",
        ),
    ],
)
def test_a_setting_with_a_field_of_its_own_is_refused_and_the_field_is_named(
    raw: dict[str, Any], path: str, instead: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_passthrough(raw)
    assert f"training.deepspeed.{path}: Modelyard sets this itself" in str(caught.value)
    assert f"use `{instead}` instead" in str(caught.value)


@pytest.mark.parametrize("key", ["elasticity", "amp", "sparse_gradients"])
def test_a_setting_that_deepspeed_dropped_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"training.deepspeed.{key}: DeepSpeed has removed"):
        check_passthrough({key: {}})


def test_a_misspelt_setting_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"training\.deepspeed\.zero_optimisation.*did you mean 'zero_optimization'"):
        check_passthrough({"zero_optimisation": {}})


def test_every_deepspeed_config_is_checked_for_conflicts() -> None:
    with pytest.raises(ConfigError, match="train_batch_size"):
        told(training={"deepspeed": {"train_batch_size": 3}})


def test_raw_settings_are_merged_into_the_generated_sections() -> None:
    raw = {"zero_optimization": {"reduce_bucket_size": 5, "offload_optimizer": {"ratio": 0.5}}, "dump_state": True}
    zero = told(training={"deepspeed": raw, "offload_optimizer": True, "zero_stage": 2})["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage"]) == (5, 2)
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False, "ratio": 0.5}
    assert told(training={"deepspeed": raw})["dump_state"] is True


def test_the_batch_sizes_satisfy_deepspeeds_own_check() -> None:
    made = told(micro_batches=4, num_workers=6)
    product = made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"] * 6
    assert made["train_batch_size"] == product


def test_offloading_pins_memory_only_where_there_are_gpus() -> None:
    training = {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}
    assert told(training=training)["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": False}
    with_gpus = told(training=training, workers={"gpus": 1})["zero_optimization"]
    assert with_gpus["offload_optimizer"]["pin_memory"] is True
    assert with_gpus["overlap_comm"] is True


def test_bf16_is_switched_on_only_when_asked_for() -> None:
    assert "bf16" not in told()
    assert told(training={"precision": "bf16"})["bf16"] == {"enabled": True}


def test_muon_is_deepspeeds_own_and_gets_both_learning_rates() -> None:
    made = told(
        optimizer={"kind": "muon", "learning_rate": 0.5, "adam_learning_rate": 0.25, "momentum": 0.8},
        training={"gradient_clipping": 0},
    )
    params = made["optimizer"]["params"]
    assert made["optimizer"]["type"] == "muon"
    assert (params["muon_lr"], params["adam_lr"], params["momentum"]) == (0.5, 0.25, 0.8)
    assert "optimizer" not in told()


def test_the_universal_format_is_read_only_when_the_gang_has_another_size() -> None:
    assert told(universal=True)["checkpoint"]["load_universal"] is True
    assert told()["checkpoint"]["load_universal"] is False
