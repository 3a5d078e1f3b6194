"""Training configs: what cannot work is refused with the field, the value and the limit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from modelyard.config import load, parse
from modelyard.errors import ConfigError
from modelyard.training import TrainConfig
from modelyard.training.config import Adam, AdamW, Muon, Workers
from modelyard.training.strategies import AllReduce, Gossip, ParameterServer

MODEL = {"layers": 1, "hidden_size": 8, "heads": 1}


def build(**sections: Any) -> TrainConfig:
    plain = {"name": "x", "dataset": "datasets:/d", "task": {"kind": "causal_lm", "model": MODEL}, **sections}
    return parse(TrainConfig, plain)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"training": {"zero_stage": 4}}, ["training.zero_stage", "less than or equal to 3", "got 4"]),
        ({"training": {"zero_stage": -1}}, ["training.zero_stage", "greater than or equal to 0", "got -1"]),
        ({"training": {"max_steps": 0}}, ["training.max_steps", "greater than 0", "got 0"]),
        ({"training": {"precision": "fp16"}}, ["training.precision", "'fp32' or 'bf16'", "fp16"]),
        ({"training": {"offload_optimizer": True, "zero_stage": 0}}, ["offload_optimizer", "1, 2 or 3", "got 0"]),
        ({"training": {"offload_parameters": True, "zero_stage": 2}}, ["offload_parameters", "3", "got 2"]),
        ({"workers": {"min": 3, "max": 2}}, ["workers", "min=3", "max=2"]),
        ({"workers": {"min": 2}}, ["workers", "min=2", "max=1"]),
        ({"workers": 0}, ["workers.min", "greater than 0", "got 0"]),
        ({"workers": 9}, ["workers.max=9", "global_batch_size=8"]),
        ({"schedule": {"warmup_steps": 100}}, ["schedule.warmup_steps=100", "training.max_steps=100"]),
        ({"schedule": {"kind": "step"}}, ["schedule.kind", "'cosine', 'linear', 'wsd' or 'constant'", "step"]),
        ({"optimizer": {"kind": "muon"}, "training": {"zero_stage": 0}}, ["muon", "training.zero_stage", "got 0"]),
        ({"optimizer": {"kind": "muon"}}, ["muon", "training.gradient_clipping=0", "got 1"]),
        ({"optimizer": {"kind": "sgd"}, "workers": {"min": 1, "max": 2}}, ["sgd", "min=1", "max=2"]),
        ({"optimizer": {"kind": "adamw", "betas": [0.9, 1.0]}}, ["optimizer.betas", "1 excluded", "(0.9, 1.0)"]),
        ({"optimizer": {"kind": "adagrad"}}, ["optimizer.kind", "unknown value 'adagrad'"]),
        ({"optimizer": {"learning_rate": 0}}, ["optimizer.learning_rate", "greater than 0", "got 0"]),
        ({"optimizer": {"momentum": 0.9}}, ["optimizer.momentum", "unknown key"]),
        ({"name": "a b"}, ["name", "a b"]),
        ({"run": "../up"}, ["run", "../up"]),
        ({"training": {"strategy": "gosip"}}, ["training.strategy.kind", "'gosip'", "'gossip'"]),
        ({"training": {"strategy": {"kind": "gossip", "topolgy": "ring"}}}, ["strategy.topolgy", "'topology'"]),
        ({"training": {"strategy": {"kind": "parameter_server", "staleness": -1}}}, ["strategy.staleness", "got -1"]),
        ({"training": {"strategy": "gossip", "zero_stage": 1}}, ["gossip", "zero_stage to 0", "got 1"]),
        ({"training": {"strategy": "gossip", "noise_every_steps": 5}}, ["noise_every_steps to 0", "got 5"]),
        ({"training": {"strategy": "parameter_server", "noise_every_steps": 5}}, ["noise_every_steps", "staleness 0"]),
        ({"training": {"strategy": "parameter_server", "offload_optimizer": True}}, ["parameter_server", "offload"]),
        ({"training": {"strategy": "gossip", "deepspeed": {"zenflow": {}}}}, ["gossip", "training.deepspeed"]),
        (
            {"training": {"strategy": "gossip", "gradient_clipping": 0}, "optimizer": {"kind": "muon"}},
            ["muon", "training.strategy=all_reduce"],
        ),
        ({"trainings": {}}, ["trainings", "unknown key", "'training'"]),
        ({"task": {"kind": "causal_lm", "model": {**MODEL, "layer": 2}}}, ["task.model.layer", "'layers'"]),
    ],
)
def test_a_setting_that_cannot_work_is_refused_with_field_value_and_limit(
    sections: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(**sections)
    missing = [word for word in words if not re.search(re.escape(word), str(caught.value))]
    assert not missing, str(caught.value)


def test_a_number_of_workers_means_exactly_that_many() -> None:
    assert build(workers=2).workers == Workers(min=2, max=2)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("all_reduce", AllReduce()),
        ("gossip", Gossip()),
        ({"kind": "gossip", "topology": "ring"}, Gossip(topology="ring")),
        ("parameter_server", ParameterServer()),
        ({"kind": "parameter_server", "staleness": 4}, ParameterServer(staleness=4)),
    ],
)
def test_a_strategy_is_a_name_or_a_name_with_settings(given: Any, meant: Any) -> None:
    assert build(training={"strategy": given}).training.strategy == meant


@pytest.mark.parametrize(
    ("strategy", "zero_stage", "noise_every_steps"),
    [
        ("all_reduce", 1, 10),
        ("gossip", 0, 0),
        ("parameter_server", 0, 0),
        ({"kind": "parameter_server", "staleness": 0}, 0, 10),
    ],
)
def test_defaults_follow_the_strategy_and_survive_a_file(
    tmp_path: Path, strategy: Any, zero_stage: int, noise_every_steps: int
) -> None:
    config = build(training={"strategy": strategy})
    assert (config.training.zero_stage, config.training.noise_every_steps) == (zero_stage, noise_every_steps)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load(TrainConfig, tmp_path / "config.yaml") == config


def test_a_strategy_can_be_chosen_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(build().to_yaml().replace("zero_stage: 1", "zero_stage: 0"))
    chosen = ["--training.strategy.kind=parameter_server", "--training.strategy.staleness=0"]
    assert load(TrainConfig, tmp_path / "config.yaml", chosen).training.strategy == ParameterServer(staleness=0)


@pytest.mark.parametrize("strategy", ["gossip", "parameter_server"])
def test_gangs_of_other_strategies_may_grow_and_shrink(strategy: str) -> None:
    config = build(training={"strategy": strategy}, optimizer={"kind": "sgd"}, workers={"min": 1, "max": 4})
    assert config.workers.max == 4


def test_true_is_no_number_of_workers() -> None:
    with pytest.raises(ConfigError, match="workers"):
        build(workers=True)


def test_elastic_workers_keep_their_bounds() -> None:
    workers = build(workers={"min": 1, "max": 8}).workers
    assert (workers.min, workers.max) == (1, 8)


def test_a_worker_asks_ray_only_for_what_it_needs() -> None:
    assert Workers(cpus=0, gpus=1, resources={"TPU": 2, "FPGA": 0}).per_worker == {"GPU": 1, "TPU": 2}


def test_a_pool_is_a_node_label_beside_the_others() -> None:
    workers = Workers(pool="h100", label_selector={"zone": "!a"})
    assert workers.selector == {"modelyard/pool": "h100", "zone": "!a"}
    assert Workers().selector == {}


def test_the_optimizer_defaults_to_adamw_and_a_part_of_it_keeps_the_rest() -> None:
    assert build().optimizer == AdamW()
    assert build(optimizer={"learning_rate": 1}).optimizer == AdamW(learning_rate=1)
    assert build(optimizer={"kind": "adam"}).optimizer == Adam(weight_decay=0.0)
    assert build(optimizer={"kind": "muon"}, training={"gradient_clipping": 0}).optimizer == Muon()


def test_one_step_may_be_all_warm_up() -> None:
    assert build(training={"max_steps": 1}, schedule={"warmup_steps": 1}).schedule.warmup_steps == 1


def test_a_config_reads_back_equal_from_its_own_yaml(tmp_path: Any) -> None:
    from modelyard.config import load

    config = build(workers={"min": 1, "max": 4}, optimizer={"kind": "adam"}, training={"deepspeed": {"aio": {}}})
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load(TrainConfig, path) == config
