"""Who a run is: what may change when it goes on, and that one driver at a time works on it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelyard.artifacts.manifest import FileEntry
from modelyard.errors import ConfigError
from modelyard.training import TrainConfig
from modelyard.training.run_folder import RunFolder
from modelyard.training.runs import (
    FINISHED,
    RUN_RECORD,
    RunRecord,
    choose_run,
    default_run_id,
    exclusive,
    identity,
    read_record,
)

DATA = {"train-00000.arrow": FileEntry(sha256="a" * 64, size_bytes=9)}


@pytest.fixture
def runs(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "runs"))


def start(runs: RunFolder, config: TrainConfig) -> str:
    """Choose the run and write its record, as a driver does."""
    who = identity(config, DATA)
    run_id = choose_run(runs, config, who)
    record = RunRecord(run_id=run_id, identity=who, config={})
    runs.sub(run_id).write(RUN_RECORD, record.model_dump_json().encode())
    return run_id


@pytest.mark.parametrize(
    "changes",
    [
        {"workers": {"min": 1, "max": 4}},
        {"checkpoint": {"every_steps": 5}},
        {"failures": {"max_failures": 9}},
        {"dataset": "datasets:/the-same-rows-under-another-name"},
        {"run": "named"},
        {"training": {"micro_batch_size": 1}},
        {"training": {"activation_checkpointing": True}},
        {"training": {"deepspeed": {"dump_state": True}}},
        {"training": {"stop_after_s": 5.0}},
    ],
)
def test_where_and_how_safely_a_run_works_may_change(
    token_config: Callable[..., TrainConfig], changes: dict[str, Any]
) -> None:
    assert identity(token_config(**changes), DATA) == identity(token_config(), DATA)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"training": {"max_steps": 13}},
        {"training": {"global_batch_size": 16}},
        {"training": {"zero_stage": 2}},
        {"training": {"precision": "bf16"}},
        {"optimizer": {"learning_rate": 0.02}},
        {"schedule": {"warmup_steps": 3}},
        {"validation": {"every_steps": 4}},
        {"task": {"model": {"architecture": "llama", "layers": 3, "hidden_size": 32, "heads": 2}}},
        {"name": "other"},
    ],
)
def test_what_a_run_computes_may_not_change(token_config: Callable[..., TrainConfig], changes: dict[str, Any]) -> None:
    assert identity(token_config(**changes), DATA) != identity(token_config(), DATA)


def test_other_data_is_another_run(token_config: Callable[..., TrainConfig]) -> None:
    other = {"train-00000.arrow": FileEntry(sha256="b" * 64, size_bytes=9)}
    assert identity(token_config(), DATA) != identity(token_config(), other)


def test_the_same_settings_find_their_unfinished_run_again(
    token_config: Callable[..., TrainConfig], runs: RunFolder
) -> None:
    first = start(runs, token_config())
    assert first == default_run_id(token_config(), identity(token_config(), DATA))
    assert start(runs, token_config(workers=4)) == first
    assert start(runs, token_config(seed=1)) != first


def test_repeating_a_finished_run_is_a_new_run(token_config: Callable[..., TrainConfig], runs: RunFolder) -> None:
    first = start(runs, token_config())
    runs.sub(first).write(FINISHED, b"{}")
    assert start(runs, token_config()) == f"{first}-2"
    runs.sub(f"{first}-2").write(FINISHED, b"{}")
    assert start(runs, token_config()) == f"{first}-3"


def test_a_named_run_goes_on_under_its_name_even_when_it_has_finished(
    token_config: Callable[..., TrainConfig], runs: RunFolder
) -> None:
    assert start(runs, token_config(run="mine")) == "mine"
    runs.sub("mine").write(FINISHED, b"{}")
    assert start(runs, token_config(run="mine", workers=4)) == "mine"


def test_a_named_run_with_other_settings_is_refused_and_they_are_listed(
    token_config: Callable[..., TrainConfig], runs: RunFolder
) -> None:
    start(runs, token_config(run="mine"))
    with pytest.raises(ConfigError) as caught:
        start(runs, token_config(run="mine", seed=3, optimizer={"learning_rate": 0.5}))
    text = str(caught.value)
    assert "run 'mine' exists with other settings: optimizer.learning_rate was 0.01, now 0.5; seed was 0, now 3" in text
    assert "--run=NAME" in text


def test_a_record_comes_back_as_it_was_written(token_config: Callable[..., TrainConfig], runs: RunFolder) -> None:
    run_id = start(runs, token_config())
    record = read_record(runs.sub(run_id))
    assert record is not None
    assert record.identity == identity(token_config(), DATA)
    assert read_record(runs.sub("absent")) is None


HOLDER = """
import sys, pathlib
from modelyard.training.runs import exclusive
with exclusive(pathlib.Path(sys.argv[1]), "mine"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_driver_is_refused_until_the_first_has_gone_however_it_went(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    refused = pytest.raises(ConfigError, match=r"(?s)run .mine. is being trained by another process.*--run=NAME")
    with refused, exclusive(tmp_path, "mine"):
        pass
    with exclusive(tmp_path, "another"):
        pass
    holder.kill()
    holder.wait(20)
    with exclusive(tmp_path, "mine"):
        pass
