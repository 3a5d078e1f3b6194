"""What the strategies are made of: who talks to whom, one server, flat models, agreements."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelyard.errors import IntegrityError, WaitTimeoutError
from modelyard.training.agreement import Agreements, Verdict
from modelyard.training.batching import plan
from modelyard.training.checkpoints import CheckpointWriter, TrainState
from modelyard.training.config import SGD, Adam, AdamW
from modelyard.training.flat import FlatModel, Saved, Shard, averaged, joined, read_saved
from modelyard.training.gang import Gang
from modelyard.training.gossip import diameter, exchange
from modelyard.training.parameter_server import num_parts
from modelyard.training.run_folder import RunFolder
from modelyard.training.server import Server

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


def test_verdicts_add_up() -> None:
    both = Verdict(interrupt="a node goes") | Verdict(save=True)
    assert both == Verdict("a node goes", stop=False, save=True)
    assert both.asks_for_something
    assert not Verdict().asks_for_something
