"""Every way of training that the config offers works on CPU workers, and goes on exactly after a save.

The engines of one gang run in the same processes, one after another (`engine_gang.py`), because starting those
takes longer than training. The dataset's sequences are easy: a loss that does not fall means a broken mode.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.training.gangs import perform

from modelyard.errors import ConfigError
from modelyard.training.checkpoints import to_universal
from modelyard.training.deepspeed_config import check_written_by

STEPS = 8
EXACT = 1e-6
"""Nats: the same arithmetic in the same order."""
FP32 = 2e-5
"""Nats after 8 steps when gradients are summed in another order."""
BF16 = 2e-2

pytestmark = pytest.mark.slow

LLAMA = {"architecture": "llama", "layers": 2, "hidden_size": 32, "heads": 2, "max_positions": 16}
SGD = {"kind": "sgd", "learning_rate": 0.1}
MUON = {"kind": "muon", "learning_rate": 0.02, "adam_learning_rate": 0.01}
STAGES = (1, 2, 3)


def run(name: str, folder: Path, stage: int, *, optimizer: Any = None, task: Any = None, **training: Any) -> Any:
    config = {
        "name": "counter",
        "dataset": str(folder),
        "task": {"kind": "causal_lm", "model": LLAMA, **(task or {})},
        "training": {"max_steps": 100, "global_batch_size": 8, "micro_batch_size": 3, "zero_stage": stage, **training},
        "optimizer": optimizer or {"kind": "adamw", "learning_rate": 0.01},
    }
    return {"name": name, "config": config, "steps": STEPS}


def two_worker_runs(folder: Path) -> list[Any]:
    runs = [run(f"plain-{stage}", folder, stage) for stage in (0, *STAGES)]
    runs += [run("bf16-0", folder, 0, precision="bf16")]
    for stage in STAGES:
        runs += [
            run(f"bf16-{stage}", folder, stage, precision="bf16"),
            run(f"offload-{stage}", folder, stage, offload_optimizer=True),
            run(f"recompute-{stage}", folder, stage, activation_checkpointing=True),
            run(f"muon-{stage}", folder, stage, optimizer=MUON, gradient_clipping=0),
            run(f"sgd-{stage}", folder, stage, optimizer=SGD),
        ]
    runs += [run("offload-parameters", folder, 3, offload_optimizer=True, offload_parameters=True)]
    return runs + [run(f"lora-{stage}", folder, stage, task={"lora": {"rank": 4}}) for stage in (2, 3)]


NAMES = [each["name"] for each in two_worker_runs(Path("unused"))]
RESIZABLE = [name for name in NAMES if not name.endswith("-0") and not name.startswith(("sgd", "muon"))]
"""Those whose sharded state DeepSpeed converts: its universal format knows Adam's two moments only."""


def gang(runs: list[Any], workers: int, folder: Path, out: Path, timeout_s: float = 420.0) -> dict[str, Any]:
    """Run all of `runs` on one gang; their results by name."""
    return perform("engine_gang", {"workers": workers, "dataset": str(folder), "runs": runs}, out, timeout_s)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def results(token_folder: Path, out: Path) -> dict[str, Any]:
    """What every run on two workers measured."""
    return gang(two_worker_runs(token_folder), 2, token_folder, out)


@pytest.fixture(scope="module")
def on_one_worker(token_folder: Path, out: Path, results: dict[str, Any]) -> dict[str, Any]:
    """The same runs continued by one worker, from the checkpoints of two in the universal format."""
    runs = []
    for each in two_worker_runs(token_folder):
        name = each["name"]
        if name not in RESIZABLE or "error" in results[name]:
            continue
        to_universal(out / f"{name}-saved", out / f"{name}-universal")
        runs.append({**each, "name": f"{name}-on-1", "load": str(out / f"{name}-universal")})
    return gang(runs, 1, token_folder, out)


def good(results: dict[str, Any], name: str) -> Any:
    """The result of a run that learned."""
    assert "error" not in results[name], results[name]["error"]
    losses = results[name]["losses"]
    assert losses[-1] < losses[0] - 0.1, losses
    return results[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_engine_goes_on_exactly(results: dict[str, Any], name: str) -> None:
    found = good(results, name)
    assert found["again"] == pytest.approx(found["losses"][STEPS // 2 :], abs=EXACT)


@pytest.mark.parametrize("name", RESIZABLE)
def test_one_worker_goes_on_from_two_workers(results: dict[str, Any], on_one_worker: dict[str, Any], name: str) -> None:
    expected = good(results, name)["losses"][STEPS // 2 :]
    found = on_one_worker[f"{name}-on-1"]
    assert "error" not in found, found["error"]
    assert found["losses"] == pytest.approx(expected, abs=BF16 if name.startswith("bf16") else FP32)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", ["plain", "recompute", "offload"])
def test_what_only_saves_memory_changes_no_loss(results: dict[str, Any], mode: str, stage: int) -> None:
    found, plain = good(results, f"{mode}-{stage}"), good(results, "plain-0")
    assert found["losses"] == pytest.approx(plain["losses"], abs=FP32)
    assert found["norms"] == pytest.approx(plain["norms"], rel=1e-3)
    assert found["squares"] == pytest.approx(plain["squares"], rel=1e-3), "norms of the micro-batches of both workers"


def test_offloaded_parameters_change_no_loss(results: dict[str, Any]) -> None:
    found = good(results, "offload-parameters")
    assert found["losses"] == pytest.approx(results["plain-0"]["losses"], abs=FP32)
    assert found["offload"] == ["True", "True"]


@pytest.mark.parametrize("stage", STAGES)
def test_each_worker_holds_half_of_the_optimizer_state(results: dict[str, Any], stage: int) -> None:
    whole, part = results["plain-0"]["state_elements"], results[f"plain-{stage}"]["state_elements"]
    assert whole / 2 <= part < whole * 0.52


@pytest.mark.parametrize("stage", [0, *STAGES])
def test_bf16_computes_in_bf16_and_keeps_its_optimizer_state_in_fp32(results: dict[str, Any], stage: int) -> None:
    found = good(results, f"bf16-{stage}")
    assert found["dtypes"] == ["torch.bfloat16"]
    assert found["state_dtypes"] == ["torch.float32"]
    assert found["losses"] == pytest.approx(results["plain-0"]["losses"], abs=0.1)
    assert found["norms"][0] == pytest.approx(results["plain-0"]["norms"][0], rel=0.05)


@pytest.mark.parametrize("stage", STAGES)
def test_muon_is_deepspeeds_and_learns_alike_at_every_stage(results: dict[str, Any], stage: int) -> None:
    found = good(results, f"muon-{stage}")
    assert "muon" in found["optimizer"].lower()
    assert found["losses"] == pytest.approx(results["muon-1"]["losses"], abs=0.02)


@pytest.mark.parametrize("stage", STAGES)
def test_sgd_keeps_one_number_per_weight(results: dict[str, Any], stage: int) -> None:
    found = good(results, f"sgd-{stage}")
    assert found["optimizer"] == "SGD"
    assert found["state_elements"] * 2 == results[f"plain-{stage}"]["state_elements"]


@pytest.mark.parametrize("stage", [2, 3])
def test_lora_moves_no_weight_of_the_base(results: dict[str, Any], stage: int) -> None:
    found = good(results, f"lora-{stage}")
    assert found["frozen"] > 10
    assert found["frozen_moved"] == []
    assert found["moved"] > 0
    assert found["losses"] == pytest.approx(good(results, "lora-2")["losses"], abs=FP32)


def test_three_workers_share_eight_rows_in_uneven_micro_batches(
    results: dict[str, Any], token_folder: Path, out: Path
) -> None:
    runs = [run(f"uneven-{stage}", token_folder, stage, micro_batch_size=1) for stage in (0, *STAGES)]
    found = gang([{**each, "save": False} for each in runs], 3, token_folder, out)
    for stage in (0, *STAGES):
        uneven = good(found, f"uneven-{stage}")
        assert uneven["losses"] == pytest.approx(results["plain-0"]["losses"], abs=FP32), f"ZeRO-{stage}"


def test_a_compiled_model_has_the_same_losses(results: dict[str, Any], token_folder: Path, out: Path) -> None:
    try:
        runs = [{**run("compiled", token_folder, 1, compile=True, micro_batch_size=8), "save": False}]
        found = gang(runs, 1, token_folder, out, timeout_s=90)
    except subprocess.TimeoutExpired:
        pytest.skip("compiling takes more than 90 s on this machine")
    assert good(found, "compiled")["losses"] == pytest.approx(results["plain-0"]["losses"], abs=FP32)


@pytest.mark.parametrize("optimizer", [{"kind": "sgd"}, {"kind": "muon"}, {"kind": "adamw"}])
@pytest.mark.parametrize("stage", STAGES)
def test_only_adams_sharded_state_can_be_read_by_another_number_of_workers(
    token_config: Callable[..., Any], stage: int, optimizer: Any
) -> None:
    training = {"zero_stage": stage, "gradient_clipping": 0}
    config = token_config(training=training, optimizer={"learning_rate": 0.01, **optimizer})
    check_written_by(config, written_by=2, num_workers=2)
    if optimizer["kind"] == "adamw":
        check_written_by(config, written_by=2, num_workers=1)
    else:
        with pytest.raises(ConfigError, match=r"2 worker.* not 1"):
            check_written_by(config, written_by=2, num_workers=1)


def test_the_config_names_the_stage_that_offloading_needs(token_config: Callable[..., Any]) -> None:
    with pytest.raises(Exception, match="offload_parameters needs zero_stage 3"):
        token_config(training={"zero_stage": 2, "offload_parameters": True})
