"""Bad input to `jobs/train.py`: one clear error, an exit code, no traceback, and no training."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from modelyard.artifacts import Registry, Store
from modelyard.cli.main import run
from modelyard.cli.train import train_command
from modelyard.config import settings

SCRIPT = Path(__file__).parents[2] / "jobs" / "train.py"


class Refusal(NamedTuple):
    """How a program ended that refused its input."""

    code: int
    text: str


@pytest.fixture(autouse=True)
def database(fresh_database: bytes) -> None:
    """An empty tracking database, made in advance because that takes seconds."""
    settings().home.mkdir()
    (settings().home / "mlflow.db").write_bytes(fresh_database)


@pytest.fixture
def config_file(token_config: Callable[..., Any], tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(token_config(workers=1).to_yaml())
    return path


@pytest.fixture
def refused(config_file: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Refusal]:
    """`train.py` with these overrides, in this process: what it said and how it ended."""

    def train(*overrides: str) -> Refusal:
        with pytest.raises(SystemExit) as ended:
            run(train_command, ["--config", str(config_file), *overrides])
        return checked(Refusal(int(ended.value.code or 0), capsys.readouterr().err))

    return train


def program(config_file: Path, *overrides: str, **environment: str) -> Refusal:
    """`python jobs/train.py`, as a user calls it."""
    command = [sys.executable, str(SCRIPT), "--config", str(config_file), *overrides]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
    return checked(Refusal(done.returncode, done.stderr))


def checked(refusal: Refusal) -> Refusal:
    """Every refusal is an error of its own words, and comes before the first step."""
    assert refusal.code in (1, 2), refusal.text
    assert "Traceback" not in refusal.text
    assert refusal.text.startswith("error: ") or "\nerror: " in refusal.text
    assert "-> " in refusal.text, "what to do"
    store = Path(settings().store)
    assert not [*store.glob("models/*"), *store.glob("runs/*/checkpoints/*")]
    return refusal


def register(token_folder: Path) -> Path:
    """The dataset in the store as `datasets:/tokens/1`; its folder there."""
    store = Store.from_settings()
    manifest = store.put(token_folder, kind="dataset", name="tokens")
    Registry.from_settings().register(manifest)
    return store.open("dataset", manifest.digest())


# The config


def test_a_misspelt_key_is_named_with_the_nearest_one(config_file: Path) -> None:
    code, text = program(config_file, "--training.zero_stag=2")
    assert code == 2
    assert "training.zero_stag: unknown key; did you mean 'zero_stage'?" in text


def test_zero_stage_4_is_refused_with_the_limit(refused: Callable[..., Refusal]) -> None:
    code, text = refused("--training.zero_stage=4")
    assert code == 2
    assert "training.zero_stage: input should be less than or equal to 3 (got 4)" in text


def test_a_misspelt_key_of_the_model_is_named(refused: Callable[..., Refusal]) -> None:
    code, text = refused("--task.model.layer=3")
    assert code == 2
    assert "task.model.layer: unknown key; did you mean 'layers'?" in text


def test_a_raw_deepspeed_setting_that_has_a_field_is_refused(refused: Callable[..., Refusal]) -> None:
    code, text = refused("--training.deepspeed.zero_optimization.stage=3")
    assert code == 2
    assert "training.deepspeed.zero_optimization.stage: Modelyard sets this itself" in text
    assert "use `training.zero_stage` instead" in text


def test_a_config_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    code, text = program(tmp_path / "absent.yaml")
    assert code == 2
    assert "absent.yaml' does not exist" in text


# The data and the model


def test_a_dataset_that_does_not_exist_is_named(refused: Callable[..., Refusal]) -> None:
    code, text = refused("--dataset=datasets:/nothing")
    assert code == 2
    assert "no dataset 'nothing'" in text or "nothing" in text
    code, text = refused("--dataset=/no/such/folder")
    assert code == 2
    assert "dataset: '/no/such/folder' is neither a reference nor a folder" in text


def test_a_version_that_does_not_exist_is_named(refused: Callable[..., Refusal], token_folder: Path) -> None:
    register(token_folder)
    code, text = refused("--dataset=datasets:/tokens/7")
    assert code == 2
    assert "datasets:/tokens/7" in text or "version 7" in text


def test_a_corrupted_shard_is_named(refused: Callable[..., Refusal], token_folder: Path) -> None:
    shard = next(register(token_folder).glob("train*1*.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    code, text = refused("--dataset=datasets:/tokens")
    assert code == 1
    assert shard.name in text


def test_a_truncated_shard_of_a_plain_folder_is_named(
    refused: Callable[..., Refusal], token_folder: Path, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(token_folder, folder)
    shard = next(folder.glob("train*1*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-200])
    code, text = refused(f"--dataset={folder}")
    assert code == 2
    assert shard.name in text


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused_with_both_sizes(
    refused: Callable[..., Refusal],
) -> None:
    code, text = refused("--task.model.vocab_size=63")
    assert code == 2
    assert "the dataset's tokenizer has 64 tokens, the model's vocabulary only 63" in text
    assert "task.model.vocab_size" in text


def test_a_split_that_does_not_exist_is_refused_before_training(refused: Callable[..., Refusal]) -> None:
    code, text = refused("--validation.every_steps=2", "--validation.split=valid")
    assert code == 2
    assert "no split 'valid'" in text
    assert "did you mean 'validation'?" in text


def test_a_pretrained_folder_with_only_a_pickle_is_refused_unread(
    refused: Callable[..., Refusal], tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text('{"vocab_size": 64, "max_position_embeddings": 16}')
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s.")
    code, text = refused(f"--task={{kind: causal_lm, model: {{pretrained: {folder}}}}}")
    assert code == 1
    assert "pytorch_model.bin" in text
    assert "save_pretrained" in text, "how to convert it"


# The store


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    mounted = tmp_path / "small"
    mounted.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mounted], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
    (mounted / "filler").write_bytes(bytes((1 << 20) - 4096))
    yield mounted
    subprocess.run(["umount", "-l", mounted], check=True)


def test_a_full_store_is_told_with_the_room_there_is(
    refused: Callable[..., Refusal], full_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELYARD_STORE", str(full_disk / "store"))
    code, text = refused()
    assert code == 1
    assert f"{full_disk / 'store'}: the disk is full" in text
    assert "MODELYARD_STORE" in text


def test_an_unreachable_object_store_is_told_within_half_a_minute(config_file: Path) -> None:
    began = time.monotonic()
    environment = {
        "MODELYARD_STORE": "s3://tests/store",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
    }
    code, text = program(config_file, **environment)
    assert time.monotonic() - began < 30
    assert code == 1
    assert "cannot reach http://127.0.0.1:9" in text
    assert "AWS_ENDPOINT_URL" in text


# The cluster, and other drivers

HOLDER = """
import sys
from modelyard.config import settings
from modelyard.training.runs import exclusive
with exclusive(settings().home, "mine"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_driver_on_this_machine_is_refused(refused: Callable[..., Refusal]) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        code, text = refused("--run=mine")
    finally:
        holder.kill()
        holder.wait(20)
    assert code == 2
    assert "run 'mine' is being trained by another process" in text


@pytest.mark.ray
def test_a_second_driver_from_another_machine_is_refused_and_leaves_the_first_ones_record(
    config_file: Path, ray_cluster: str, tmp_path: Path, token_config: Callable[..., Any]
) -> None:
    import ray

    from modelyard.training.monitor import start_monitor

    monitor = start_monitor("mine")
    ray.get(monitor.ping.remote(), timeout=60)
    try:
        code, text = program(config_file, "--run=mine", RAY_ADDRESS=ray_cluster)
    finally:
        ray.kill(monitor)
    assert code == 2
    assert "run 'mine' is being trained by another process" in text
    assert not (Path(settings().store) / "runs" / "mine" / "run.json").exists(), "refused before it was recorded"


@pytest.mark.ray
def test_more_workers_than_the_cluster_can_hold_are_refused_with_what_it_has(
    config_file: Path, ray_cluster: str
) -> None:
    code, text = program(config_file, "--workers=5", RAY_ADDRESS=ray_cluster)
    assert code == 2
    assert "workers.min=5 workers of 1 CPU each do not fit: room for 4 on 1 matching node(s) with 4 CPU" in text
    assert "set workers to at most 4" in text


@pytest.mark.ray
def test_a_pool_that_no_node_belongs_to_is_refused(config_file: Path, ray_cluster: str) -> None:
    code, text = program(config_file, "--workers.pool=h100", RAY_ADDRESS=ray_cluster)
    assert code == 2
    assert "no node matches the workers' label selector {'modelyard/pool': 'h100'}" in text
