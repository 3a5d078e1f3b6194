"""Killed anywhere, a run goes on as if nothing had happened: the same samples, the same losses."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.data.order import SampleOrder

TOLERANCE = 2e-4
"""Nats, fp32: another number of workers sums gradients in another order, and 40 steps carry that on."""
STEPS = 40

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def config_file(token_config: Callable[..., Any], tmp_path: Path) -> Path:
    """A run of 40 steps that take long enough to be killed in."""
    model = {"architecture": "llama", "layers": 4, "hidden_size": 128, "heads": 4, "max_positions": 16}
    config = token_config(
        task={"kind": "causal_lm", "model": model},
        training={"max_steps": STEPS, "global_batch_size": 96, "micro_batch_size": 24, "zero_stage": 2},
        checkpoint={"every_steps": 7},
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    return path


def test_killed_workers_and_drivers_change_neither_samples_nor_losses(
    start_driver: Callable[..., Any], worker_processes: Callable[[], list[Any]], config_file: Path
) -> None:
    dice = random.Random(5)
    calm = start_driver(config_file, "calm", "--run=calm").result()

    first = start_driver(config_file, "first", "--run=wild")
    first.wait_for_step(dice.randint(8, 12))
    dice.choice(worker_processes()).kill()
    first.wait_for("a second gang", lambda: len(first.records("start")) == 2)
    first.wait_for_step(dice.randint(16, 22))
    first.kill()
    second = start_driver(config_file, "second", "--run=wild")
    wild = second.result()

    resumed_at = [start["step"] for start in first.records("start")[1:] + second.records("start")]
    assert all(step > 0 for step in resumed_at), "each gang went on from a checkpoint"
    assert wild["samples"] == calm["samples"]
    assert wild["losses"] == pytest.approx(calm["losses"], abs=TOLERANCE)
    assert len(set(wild["samples"])) == len(wild["samples"]) == STEPS * 96


def test_two_workers_then_one_then_two_change_neither_samples_nor_losses(
    start_driver: Callable[..., Any], config_file: Path
) -> None:
    calm = start_driver(config_file, "calm", "--run=calm", "--training.zero_stage=3").result()

    for name, workers, step in (("two", 2, 9), ("one", 1, 18)):
        driver = start_driver(config_file, name, "--run=wild", f"--workers={workers}", "--training.zero_stage=3")
        driver.wait_for_step(step)
        driver.kill()
    wild = start_driver(config_file, "again", "--run=wild", "--workers=2", "--training.zero_stage=3").result()

    assert sorted(set(wild["workers"])) == [1, 2], "steps of both gang sizes are in the history"
    assert wild["samples"] == calm["samples"]
    assert wild["losses"] == pytest.approx(calm["losses"], abs=TOLERANCE)


def test_a_run_grows_at_a_step_boundary_when_room_appears(
    start_driver: Callable[..., Any], config_file: Path, ray_cluster: str
) -> None:
    import ray

    @ray.remote(num_cpus=3)
    class Tenant:
        def ready(self) -> None: ...

    tenant = Tenant.remote()
    ray.get(tenant.ready.remote(), timeout=60)
    elastic = ["--workers.min=1", "--workers.max=2", "--workers.resize_interval_s=0.5", "--training.max_steps=80"]
    driver = start_driver(config_file, "growing", "--run=growing", *elastic)
    driver.wait_for_step(5)
    ray.kill(tenant)
    grown = driver.result()

    first, second = driver.records("start")
    assert (first["num_workers"], second["num_workers"]) == (1, 2)
    steps = [record["step"] for record in driver.records("step")]
    assert steps == list(range(1, 81)), "no step was done twice: the gang stopped right after a checkpoint"
    assert grown["samples"] == SampleOrder(90, 0).sample_ids(np.arange(80 * 96)).tolist()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_driver_that_is_told_to_end_leaves_a_checkpoint_of_the_step_it_was_at(
    start_driver: Callable[..., Any], config_file: Path, number: signal.Signals
) -> None:
    rarely = "--checkpoint.every_steps=1000"
    first = start_driver(config_file, "first", "--run=told", rarely)
    first.wait_for_step(8)
    first.process.send_signal(number)
    assert first.process.wait(60) != 0
    second = start_driver(config_file, "second", "--run=told", rarely)
    told = second.result()

    (resumed,) = second.records("start")
    assert resumed["step"] >= 8
    assert told["samples"] == SampleOrder(90, 0).sample_ids(np.arange(STEPS * 96)).tolist()


@pytest.mark.parametrize("fault", ["node", "drain"])
def test_a_lost_or_drained_node_costs_no_sample(fault: str) -> None:
    """On two nodes of which one goes away, so the run goes on with one worker instead of two."""
    script = Path(__file__).parents[2] / "benchmarks" / "recovery.py"
    command = [sys.executable, str(script), "--one", "modelyard", fault, "--nodes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["gang_sizes"] == [2, 1]
    assert (measured["lost"], measured["repeated"]) == (0, 0)
