"""Parameter servers and gossip under Ray: a killed worker costs no row, and another number of workers goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.data.order import SampleOrder

STEPS = 40
BATCH = 96

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.parametrize("strategy", ["parameter_server", "gossip"])
def test_a_killed_worker_and_a_smaller_gang_cost_no_row(
    start_driver: Callable[..., Any],
    worker_processes: Callable[[], list[Any]],
    token_config: Callable[..., Any],
    tmp_path: Path,
    strategy: str,
) -> None:
    model = {"architecture": "llama", "layers": 4, "hidden_size": 128, "heads": 4, "max_positions": 16}
    config = token_config(
        task={"kind": "causal_lm", "model": model},
        training={"max_steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": 24, "strategy": strategy},
        checkpoint={"every_steps": 7},
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())

    first = start_driver(path, "first", "--run=wild")
    first.wait_for_step(10)
    worker_processes()[-1].kill()
    first.wait_for("a second gang", lambda: len(first.records("start")) == 2)
    first.wait_for_step(20)
    first.kill()
    second = start_driver(path, "second", "--run=wild", "--workers=1")
    wild = second.result()

    starts = first.records("start") + second.records("start")
    assert [start["num_workers"] for start in starts] == [2, 2, 1]
    assert all(start["step"] > 0 for start in starts[1:]), "each gang went on from a checkpoint"
    assert wild["samples"] == SampleOrder(90, 0).sample_ids(np.arange(STEPS * BATCH)).tolist()
    assert wild["losses"][-1] < wild["losses"][0] - 1.0
