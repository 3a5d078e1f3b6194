from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelyard.artifacts import Manifest, Registry, Store
from modelyard.errors import ConfigError, IntegrityError, NotFoundError, StorageError


def put(registry: Registry, folder: Path, name: str = "tiny", kind: str = "model", **others: object) -> Manifest:
    return registry.store.put(folder, kind=kind, name=name, **others)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def fresh_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database as it is when new; copying it saves four seconds per test."""
    path = tmp_path_factory.mktemp("mlflow") / "fresh.db"
    Registry(f"sqlite:///{path}", Store(str(path.parent / "store"), path.parent)).versions("model")
    return path


@pytest.fixture
def registry(fresh_database: Path, store: Store, tmp_path: Path) -> Registry:
    (tmp_path / "mlflow.db").write_bytes(fresh_database.read_bytes())
    return Registry(f"sqlite:///{tmp_path / 'mlflow.db'}", store)


def test_versions_count_up_and_the_same_content_keeps_its_version(registry: Registry, folder: Path) -> None:
    first = registry.register(put(registry, folder, metrics={"loss": 0.1 + 0.2}))
    second = registry.register(put(registry, folder, config={"seed": 2}))
    again = registry.register(put(registry, folder, metrics={"loss": 0.1 + 0.2}))
    assert (first.reference, second.reference) == ("models:/tiny/1", "models:/tiny/2")
    assert again == first
    assert first.metrics == {"loss": 0.1 + 0.2}
    assert registry.versions("model") == registry.versions("model", "tiny") == [first, second]
    assert registry.find(second.digest) == second


def test_a_dataset_and_a_model_may_share_a_name(registry: Registry, folder: Path) -> None:
    model = registry.register(put(registry, folder, "same"))
    dataset = registry.register(put(registry, folder, "same", "dataset"))
    assert [registry.versions("model"), registry.versions("dataset")] == [[model], [dataset]]
    assert registry.resolve("models:/same").digest != registry.resolve("datasets:/same").digest
    assert registry.resolve("datasets:/same/1").reference == "datasets:/same/1"


def test_references_resolve_by_version_by_alias_and_to_the_newest(registry: Registry, folder: Path) -> None:
    versions = [registry.register(put(registry, folder, config={"n": n})) for n in range(11)]
    assert registry.resolve("models:/tiny").version == 11
    assert registry.resolve("tiny/3", "model") == versions[2]
    assert registry.promote("models:/tiny/3", "production").aliases == ("production",)
    assert registry.resolve("models:/tiny@production").version == 3
    registry.promote("models:/tiny/4", "production")  # it moves
    assert registry.resolve("models:/tiny@production").version == 4
    assert registry.resolve("models:/tiny/3").aliases == ()


def test_a_wrong_name_version_or_alias_shows_what_there_is(registry: Registry, folder: Path) -> None:
    with pytest.raises(NotFoundError, match="there are none"):
        registry.resolve("models:/tiny")
    registry.register(put(registry, folder))
    with pytest.raises(NotFoundError, match="no aliases"):
        registry.resolve("models:/tiny@prod")
    registry.promote("models:/tiny/1", "production")
    for wrong, hint in {
        "models:/tinny/1": "did you mean 'tiny'?",
        "models:/tiny/2": "versions: 1",
        "models:/tiny@prodution": "did you mean 'production'?",
        "models:/tiny@x": "known: production",
    }.items():
        with pytest.raises(NotFoundError) as raised:
            registry.resolve(wrong)
        assert hint in str(raised.value)
    with pytest.raises(ConfigError, match="reserved"):
        registry.promote("models:/tiny/1", "latest")


def test_metrics_are_written_onto_the_version(registry: Registry, folder: Path) -> None:
    registry.register(put(registry, folder, metrics={"loss": 2.0}))
    registry.log_metrics("models:/tiny/1", {"loss": 1.0, "test/perplexity": 7.25})
    assert registry.resolve("models:/tiny/1").metrics == {"loss": 1.0, "test/perplexity": 7.25}
    with pytest.raises(ConfigError, match="nan"):
        registry.log_metrics("models:/tiny/1", {"loss": float("nan")})
    with pytest.raises(ConfigError, match="metric name"):
        registry.log_metrics("models:/tiny/1", {"a'b": 1.0})


def test_open_gives_verified_files_or_names_the_damaged_one(registry: Registry, folder: Path) -> None:
    info = registry.register(put(registry, folder))
    opened, place = registry.open("models:/tiny/1")
    assert opened == info
    assert (place / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    (place / "config.json").write_bytes(b'{"layers": 9}')
    with pytest.raises(IntegrityError, match=r"config\.json"):
        registry.open("models:/tiny/1")


def test_versions_of_other_tools_are_left_alone(registry: Registry, folder: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(registry.tracking_uri, registry.tracking_uri)
    client.create_registered_model("tiny")
    client.create_model_version("tiny", "s3://elsewhere/model")
    client.create_registered_model("someone's: model".replace(":", ""))
    info = registry.register(put(registry, folder))
    assert info.version == 2
    assert registry.versions("model") == [info]
    with pytest.raises(NotFoundError, match="versions: 2"):
        registry.resolve("models:/tiny/1")


def test_a_registry_travels_to_another_process(registry: Registry, folder: Path) -> None:
    info = registry.register(put(registry, folder))
    assert pickle.loads(pickle.dumps(registry)).resolve("models:/tiny") == info


_REGISTER = """
import sys, pathlib
from modelyard.artifacts import Registry
registry = Registry.from_settings()
for n in range(5):
    for name, config in (("own", {"n": n, "who": sys.argv[2]}), ("shared", {"n": n})):
        registry.register(registry.store.put(pathlib.Path(sys.argv[1]), kind="model", name=name, config=config))
"""


def register_in_two_processes(folder: Path, tracking_uri: str) -> None:
    environment = {**os.environ, "MODELYARD_TRACKING_URI": tracking_uri}
    workers = [
        subprocess.Popen([sys.executable, "-c", _REGISTER, str(folder), who], env=environment, stderr=subprocess.PIPE)
        for who in "ab"
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors.decode()
        assert errors == b""  # and quietly


def assert_all_registered(registry: Registry) -> None:
    assert [info.version for info in registry.versions("model", "own")] == list(range(1, 11))
    shared = registry.versions("model", "shared")
    assert len({info.digest for info in shared}) == len(shared) == 5


def test_two_processes_register_at_once_in_a_database_that_does_not_exist_yet(folder: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    register_in_two_processes(folder, uri)
    assert_all_registered(Registry(uri, Store.from_settings()))


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, fresh_database: Path) -> Iterator[str]:
    import socket
    import urllib.request

    folder = tmp_path_factory.mktemp("server")
    (folder / "m.db").write_bytes(fresh_database.read_bytes())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'm.db'}", "--artifacts-destination", str(folder / "files")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail("mlflow server does not start:\n" + (folder / "log").read_text()[-3000:])
                time.sleep(0.3)
        yield url
    finally:
        os.killpg(process.pid, 15)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)


@pytest.mark.slow
def test_a_real_mlflow_server_serves_the_same(mlflow_server: str, folder: Path, tmp_path: Path) -> None:
    registry = Registry(mlflow_server, Store.from_settings())
    register_in_two_processes(folder, mlflow_server)
    assert_all_registered(registry)
    info = registry.register(put(registry, folder, "docs", "dataset"))
    registry.promote(info.reference, "best")
    registry.log_metrics("datasets:/docs@best", {"rows": 3.0})
    assert registry.resolve("datasets:/docs@best").metrics == {"rows": 3.0}
    assert registry.find(info.digest, "dataset") == registry.resolve("datasets:/docs/1")
    assert registry.open("datasets:/docs@best")[1].is_dir()
    with pytest.raises(NotFoundError, match="did you mean 'docs'"):
        registry.resolve("datasets:/dogs/1")


def test_an_unreachable_tracking_server_is_a_quick_storage_error(store: Store) -> None:
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"http://127\.0\.0\.1:1 cannot be reached") as raised:
        Registry("http://127.0.0.1:1", store).versions("model")
    assert "MODELYARD_TRACKING_URI" in raised.value.todo
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to be one" * 50])
def test_a_damaged_database_is_a_storage_error(store: Store, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.db").write_bytes(content)
    with pytest.raises(StorageError, match=r"bad\.db"):
        Registry(f"sqlite:///{tmp_path / 'bad.db'}", store).versions("model")


def test_an_unknown_kind_of_tracking_uri_is_refused(store: Store) -> None:
    with pytest.raises((ConfigError, StorageError), match="nonsense"):
        Registry("nonsense://x", store).versions("model")


def test_connecting_leaves_the_root_logger_alone(registry: Registry) -> None:
    before = (logging.getLogger().level, list(logging.getLogger().handlers))
    registry.versions("model")
    assert (logging.getLogger().level, list(logging.getLogger().handlers)) == before


def test_importing_artifacts_imports_neither_mlflow_nor_ray_nor_torch() -> None:
    code = "import sys, modelyard.artifacts, modelyard.observability, modelyard.cli.models\n"
    code += "print([m for m in ('mlflow', 'ray', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
