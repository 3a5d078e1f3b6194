from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from modelyard.errors import NotFoundError, StorageError
from modelyard.observability import Tracker
from modelyard.observability.mlflow_client import connect


@pytest.fixture
def uri(fresh_database: bytes, tmp_path: Path) -> str:
    (tmp_path / "mlflow.db").write_bytes(fresh_database)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def start(uri: str, **others: object) -> Tracker:
    return Tracker.start("gpt", "first", tracking_uri=uri, **others)  # type: ignore[arg-type]


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in connect(uri).get_metric_history(run_id, name)]


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def test_a_finished_run_has_its_parameters_metrics_tags_and_files(uri: str, tmp_path: Path) -> None:
    params = {
        "training": {"lr": 1e-3, "steps": 5},
        "name": "tiny",
        "long": "x" * 9000,
        **{f"p{n}": n for n in range(150)},
    }
    (tmp_path / "curve.png").write_bytes(b"picture")
    with start(uri, params=params, tags={"team": "nlp"}) as tracker:
        for step in range(1200):
            tracker.log(step, {"loss": 1 / (step + 1), "lr": 0.1})
        tracker.log_file(tmp_path / "curve.png")
    run = connect(uri).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.params["training.lr"], run.data.params["p149"], run.data.tags["team"]) == ("0.001", "149", "nlp")
    assert len(run.data.params["long"]) == 6000
    assert history(uri, tracker.run_id, "loss") == [(step, 1 / (step + 1)) for step in range(1200)]
    (saved,) = tmp_path.glob("runs/gpt/*/artifacts/curve.png")
    assert saved.read_bytes() == b"picture"


def test_metrics_arrive_while_the_run_goes_on_and_log_does_not_wait(uri: str) -> None:
    tracker = start(uri)
    started = time.perf_counter()
    for step in range(1000):
        tracker.log(step, {"loss": 1.0})
    assert time.perf_counter() - started < 1.0  # a thousand writes to the database would take many seconds
    wait_for(lambda: len(history(uri, tracker.run_id, "loss")) == 1000)
    assert connect(uri).get_run(tracker.run_id).info.status == "RUNNING"
    tracker.finish("KILLED")
    tracker.finish()  # a second call changes nothing
    assert connect(uri).get_run(tracker.run_id).info.status == "KILLED"


def test_a_resumed_run_goes_on_with_the_same_history(uri: str) -> None:
    with start(uri) as first:
        first.log(1, {"loss": 2.0})
    with Tracker.resume(first.run_id, uri) as second:
        second.log(2, {"loss": 1.0})
        assert connect(uri).get_run(first.run_id).info.status == "RUNNING"
    assert history(uri, first.run_id, "loss") == [(1, 2.0), (2, 1.0)]
    with pytest.raises(NotFoundError):
        Tracker.resume("0" * 32, uri)


def test_an_error_in_the_block_ends_the_run_as_failed(uri: str) -> None:
    with pytest.raises(RuntimeError, match="boom"), start(uri) as tracker:
        raise RuntimeError("boom")
    assert connect(uri).get_run(tracker.run_id).info.status == "FAILED"


def test_nothing_is_lost_while_the_database_is_away(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = start(uri)
    real, away = tracker._client.log_batch, [True]

    def log_batch(*args: object, **others: object) -> object:
        if away[0]:
            raise OSError(5, "Input/output error")
        return real(*args, **others)

    monkeypatch.setattr(tracker._client, "log_batch", log_batch)
    for step in range(3):
        tracker.log(step, {"loss": float(step)})
    with pytest.raises(StorageError, match=r"mlflow\.db cannot be used"):
        tracker.flush()
    away[0] = False
    tracker.log(3, {"loss": 3.0})
    tracker.finish()
    assert history(uri, tracker.run_id, "loss") == [(step, float(step)) for step in range(4)]


def test_a_failed_finish_can_be_repeated(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = start(uri)
    tracker.log(1, {"loss": 1.0})
    with monkeypatch.context() as patch:

        def refuse(*_: object, **__: object) -> None:
            raise OSError(5, "Input/output error")

        patch.setattr(tracker._client, "log_batch", refuse)
        with pytest.raises(StorageError):
            tracker.finish()
    tracker.finish()
    assert history(uri, tracker.run_id, "loss") == [(1, 1.0)]
    assert connect(uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_not_a_number_is_recorded_so_that_a_diverged_run_can_be_seen(uri: str) -> None:
    with start(uri) as tracker:
        tracker.log(1, {"loss": float("nan")})
        tracker.log(2, {"loss": float("inf")})
        tracker.log(3, {"loss": 1.0})
    assert [step for step, _ in history(uri, tracker.run_id, "loss")] == [1, 2, 3]


def test_tracking_writes_nothing_into_the_working_directory(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    with start(uri) as tracker:
        (tmp_path / "note.txt").write_text("x")
        tracker.log_file(tmp_path / "note.txt")
        with pytest.raises(NotFoundError, match="absent"):
            tracker.log_file(tmp_path / "absent")
    assert list((tmp_path / "cwd").iterdir()) == []


def test_a_password_in_the_tracking_uri_is_not_shown() -> None:
    with pytest.raises(StorageError) as raised:
        Tracker.start("gpt", "first", tracking_uri="http://user:hunter2@127.0.0.1:1")
    assert "hunter2" not in str(raised.value)
    assert "127.0.0.1:1" in str(raised.value)


def test_a_read_only_database_is_a_storage_error(uri: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="MODELYARD_TRACKING_URI"):
        connect(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
