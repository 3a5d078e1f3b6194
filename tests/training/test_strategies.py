"""Parameter servers and gossip train what they promise: every row once, in real gangs of processes over Gloo."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelyard.data.dataset import Dataset
from modelyard.data.order import SampleOrder
from modelyard.errors import IntegrityError, WaitTimeoutError
from modelyard.training import TrainConfig
from modelyard.training.agreement import Agreements, Verdict
from modelyard.training.batching import plan
from modelyard.training.checkpoints import CheckpointWriter, TrainState
from modelyard.training.config import SGD, Adam, AdamW
from modelyard.training.flat import FlatModel, Saved, Shard, averaged, joined, read_saved
from modelyard.training.gang import Gang
from modelyard.training.gossip import diameter, exchange
from modelyard.training.parameter_server import num_parts
from modelyard.training.run_folder import RunFolder
from modelyard.training.runs import identity
from modelyard.training.schedule import rate_factor
from modelyard.training.server import Server

GANG = Path(__file__).with_name("strategy_gang.py")
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    plain = []
    for name, strategy, training, sections, todo in runs:
        made = config(workers=workers, training={"strategy": strategy, **training}, **sections)
        plain.append({"name": name, "config": made.model_dump(mode="json"), **todo})
    job, log = out / f"job-{workers}.json", out / f"log-{workers}.txt"
    job.write_text(
        json.dumps({"workers": workers, "port": port, "dataset": made.dataset, "out": str(out), "runs": plain})
    )
    with log.open("wb") as said:
        command = [sys.executable, "-W", "ignore", str(GANG), str(job)]
        processes = [subprocess.Popen([*command, str(rank)], stdout=said, stderr=said) for rank in range(workers)]
        try:
            codes = [process.wait(300) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait(10)
    assert not any(codes), log.read_text()[-4000:]
    return {name: json.loads((out / f"{name}.json").read_text()) for name, *_ in runs}


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
    assert "DivergedError" in three["diverged"]["error"]
    for manifest in (out / "diverged").glob("*/checkpoint.json"):
        state = json.loads(manifest.read_text())["state"]
        assert state["step"] <= 1, "written before the loss of its weights was known"


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


# --- who talks to whom -------------------------------------------------------------------------------------------


def mixing(topology: str, step: int, workers: int) -> np.ndarray:
    """The matrix by which one step mixes the weights of all workers."""
    matrix = np.zeros((workers, workers))
    for rank in range(workers):
        peers = exchange(topology, step, rank, workers)
        for source in (rank, *peers.of):
            matrix[rank, source] += 1 / (len(peers.of) + 1)
    return matrix


TOPOLOGIES = st.sampled_from(["exponential", "ring"])


@given(TOPOLOGIES, st.integers(0, 40), st.integers(1, 33))
def test_mixing_moves_no_average(topology: str, step: int, workers: int) -> None:
    matrix = mixing(topology, step, workers)
    np.testing.assert_allclose(matrix.sum(0), 1)
    np.testing.assert_allclose(matrix.sum(1), 1)


@given(TOPOLOGIES, st.integers(0, 40), st.integers(1, 33))
def test_whoever_is_sent_to_expects_it(topology: str, step: int, workers: int) -> None:
    peers = [exchange(topology, step, rank, workers) for rank in range(workers)]
    sent = {(rank, other) for rank in range(workers) for other in peers[rank].to}
    expected = {(other, rank) for rank in range(workers) for other in peers[rank].of}
    assert sent == expected


@given(TOPOLOGIES, st.integers(1, 33))
def test_within_the_diameter_everybody_has_heard_from_everybody(topology: str, workers: int) -> None:
    reached = np.eye(workers)
    for step in range(diameter(topology, workers)):
        reached = mixing(topology, step, workers) @ reached
    assert (reached > 0).all()


@pytest.mark.parametrize("workers", [2, 4, 8, 16])
def test_an_exponential_graph_of_a_power_of_two_averages_exactly(workers: int) -> None:
    total = np.eye(workers)
    for step in range(diameter("exponential", workers)):
        total = mixing("exponential", step, workers) @ total
    np.testing.assert_allclose(total, np.full((workers, workers), 1 / workers))


# --- one server --------------------------------------------------------------------------------------------------


def server(weights: torch.Tensor, *, rows: int = 4, clipping: float = 0.0) -> Server:
    shard = Shard(weights, 0, weights.numel(), SGD(learning_rate=1.0, momentum=0.0))
    return Server(shard, batch_rows=rows, clipping=clipping, rate=lambda _: 1.0, sum_over_servers=lambda value: value)


def test_a_step_waits_for_all_rows_of_its_batch() -> None:
    made = server(torch.zeros(2))
    made.push(0, 3, torch.tensor([1.0, 2.0]))
    assert made.pull(0, 1.0).version == 0
    made.push(0, 1, torch.tensor([1.0, 0.0]))
    found = made.pull(1, 1.0)
    assert (found.version, found.weights.tolist()) == (1, [-2.0, -2.0])


def test_batches_that_are_complete_too_early_wait_their_turn() -> None:
    made = server(torch.zeros(1))
    made.push(1, 4, torch.tensor([10.0]))
    assert made.pull(0, 1.0).version == 0
    made.push(0, 4, torch.tensor([1.0]))
    assert made.pull(2, 1.0).weights.tolist() == [-11.0]


def test_weights_in_hand_do_not_change_under_later_steps() -> None:
    made = server(torch.zeros(1))
    before = made.pull(0, 1.0)
    made.push(0, 4, torch.tensor([1.0]))
    assert before.weights.tolist() == [0.0]


def test_the_whole_gradient_is_clipped_not_a_workers_part() -> None:
    made = server(torch.zeros(2), clipping=1.0)
    for part in ([3.0, 0.0], [0.0, 4.0]):
        made.push(0, 2, torch.tensor(part))
    found = made.pull(1, 1.0)
    assert found.norm == pytest.approx(5.0)
    assert found.weights.tolist() == pytest.approx([-0.6, -0.8], rel=1e-5)


def test_a_pull_of_weights_that_never_come_names_the_setting() -> None:
    with pytest.raises(WaitTimeoutError, match=r"training\.strategy\.timeout_s"):
        server(torch.zeros(1)).pull(1, 0.05)


def test_a_pull_is_answered_when_its_weights_come() -> None:
    made, answers = server(torch.zeros(1)), []
    made.when(0, answers.append)
    made.when(1, answers.append)
    assert [answer.version for answer in answers] == [0]
    made.push(0, 4, torch.tensor([1.0]))
    assert [answer.version for answer in answers] == [0, 1]


def test_each_part_is_claimed_once_however_many_ask() -> None:
    made, claimed = server(torch.zeros(1)), []
    start = threading.Barrier(4)

    def claim() -> None:
        start.wait(10)
        for step in range(50):
            parts = [made.claim(step, 5) for _ in range(6)]
            claimed.extend((step, part) for part in parts if part is not None)

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(claimed) == [(step, part) for step in range(50) for part in range(5)]


def test_a_step_that_is_done_has_no_part_left() -> None:
    made = server(torch.zeros(1))
    made.push(0, 4, torch.tensor([1.0]))
    assert made.claim(0, 4) is None
    assert made.claim(1, 4) == 0


def test_what_a_servers_thread_failed_of_reaches_who_waits() -> None:
    made = server(torch.zeros(1))
    made.fail(RuntimeError("Connection closed by peer"))
    with pytest.raises(RuntimeError, match="Connection closed"):
        made.pull(1, 10.0)


@pytest.mark.parametrize(
    ("rows", "micro", "workers", "parts"), [(8, 8, 3, 3), (8, 2, 3, 4), (8, 3, 3, 3), (8, 1, 2, 8)]
)
def test_a_batch_has_a_part_for_everyone_and_none_above_a_micro_batch(
    rows: int, micro: int, workers: int, parts: int
) -> None:
    assert num_parts(rows, micro, workers) == parts
    cuts = [plan(rows, micro, parts, index) for index in range(parts)]
    assert max(cut.stop - cut.start for cut in cuts) <= micro


# --- flat models -------------------------------------------------------------------------------------------------


def net() -> torch.nn.Sequential:
    torch.manual_seed(5)
    made = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    made[0].bias.requires_grad_(False)
    return made


@pytest.mark.parametrize("config", [AdamW(learning_rate=0.1), Adam(learning_rate=0.1), SGD(weight_decay=0.1)])
def test_shards_move_weights_as_torchs_own_optimizer_does(config: Any) -> None:
    from modelyard.training.engine import _optimizer

    model, plain = net(), net()
    flat, kernel = FlatModel(model, "fp32"), _optimizer(plain, config)
    cuts = [0, 5, 13, flat.size]
    shards = [Shard(flat.weights[a:b], a, flat.num_decaying, config) for a, b in itertools.pairwise(cuts)]
    rows = torch.randn(6, 3)
    for _ in range(3):
        flat.gradient.zero_()
        for each in (model, plain):
            each(rows).square().sum().backward()
        for shard in shards:
            shard.step(flat.gradient[shard.start : shard.start + shard.weights.numel()], 1.0)
        kernel.step()
        kernel.zero_grad()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(flat.full_state()[name], value, rtol=1e-5, atol=1e-6)


def test_a_shard_goes_on_from_moments_that_were_cut_otherwise() -> None:
    config = AdamW(learning_rate=0.1)
    gradient = torch.linspace(-1, 1, 10)

    def shards(weights: torch.Tensor, cuts: list[int]) -> list[Shard]:
        return [Shard(weights[a:b], a, 6, config) for a, b in itertools.pairwise(cuts)]

    def step(made: list[Shard]) -> None:
        for shard in made:
            shard.step(gradient[shard.start : shard.start + shard.weights.numel()], 1.0)

    weights = torch.ones(10)
    first = shards(weights, [0, 4, 10])
    step(first)
    saved = [Saved(1, s.start, s.weights.clone(), s.moments(), {}) for s in first]
    step(first)
    others = torch.zeros(10)
    second = shards(others, [0, 3, 7, 10])
    for shard in second:
        stop = shard.start + shard.weights.numel()
        part, moments = joined(saved, shard.start, stop)
        shard.weights.copy_(part)
        shard.restore(moments)
    step(second)
    torch.testing.assert_close(others, weights, rtol=0, atol=0)


def test_replicas_are_averaged_with_their_moments_and_buffers() -> None:
    one, other = (
        Saved(3, 0, torch.tensor([value]), {"m": torch.tensor([2 * value]), "step": torch.tensor(3.0)},
              {"mean": torch.tensor([value]), "count": torch.tensor(7)})
        for value in (1.0, 3.0)
    )  # fmt: skip
    found = averaged([one, other])
    assert (found.step, found.weights.tolist(), found.moments["m"].tolist()) == (3, [2.0], [4.0])
    assert (found.moments["step"].item(), found.buffers["mean"].tolist(), found.buffers["count"].item()) == (
        3,
        [2.0],
        7,
    )


def test_a_checkpoint_without_any_workers_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="no worker's state"):
        read_saved(tmp_path)


def test_each_worker_uploads_its_own_state_from_a_shared_folder(tmp_path: Path) -> None:
    state = TrainState(step=1, seed=0, epoch=0, position=8, num_workers=2, zero_stage=0)
    store = RunFolder(str(tmp_path / "run"))
    writers = [
        CheckpointWriter(
            store, rank=rank, num_workers=2, attempt="0" * 8, staging=tmp_path / "staging", commit_timeout_s=10.0
        )
        for rank in (1, 0)
    ]
    for rank, writer in zip((1, 0), writers, strict=True):
        value = Saved(1, 0, torch.full((2,), float(rank)), {}, {})
        writer.save(state, lambda folder, tag, v=value, r=rank: v.write(folder / tag, r), None)
    for writer in writers:
        writer.close()
    found = read_saved(tmp_path / "run" / "step-00000001-00000000" / "state")
    assert [each.weights[0].item() for each in found] == [0.0, 1.0]


# --- agreeing ----------------------------------------------------------------------------------------------------


def test_a_sum_is_read_when_the_slowest_may_have_come_so_far() -> None:
    made: Agreements[str] = Agreements(Gang(rank=0, num_workers=1, device=torch.device("cpu")), spread=2)
    read = []
    for step in range(1, 6):
        made.begin(step, f"step {step}", [float(step)])
        read.append([note for note, _ in made.due(step)])
    assert read == [[], [], ["step 1"], ["step 2"], ["step 3"]]
    assert list(made.due(5, everything=True)) == [("step 4", [4.0]), ("step 5", [5.0])]


def test_a_run_continues_under_its_own_strategy_only(config: Callable[..., TrainConfig]) -> None:
    def who(strategy: Any) -> dict[str, Any]:
        return identity(config(training={"strategy": strategy, "zero_stage": 0}), {})

    assert "strategy" not in who("all_reduce")["training"], "runs from before there was a choice"
    assert who("gossip") != who("all_reduce")
    assert who("gossip") != who(RING)
    assert who("gossip") == who({"kind": "gossip", "timeout_s": 5})


def test_verdicts_add_up() -> None:
    both = Verdict(interrupt="a node goes") | Verdict(save=True)
    assert both == Verdict("a node goes", stop=False, save=True)
    assert both.asks_for_something
    assert not Verdict().asks_for_something
