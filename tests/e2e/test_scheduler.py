"""Training under the live scheduler: preempted, orphaned and restarted, nothing is lost and nothing leaks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.data.order import SampleOrder
from modelyard.errors import CapacityError, LeaseLostError
from modelyard.scheduling import Request, lease
from modelyard.scheduling.ledger import Status
from modelyard.scheduling.scheduler import Timing

pytestmark = [pytest.mark.ray, pytest.mark.slow]
BATCH = 96


def until(claim: str, condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {claim}"
        time.sleep(0.05)


@pytest.fixture
def scheduler(ray_cluster: str, tmp_path: Path) -> Iterator[Any]:
    """The scheduler of the session's cluster of 4 CPUs, with the priority policy and a journal of its own."""
    from modelyard.scheduling import service

    timing = Timing(lease_ttl_s=6.0, yield_timeout_s=60.0)
    yield service.start("priority", journal=f"sqlite:///{tmp_path / 'journal.db'}", timing=timing)
    service.stop()
    until("the name is free again", lambda: service.connect() is None)


def entries(scheduler: Any) -> dict[str, Any]:
    from modelyard.scheduling import service

    found: dict[str, Any] = service.call(scheduler.look)[1]
    return found


def cpus(job: str, workers: int, **options: Any) -> Request:
    return Request(job_id=job, min_workers=workers, max_workers=workers, resources={"CPU": 1.0}, **options)


@pytest.fixture
def config_file(token_config: Callable[..., Any], tmp_path: Path) -> Path:
    """A run of 60 steps on two workers of two CPUs each: all that the cluster has."""
    model = {"architecture": "llama", "layers": 4, "hidden_size": 128, "heads": 4, "max_positions": 16}
    config = token_config(
        task={"kind": "causal_lm", "model": model},
        training={"max_steps": 60, "global_batch_size": BATCH, "micro_batch_size": 24, "zero_stage": 2},
        checkpoint={"every_steps": 50},
        workers={"min": 2, "max": 2, "cpus": 2},
        lease={"tenant": "night"},
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    return path


def test_a_preempted_run_goes_on_with_the_exact_samples_over_a_restart_of_the_scheduler(
    start_driver: Callable[..., Any], config_file: Path, scheduler: Any
) -> None:
    import ray

    low = start_driver(config_file, "low", "--run=low")
    low.wait_for_step(10)
    with lease(cpus("urgent", 4, priority=10), timeout_s=90) as urgent:
        assert urgent.workers == 4
        assert entries(scheduler)["low"].status is Status.WAITING
        assert urgent.allocation == entries(scheduler)["urgent"].allocation
        ray.kill(scheduler, no_restart=False)
        until("the scheduler is back with its leases", lambda: entries(scheduler)["urgent"].status is Status.RUNNING)
        assert not urgent.must_yield
    result = low.result()

    first, second = low.records("start")
    assert second["step"] >= 10, "it went on where it made way"
    assert result["samples"] == SampleOrder(90, 0).sample_ids(np.arange(60 * BATCH)).tolist()
    steps = [record["step"] for record in low.records("step")]
    assert steps == list(range(1, 61)), "no step was done twice"
    assert entries(scheduler)["low"].status is Status.DONE
    assert first["num_workers"] == second["num_workers"] == 2


def test_the_lease_of_a_killed_driver_goes_to_the_next_in_line(
    start_driver: Callable[..., Any], config_file: Path, scheduler: Any
) -> None:
    doomed = start_driver(config_file, "doomed", "--run=doomed")
    doomed.wait_for_step(3)
    doomed.kill()
    with lease(cpus("next", 4), timeout_s=60) as held, held.placement_group(timeout_s=60) as group:
        assert len(group.bundle_specs) == 4
        assert entries(scheduler)["doomed"].status is Status.LOST


def test_a_function_runs_on_what_the_lease_gave_and_gives_it_back(scheduler: Any) -> None:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    with lease(cpus("plain", 2), timeout_s=30) as held, held.placement_group() as group:
        strategy = PlacementGroupSchedulingStrategy(group)
        where = ray.remote(num_cpus=1)(lambda: ray.get_runtime_context().get_node_id()).options(
            scheduling_strategy=strategy
        )
        assert ray.get([where.remote(), where.remote()], timeout=60) == [*held.allocation] * 2
    assert entries(scheduler)["plain"].status is Status.DONE
    with pytest.raises(ZeroDivisionError), lease(cpus("broken", 4), timeout_s=30):
        _ = 1 / 0
    assert entries(scheduler)["broken"].status is Status.FAILED


def test_a_job_that_can_never_fit_is_refused_with_the_largest_pool(scheduler: Any) -> None:
    with pytest.raises(CapacityError, match="4"), lease(cpus("big", 5)):
        pass


def test_a_cancelled_job_learns_it_while_it_waits(scheduler: Any) -> None:
    from modelyard.scheduling import service

    with lease(cpus("first", 4), timeout_s=30):
        service.call(scheduler.submit, cpus("second", 1))
        service.call(scheduler.cancel, "second")
        assert entries(scheduler)["second"].status is Status.CANCELLED
        service.call(scheduler.submit, cpus("third", 1))
        service.call(scheduler.cancel, "third")
    with lease(cpus("fourth", 4), timeout_s=30) as held:
        service.call(scheduler.cancel, "fourth")
        until("the wish to yield arrives", lambda: held.must_yield)
        with pytest.raises(LeaseLostError):
            held.give_way()


def test_without_a_scheduler_the_same_code_runs_at_once(ray_cluster: str) -> None:
    with lease(cpus("laptop", 2)) as held:
        assert (held.is_local, held.workers, held.must_yield) == (True, 2, False)
        with held.placement_group(timeout_s=60) as group:
            assert len(group.bundle_specs) == 2


@pytest.mark.parametrize("policy", ["goodput", "priority"])
def test_thirty_jobs_on_three_pools_all_end_though_the_scheduler_and_a_node_are_killed(
    policy: str, token_config: Callable[..., Any], tmp_path: Path
) -> None:
    steps = 160
    config = token_config(
        training={"max_steps": steps, "global_batch_size": BATCH, "micro_batch_size": 24, "zero_stage": 1},
        checkpoint={"every_steps": 50},
        workers={"min": 1, "max": 4, "cpus": 1},
        lease={"tenant": "text"},
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    command = [sys.executable, str(Path(__file__).with_name("many_jobs.py")), policy]
    command += [f"sqlite:///{tmp_path / 'many.db'}", str(tmp_path / "config.yaml"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    logs = "".join(file.read_text()[-3000:] for file in sorted(tmp_path.glob("run-*.log")))
    assert done.returncode == 0, done.stderr[-4000:] + logs
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["faults"] == 2
    assert (seen["errors"], seen["unfinished"], seen["last_failure"], seen["runs"]) == ([], [], "", [0, 0]), logs
    assert (seen["statuses"], seen["jobs"]) == (["done"], 30), "nothing is lost"
    assert seen["most_on_a_node"] == 4, "never two leases on one GPU, and no GPU idle all the time"
    assert (seen["unexplained"], seen["untrue"]) == ([], []), "whoever waits is told why, and it is true"
    assert (seen["leased_at_the_end"], seen["free_gpus_at_the_end"]) == (0, 20), "no GPU leaks; four went with the node"
    gangs = []
    for name in ("run-0", "run-1"):
        result = json.loads((tmp_path / f"{name}.jsonl.result").read_text())
        assert result["samples"] == SampleOrder(90, 0).sample_ids(np.arange(steps * BATCH)).tolist(), "exact samples"
        records = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        gangs.append([record["num_workers"] for record in records if record["kind"] == "start"])
    assert any(len(set(workers)) > 1 for workers in gangs), f"no run was ever resized: {gangs}"


def test_a_waiting_job_and_a_served_model_make_the_autoscaler_launch_nodes_of_their_pools(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.e2e.grow", f"sqlite:///{tmp_path / 'grow.db'}", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert "known: a100, default, l4" in seen["unknown_pool"], "a pool without nodes is known when it can be launched"
    assert (seen["first"], seen["second"], seen["disjoint"]) == ({"l4": 2}, {"l4": 2}, True)
    assert seen["nodes"] == ["default", "l4", "l4"], "the pool that was asked for grew, and no other"
    for job in ("first", "second"):
        assert "more nodes of l4 were asked for" in seen[f"{job}_reason"]
    assert seen["served"] == ["a100", "default", "l4", "l4"], seen["said"]
    assert "gpt: runs with 1 replica(s)" in seen["said"]
