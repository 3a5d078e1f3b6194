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


def test_kills_and_other_gang_sizes_change_neither_samples_nor_losses(
    start_driver: Callable[..., Any], worker_processes: Callable[[], list[Any]], config_file: Path
) -> None:
    """At ZeRO-3: the driver dies, one worker goes on and its driver dies too, two go on and a worker dies."""
    dice = random.Random(5)
    calm = start_driver(config_file, "calm", "--run=calm", "--training.zero_stage=3").result()

    wild = ("--run=wild", "--training.zero_stage=3")
    killed = []
    for name, workers, step in (("two", 2, dice.randint(8, 12)), ("one", 1, dice.randint(16, 20))):
        driver = start_driver(config_file, name, *wild, f"--workers={workers}")
        driver.wait_for_step(step)
        driver.wait_for("a checkpoint of this gang", lambda driver=driver: driver.records("checkpoint"))
        driver.kill()
        killed.append(driver)
    last = start_driver(config_file, "again", *wild, "--workers=2")
    last.wait_for_step(dice.randint(24, 30))
    dice.choice(worker_processes()).kill()
    last.wait_for("a second gang", lambda: len(last.records("start")) == 2)
    result = last.result()

    starts = [start for driver in [*killed, last] for start in driver.records("start")]
    assert [start["num_workers"] for start in starts] == [2, 1, 2, 2]
    assert all(start["step"] > 0 for start in starts[1:]), "each gang went on from a checkpoint"
    assert sorted(set(result["workers"])) == [1, 2], "steps of both gang sizes are in the history"
    assert result["samples"] == calm["samples"]
    assert result["losses"] == pytest.approx(calm["losses"], abs=TOLERANCE)
    assert len(set(result["samples"])) == len(result["samples"]) == STEPS * 96


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


def test_a_driver_that_is_told_to_end_leaves_a_checkpoint_of_the_step_it_was_at(
    start_driver: Callable[..., Any], config_file: Path
) -> None:
    """By Ctrl-C, then by SIGTERM; at ZeRO-2."""
    calm = start_driver(config_file, "calm", "--run=calm").result()
    rarely = ("--run=told", "--checkpoint.every_steps=1000")
    for number, step in ((signal.SIGINT, 8), (signal.SIGTERM, 20)):
        driver = start_driver(config_file, number.name, *rarely)
        driver.wait_for_step(step)
        driver.process.send_signal(number)
        assert driver.process.wait(60) != 0
        last = max(record["step"] for record in driver.records("step"))
        assert [record["step"] for record in driver.records("checkpoint")] == [last]
    told = (end := start_driver(config_file, "end", *rarely)).result()

    (resumed,) = end.records("start")
    assert resumed["step"] >= 20
    assert told["losses"] == pytest.approx(calm["losses"], abs=TOLERANCE)
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
