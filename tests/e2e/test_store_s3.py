"""A run whose store is an object store: trained, killed, resumed, and its model verified."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from modelyard.cli.main import modelyard
from modelyard.training.checkpoints import CheckpointStore
from modelyard.training.run_folder import RunFolder

SCRIPT = Path(__file__).parents[2] / "jobs" / "train.py"
STEPS = 30

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def config_file(token_config: Callable[..., Any], tmp_path: Path) -> Path:
    """A run that takes long enough to be killed in."""
    model = {"architecture": "llama", "layers": 4, "hidden_size": 128, "heads": 4, "max_positions": 16}
    config = token_config(
        task={"kind": "causal_lm", "model": model},
        training={"max_steps": STEPS, "global_batch_size": 96, "micro_batch_size": 24, "zero_stage": 2},
        checkpoint={"every_steps": 4},
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    return path


def test_a_run_on_s3_is_killed_resumed_and_its_model_verifies(
    start_driver: Callable[..., Any], config_file: Path, s3_store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELYARD_STORE", s3_store_uri)
    checkpoints = CheckpointStore(RunFolder(f"{s3_store_uri}/runs/remote/checkpoints"))
    # A cluster of its own, whose nodes have the credentials: the session's has none.
    first = start_driver(config_file, "first", "--run=remote", RAY_ADDRESS="local")
    first.wait_for_step(9)
    first.wait_for("a committed checkpoint", lambda: checkpoints.committed())
    first.kill()
    second = start_driver(config_file, "second", "--run=remote", RAY_ADDRESS="local")
    result = second.result()

    (start,) = second.records("start")
    assert start["step"] >= 4, "it went on from a checkpoint on S3"
    assert second.records("step")[-1]["step"] == STEPS, "every record reaches the driver"
    assert len(result["losses"]) == STEPS
    assert len(set(result["samples"])) == len(result["samples"]) == STEPS * 96
    assert len(checkpoints.committed()) <= 3, "old ones are pruned"

    verified = CliRunner().invoke(modelyard, ["models", "verify", result["model"]])
    assert verified.exit_code == 0, (verified.output, verified.exception)


def test_credentials_that_only_the_driver_has_are_one_clear_error(
    config_file: Path, s3_store_uri: str, ray_cluster: str
) -> None:
    environment = {**os.environ, "MODELYARD_STORE": s3_store_uri, "RAY_ADDRESS": ray_cluster}
    command = [sys.executable, str(SCRIPT), "--config", str(config_file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    error = done.stderr[done.stderr.index("error: ") :]
    assert "ACCESS_DENIED" in error
    assert "AWS_* must be set on every one of them" in error
    assert "Traceback" not in done.stderr
