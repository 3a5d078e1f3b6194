"""A tensor-parallel gang under Ray: a killed worker costs no row, and one worker with a whole model can go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.data.order import SampleOrder

STEPS = 24
BATCH = 32

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_killed_worker_and_another_layout_cost_no_row(
    start_driver: Callable[..., Any],
    worker_processes: Callable[[], list[Any]],
    token_config: Callable[..., Any],
    tmp_path: Path,
) -> None:
    model = {"architecture": "llama", "layers": 2, "hidden_size": 64, "heads": 4, "max_positions": 16}
    config = token_config(
        task={"kind": "causal_lm", "model": model},
        training={
            "max_steps": STEPS,
            "global_batch_size": BATCH,
            "micro_batch_size": 16,
            "zero_stage": 1,
            "parallel": {"tensor": 2},
        },
        checkpoint={"every_steps": 5},
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())

    first = start_driver(path, "first", "--run=wild")
    first.wait_for_step(6)
    worker_processes()[-1].kill()
    first.wait_for("a second gang", lambda: len(first.records("start")) == 2)
    first.wait_for_step(11)
    first.kill()
    second = start_driver(path, "second", "--run=wild", "--workers=1", "--training.parallel.tensor=1")
    wild = second.result()

    starts = first.records("start") + second.records("start")
    assert [(start["num_workers"], start["universal"]) for start in starts] == [(2, False), (2, False), (1, True)]
    assert all(start["step"] > 0 for start in starts[1:]), "each gang went on from a checkpoint"
    assert wild["samples"] == SampleOrder(90, 0).sample_ids(np.arange(STEPS * BATCH)).tolist()
    assert wild["losses"][-1] < wild["losses"][0] - 0.5
