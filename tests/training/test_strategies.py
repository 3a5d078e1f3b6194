"""Parameter servers and gossip train what they promise: every row once, in real gangs of processes over Gloo."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.gangs import perform

from modelyard.data.dataset import Dataset
from modelyard.data.order import SampleOrder
from modelyard.training import TrainConfig
from modelyard.training.batching import plan
from modelyard.training.runs import identity
from modelyard.training.schedule import rate_factor

FP32 = 2e-5
"""Nats after 12 steps when gradients are summed in another order."""
STEPS = 12
SLOW_S = 0.15
"""Seconds that the slow worker sleeps before each row."""

PLAIN_SGD = {"kind": "sgd", "learning_rate": 0.05, "momentum": 0.9}


def servers(staleness: int, **settings: Any) -> dict[str, Any]:
    return {"kind": "parameter_server", "staleness": staleness, **settings}


RING = {"kind": "gossip", "topology": "ring"}
BY_ONE = {"micro_batch_size": 1}

# name, strategy, settings of the training section, other sections, what to do
ON_THREE: list[tuple[str, Any, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("all_reduce", "all_reduce", {"zero_stage": 0, "noise_every_steps": 3}, {}, {}),
    ("servers", servers(0), {"noise_every_steps": 3}, {}, {}),
    ("fixed", servers(0, work_claiming=False), {"noise_every_steps": 3}, {}, {}),
    ("stale", servers(2), {}, {}, {}),
    ("bf16", servers(0), {"precision": "bf16"}, {}, {}),
    ("gossip", "gossip", {}, {}, {}),
    ("gossip-bf16", "gossip", {"precision": "bf16"}, {}, {}),
    ("ring", RING, {}, {}, {}),
    ("validated", "gossip", {}, {"validation": {"every_steps": 5}}, {}),
    ("cut-servers", servers(0), {}, {"checkpoint": {"every_steps": 4}}, {"stop": 5}),
    ("cut-stale", servers(2), {}, {}, {"stop": 5}),
    ("cut-gossip", "gossip", {}, {}, {"stop": 5}),
    ("continued-servers", servers(0), {}, {}, {"from": "cut-servers"}),
    ("continued-gossip", "gossip", {}, {}, {"from": "cut-gossip"}),
    ("patient", servers(0, work_claiming=False), BY_ONE, {}, {"slow": [2, SLOW_S]}),
    ("impatient", servers(3), BY_ONE, {}, {"slow": [2, SLOW_S]}),
    ("unlogged", servers(1), {**BY_ONE, "log_every_steps": STEPS}, {}, {"slow": [2, SLOW_S]}),
    ("diverged", servers(2), {}, {"optimizer": {"learning_rate": 1e30}, "checkpoint": {"every_steps": 1}}, {}),
]
ON_TWO: list[tuple[str, Any, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("all_reduce-sgd", "all_reduce", {"zero_stage": 0, "gradient_clipping": 0}, {"optimizer": PLAIN_SGD}, {}),
    ("gossip-sgd", "gossip", {"gradient_clipping": 0}, {"optimizer": PLAIN_SGD}, {}),
    ("servers-sgd", servers(0), {"gradient_clipping": 0}, {"optimizer": PLAIN_SGD}, {}),
    ("resized-servers", servers(0), {}, {}, {"from": "cut-servers"}),
    ("resized-stale", servers(2), {}, {}, {"from": "cut-stale"}),
    ("resized-gossip", "gossip", {}, {}, {"from": "cut-gossip"}),
]


def gang(runs: list[Any], workers: int, config: Callable[..., TrainConfig], out: Path) -> dict[str, Any]:
    """Run all of `runs` one after another on one gang of processes; their results by name."""
    plain = []
    for name, strategy, training, sections, todo in runs:
        made = config(workers=workers, training={"strategy": strategy, **training}, **sections)
        plain.append({"name": name, "config": made.model_dump(mode="json"), **todo})
    return perform("strategy_gang", {"workers": workers, "dataset": made.dataset, "runs": plain}, out, 300.0)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="module")
def config(token_folder: Path) -> Callable[..., TrainConfig]:
    """`token_config` for the whole module."""
    from modelyard.config import parse

    def build(**sections: Any) -> TrainConfig:
        model = {"architecture": "llama", "layers": 2, "hidden_size": 32, "heads": 2, "max_positions": 16}
        plain: dict[str, Any] = {
            "name": "counter",
            "dataset": str(token_folder),
            "task": {"kind": "causal_lm", "model": model},
            "training": {
                "max_steps": STEPS, "global_batch_size": 8, "micro_batch_size": 3, "record_samples": True
            },
            "optimizer": {"kind": "adamw", "learning_rate": 0.01},
            "schedule": {"warmup_steps": 2},
            "checkpoint": {"every_s": None},
        }  # fmt: skip
        for name, values in sections.items():
            kept = isinstance(plain.get(name), dict) and "kind" not in values
            plain[name] = {**plain[name], **values} if kept else values
        return parse(TrainConfig, plain)

    return build


@pytest.fixture(scope="module")
def three(config: Callable[..., TrainConfig], out: Path) -> dict[str, Any]:
    """What every run on three workers measured."""
    return gang(ON_THREE, 3, config, out)


@pytest.fixture(scope="module")
def two(config: Callable[..., TrainConfig], out: Path, three: dict[str, Any]) -> dict[str, Any]:
    """What every run on two workers measured; some continue runs of three."""
    return gang(ON_TWO, 2, config, out)


@pytest.fixture(scope="module")
def stream(token_folder: Path) -> list[int]:
    """The samples of the first steps, in the order of training."""
    order = SampleOrder(Dataset.open(token_folder).split("train").num_rows, 0)
    return order.sample_ids(np.arange(STEPS * 8)).tolist()


def good(found: dict[str, Any], name: str) -> Any:
    """The result of a run that learnt."""
    assert "error" not in found[name], found[name]["error"]
    losses = found[name]["losses"]
    assert losses[-1] < losses[0] - 0.3, losses
    return found[name]


# --- gangs of processes ------------------------------------------------------------------------------------------

TRAINED_WHOLE = [
    "servers", "fixed", "stale", "bf16", "gossip", "gossip-bf16", "ring", "validated", "continued-servers",
    "continued-gossip", "patient", "impatient",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED_WHOLE)
def test_every_row_is_trained_once_and_in_its_step(three: dict[str, Any], stream: list[int], name: str) -> None:
    assert good(three, name)["samples"] == stream


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resized-servers", "resized-stale", "resized-gossip"])
def test_a_gang_of_another_size_goes_on_at_the_exact_row(two: dict[str, Any], stream: list[int], name: str) -> None:
    assert good(two, name)["samples"] == stream


@pytest.mark.slow
@pytest.mark.parametrize("name", ["servers", "fixed", "continued-servers"])
def test_servers_without_staleness_follow_all_reduce(three: dict[str, Any], name: str) -> None:
    found, expected = good(three, name), good(three, "all_reduce")
    assert found["losses"] == pytest.approx(expected["losses"], abs=FP32)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    assert found["metrics"]["loss"] == pytest.approx(expected["metrics"]["loss"], abs=FP32)


@pytest.mark.slow
def test_servers_without_staleness_measure_the_gradient_noise(three: dict[str, Any]) -> None:
    assert good(three, "fixed")["noise"] == pytest.approx(good(three, "all_reduce")["noise"], rel=1e-3)
    assert len(good(three, "servers")["noise"]) == len(good(three, "fixed")["noise"])


@pytest.mark.slow
def test_stale_weights_learn_another_way(three: dict[str, Any]) -> None:
    """Else the staleness is not used at all."""
    found, exact = good(three, "stale")["losses"], good(three, "all_reduce")["losses"]
    assert found[0] == pytest.approx(exact[0], abs=FP32)
    assert found[-1] != pytest.approx(exact[-1], abs=1e-3)


@pytest.mark.slow
def test_no_gradient_is_of_weights_older_than_the_staleness(three: dict[str, Any]) -> None:
    assert good(three, "servers")["lacking"] == 0
    assert 0 < good(three, "stale")["lacking"] <= 2
    assert 0 < good(three, "impatient")["lacking"] <= 3
    assert three["unlogged"]["lacking"] == 1, "also where workers do not meet to log"


@pytest.mark.slow
def test_steps_between_logs_are_logged_together(three: dict[str, Any], stream: list[int]) -> None:
    assert three["unlogged"]["samples"] == stream
    assert three["unlogged"]["losses"] == pytest.approx([np.mean(good(three, "stale")["losses"])], abs=0.3)


@pytest.mark.slow
def test_servers_of_two_go_on_from_servers_of_three(two: dict[str, Any], three: dict[str, Any]) -> None:
    assert good(two, "resized-servers")["losses"] == pytest.approx(good(three, "all_reduce")["losses"], abs=FP32)


@pytest.mark.slow
def test_bf16_keeps_master_weights_in_fp32(three: dict[str, Any]) -> None:
    assert good(three, "bf16")["losses"] == pytest.approx(good(three, "all_reduce")["losses"], abs=0.02)
    assert good(three, "gossip-bf16")["losses"] == pytest.approx(good(three, "gossip")["losses"], abs=0.02)


@pytest.mark.slow
def test_all_workers_of_servers_publish_the_same_weights(three: dict[str, Any]) -> None:
    assert len(set(good(three, "stale")["replicas"])) == 1


@pytest.mark.slow
def test_a_slow_worker_computes_less_and_holds_up_less(three: dict[str, Any]) -> None:
    patient, impatient = good(three, "patient"), good(three, "impatient")
    assert patient["rows"][2] >= STEPS * 2, "without claiming everyone has a share"
    assert impatient["rows"][2] < STEPS, impatient["rows"]
    assert sum(impatient["rows"]) == STEPS * 8
    assert impatient["seconds"] < patient["seconds"] / 2


@pytest.mark.slow
def test_a_loss_that_is_no_number_leaves_no_checkpoint_behind(three: dict[str, Any], out: Path) -> None:
    (found,) = re.findall(r"DivergedError: the loss of step (\d+) is nan", three["diverged"]["error"])
    manifests = list((out / "diverged").glob("*/checkpoint.json"))
    steps = [json.loads(manifest.read_text())["state"]["step"] for manifest in manifests]
    assert max(steps, default=0) < int(found), "a step was saved before its own loss was known"


@pytest.mark.slow
def test_a_worker_sends_as_much_as_its_strategy_says(three: dict[str, Any]) -> None:
    whole = 4 * good(three, "gossip")["parameters"]
    assert set(good(three, "gossip")["sent"]) == {whole}
    assert set(good(three, "ring")["sent"]) == {2 * whole}
    assert np.mean(good(three, "fixed")["sent"]) == pytest.approx(2 * whole * 2 / 3, rel=0.1)


def gossip_by_hand(config: TrainConfig, folder: Path, workers: int) -> tuple[list[float], float]:
    """Losses of each step, and of the average model on the test split, of a loop in one process."""
    dataset, size, adam = Dataset.open(folder), config.training.global_batch_size, config.optimizer
    train, test = dataset.split("train"), dataset.split("test")
    order = SampleOrder(train.num_rows, config.seed)
    models, optimizers = [], []
    for _ in range(workers):
        torch.manual_seed(config.seed)
        models.append(config.task.build(dataset.info, folder).train())
        groups = [
            {"params": [p for p in models[-1].parameters() if p.ndim >= 2], "weight_decay": adam.weight_decay},
            {"params": [p for p in models[-1].parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizers.append(torch.optim.AdamW(groups, lr=adam.learning_rate, betas=adam.betas))
    losses = []
    for step in range(config.training.max_steps):
        ids = order.sample_ids(np.arange(step * size, (step + 1) * size)) % train.num_rows
        total = 0.0
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            mine = plan(size, config.training.micro_batch_size, workers, rank)
            row_losses = config.task.loss(model, config.task.collate(train.read(ids[mine.start : mine.stop]), "cpu"))
            (row_losses.sum() * workers / size).backward()
            total += float(row_losses.detach().sum())
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clipping)
            for group in optimizer.param_groups:
                group["lr"] = adam.learning_rate * rate_factor(config.schedule, step, config.training.max_steps)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total / size)
        hop = (1, 2)[step % 2]  # three workers: log2(3) is nearly 2
        with torch.no_grad():
            before = [[p.clone() for p in model.parameters()] for model in models]
            for rank, model in enumerate(models):
                for p, own, other in zip(model.parameters(), before[rank], before[rank - hop], strict=True):
                    p.copy_((own + other) / 2)
    with torch.no_grad():
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            parameters[0].copy_(torch.stack(list(parameters)).mean(0))
        batch = config.task.collate(test.read(np.arange(test.num_rows)), "cpu")
        return losses, float(config.task.loss(models[0].eval(), batch).mean())


@pytest.mark.slow
def test_gossip_follows_its_equations(
    three: dict[str, Any], config: Callable[..., TrainConfig], token_folder: Path
) -> None:
    losses, test_loss = gossip_by_hand(config(workers=3, training={"strategy": "gossip"}), token_folder, 3)
    found = good(three, "gossip")
    assert found["losses"] == pytest.approx(losses, abs=FP32)
    assert found["metrics"]["loss"] == pytest.approx(test_loss, abs=FP32), "the average is what is measured"
    assert len(set(found["replicas"])) == 3, "afterwards each worker has its own weights again"


@pytest.mark.slow
def test_measuring_the_average_disturbs_no_replica(three: dict[str, Any]) -> None:
    assert good(three, "validated")["losses"] == pytest.approx(good(three, "gossip")["losses"], abs=1e-6)
    assert [step for step, _ in three["validated"]["validation"]] == [5, 10, 12]


@pytest.mark.slow
def test_gossip_goes_on_exactly(three: dict[str, Any]) -> None:
    assert 5 < three["cut-gossip"]["step"] < STEPS
    assert good(three, "continued-gossip")["losses"] == pytest.approx(good(three, "gossip")["losses"], abs=1e-6)


@pytest.mark.slow
def test_gossip_of_another_size_starts_from_the_average(two: dict[str, Any], three: dict[str, Any]) -> None:
    """The losses of other parts at nearly the same weights are nearly the same."""
    assert good(two, "resized-gossip")["losses"] == pytest.approx(good(three, "gossip")["losses"], abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gossip-sgd", "servers-sgd"])
def test_on_two_workers_sgd_is_the_same_by_any_strategy(two: dict[str, Any], name: str) -> None:
    found, expected = good(two, name), good(two, "all_reduce-sgd")
    assert found["losses"] == pytest.approx(expected["losses"], abs=FP32)


def test_a_run_continues_under_its_own_strategy_only(config: Callable[..., TrainConfig]) -> None:
    def who(strategy: Any) -> dict[str, Any]:
        return identity(config(training={"strategy": strategy, "zero_stage": 0}), {})

    assert "strategy" not in who("all_reduce")["training"], "runs from before there was a choice"
    assert who("gossip") != who("all_reduce")
    assert who("gossip") != who(RING)
    assert who("gossip") == who({"kind": "gossip", "timeout_s": 5})
