"""Submitting jobs: what is sent and what is not, and how output and exit codes come back."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from click.testing import CliRunner

from modelyard.cli.main import modelyard
from modelyard.clusters import submit
from modelyard.errors import AccessError, ConfigError, NotFoundError, UnavailableError


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "jobs").mkdir(parents=True)
    (folder / "pyproject.toml").touch()
    (folder / "jobs" / "train.py").write_text("print('hello')")
    return folder


def test_the_whole_repository_goes_along_and_the_lease_is_in_the_command(repository: Path) -> None:
    lease = {"tenant": "vision", "priority": None, "pools": "[a100, l4]"}
    job = submit.prepare(repository / "jobs" / "train.py", ["--config", "a file.yaml"], lease=lease)
    assert job.working_dir == repository
    command = "python jobs/train.py --config 'a file.yaml' --lease.tenant=vision '--lease.pools=[a100, l4]'"
    assert job.entrypoint == command
    assert ".git" in job.runtime_env["excludes"]
    assert "py_modules" not in job.runtime_env


def test_the_code_of_a_checkout_goes_along_unless_told_otherwise(repository: Path) -> None:
    (repository / "platform" / "modelyard").mkdir(parents=True)
    script = repository / "jobs" / "train.py"
    assert submit.prepare(script, []).runtime_env["py_modules"] == [str(repository / "platform" / "modelyard")]
    assert "py_modules" not in submit.prepare(script, [], with_code=False).runtime_env


def test_data_in_the_working_directory_is_refused_with_its_name(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (repository / "weights.bin").open("wb") as stream:
        stream.truncate(300 << 20)
    with pytest.raises(ConfigError, match=r"holds 300 MiB, above 200: weights.bin \(300 MiB\)"):
        submit.prepare(repository / "jobs" / "train.py", [])
    subprocess.run(["git", "init", "-q", str(repository)], check=True)
    (repository / ".gitignore").write_text("*.bin\n")
    submit.prepare(repository / "jobs" / "train.py", [])


def test_a_script_that_is_not_there_or_elsewhere_is_refused(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no script"):
        submit.prepare(repository / "jobs" / "trian.py", [])
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ConfigError, match="outside the working directory"):
        submit.prepare(repository / "jobs" / "train.py", [], tmp_path / "elsewhere")


def test_a_working_directory_that_is_none_is_refused(repository: Path) -> None:
    script = repository / "jobs" / "train.py"
    for folder in (script, repository / "none"):
        with pytest.raises(NotFoundError, match=r"no folder .*\n  -> name one with --working-dir"):
            submit.prepare(script, [], folder)


def test_a_pipe_in_the_working_directory_is_refused_for_it_would_be_waited_for(repository: Path) -> None:
    os.mkfifo(repository / "pipe")
    with pytest.raises(ConfigError, match="pipe' is no file that can be sent"):
        submit.prepare(repository / "jobs" / "train.py", [])
    subprocess.run(["git", "init", "-q", str(repository)], check=True)
    (repository / ".gitignore").write_text("pipe\n")
    submit.prepare(repository / "jobs" / "train.py", [])


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_wait_that_is_no_length_of_time_is_refused(repository: Path, seconds: str) -> None:
    answer = CliRunner().invoke(modelyard, ["submit", str(repository / "jobs" / "train.py"), "--timeout-s", seconds])
    assert answer.exit_code == 2
    assert "--timeout-s" in answer.output


def test_an_id_that_is_no_name_is_refused(repository: Path) -> None:
    with pytest.raises(ConfigError, match=r"--id 'a b/\.\./c' is no name"):
        submit.prepare(repository / "jobs" / "train.py", [], submission_id="a b/../c")


@pytest.fixture
def silent() -> Iterator[tuple[str, socket.socket]]:
    """An address at which calls are taken, and never answered."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        yield f"http://127.0.0.1:{server.getsockname()[1]}", server


def test_a_dashboard_that_never_answers_is_given_up(silent: tuple[str, socket.socket]) -> None:
    with pytest.raises(UnavailableError, match=f"no cluster answers at {silent[0]}"):
        submit.connect(silent[0], None, timeout_s=0.5)


def test_the_named_cluster_is_called_whatever_rays_variables_say(
    silent: tuple[str, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with pytest.raises(UnavailableError):
        submit.connect(silent[0], "secret", timeout_s=0.5)
    assert b"Bearer secret" in silent[1].accept()[0].recv(4096)


def test_a_token_that_nobody_named_is_not_sent_in_plain_text(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    words = ["submit", str(repository / "jobs" / "train.py"), "--address", "http://192.0.2.1:8265"]
    with pytest.raises(AccessError, match="is plain HTTP: the token could be read"):
        modelyard.main(words, standalone_mode=False)
    words[-1] = "192.0.2.1:8265"
    with pytest.raises(ConfigError, match="is no address of a dashboard"):
        modelyard.main(words, standalone_mode=False)
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="holds no token"):
        modelyard.main(
            [*words[:-1], "http://192.0.2.1:1", "--token-file", str(tmp_path / "empty")], standalone_mode=False
        )


class Client:
    """A dashboard whose connection breaks as often as it is told to."""

    def __init__(self, parts: list[str], breaks: int, status: str, code: int | None, lost: str | None = None) -> None:
        self.parts, self.breaks, self.status, self.code, self.lost = parts, breaks, status, code, lost
        self.break_with: Exception = RuntimeError("the connection was closed")
        self.living = ["n2"]

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for number, part in enumerate(self.parts):
            if self.breaks and number == 1:
                self.breaks -= 1
                raise self.break_with
            yield part
            await asyncio.sleep(0)

    def get_job_info(self, job_id: str) -> Any:
        return SimpleNamespace(
            status=self.status,
            driver_exit_code=self.code,
            error_type=self.lost,
            driver_node_id="n1",
            message="Ray says so",
        )

    def _do_request(self, method: str, path: str) -> Any:
        nodes = [{"node_id": node, "state": "ALIVE"} for node in self.living]
        return SimpleNamespace(status_code=200, json=lambda: {"data": {"result": {"result": nodes}}})

    def get_job_logs(self, job_id: str) -> str:
        if self.lost:
            raise RuntimeError("status code 500: no agent on the job's node")
        return "".join(self.parts)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", None, 1), ("FAILED", 0, 1), ("STOPPED", None, 130)],
)
def test_the_exit_code_is_that_of_the_job(status: str, code: int | None, expected: int) -> None:
    assert submit.follow(Client(["x"], 0, status, code), "job", lambda _: None) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("how", [RuntimeError("closed"), OSError("reset"), aiohttp.ServerDisconnectedError()])
def test_every_line_comes_once_though_the_connection_breaks(how: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_POLL_S", 0.0)
    written: list[str] = []
    client = Client(["one\n", "two\n", "three\n"], 2, "SUCCEEDED", 0)
    client.break_with = how
    assert submit.follow(client, "job", written.append) == 0  # type: ignore[arg-type]
    assert "".join(written) == "one\ntwo\nthree\n"


def test_a_log_that_has_gone_silent_is_asked_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Client):
        """Whose first connection goes silent after a line."""

        async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
            yield "one\n"
            if self.breaks:
                self.breaks -= 1
                await asyncio.Event().wait()
            yield "two\n"

        def get_job_info(self, job_id: str) -> Any:
            return SimpleNamespace(status="RUNNING" if not said[1:] else "SUCCEEDED", driver_exit_code=0)

        def get_job_logs(self, job_id: str) -> str:
            return "one\ntwo\n"

    monkeypatch.setattr(submit, "SILENT_LOG_S", 0.05)
    monkeypatch.setattr(submit, "_POLL_S", 0.01)
    said: list[str] = []
    assert submit.follow(Silent([], 1, "", 0), "job", said.append) == 0  # type: ignore[arg-type]
    assert said == ["one\n", "two\n"]


@pytest.mark.parametrize(
    ("code", "lost", "expected"),
    [(None, "JOB_SUPERVISOR_ACTOR_DIED", True), (None, "RUNTIME_ENV_SETUP_FAILURE", False), (3, None, False)],
)
def test_a_job_that_went_with_its_node_is_told_from_one_that_failed(
    code: int | None, lost: str | None, expected: bool
) -> None:
    client: Any = Client(["x"], 0, "FAILED", code, lost)
    assert submit.follow(client, "job", lambda _: None) == (code or 1)
    assert submit.was_lost(client, "job", "http://127.0.0.1:1") is expected


def test_a_job_of_which_ray_lost_sight_is_not_sent_again_while_its_node_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_POLL_S", 0.01)
    client: Any = Client(["x"], 0, "FAILED", None, "JOB_SUPERVISOR_ACTOR_START_FAILURE")
    client.living = ["n1", "n2"]
    assert not submit.was_lost(client, "job", "http://x", patience_s=0.05)
    assert submit.why(client, "job", "http://x") == "Ray says so"
    seen: Any = iter([[{"node_id": "n1"}], None, [{"node_id": "n1"}], []])
    monkeypatch.setattr(submit, "_living", lambda *_: next(seen))
    assert submit.was_lost(client, "job", "http://x"), "a node that has just died is waited for"
    assert next(seen, "read to the end") == "read to the end"


@pytest.mark.parametrize(("status", "expected"), [(200, {"cpu"}), (500, set())])
def test_the_pools_that_have_a_node_are_those_of_living_nodes(status: int, expected: set[str]) -> None:
    nodes = [{"state": "ALIVE", "labels": {"modelyard/pool": "cpu"}}, {"state": "ALIVE"}]
    nodes.append({"state": "DEAD", "labels": {"modelyard/pool": "l4"}})
    answer = SimpleNamespace(status_code=status, json=lambda: {"data": {"result": {"result": nodes}}})
    client: Any = SimpleNamespace(_do_request=lambda method, path: answer)
    assert submit.pools_with_nodes(client, "http://x") == expected


def test_a_script_can_be_sent_to_a_pool(repository: Path) -> None:
    sent: dict[str, Any] = {}
    client: Any = SimpleNamespace(submit_job=lambda **given: sent.update(given) or "raysubmit_1")
    for pool, selector in (("cpu", {"modelyard/pool": "cpu"}), (None, None)):
        submit.start(client, submit.prepare(repository / "jobs" / "train.py", [], pool=pool), "http://x")
        assert sent["entrypoint_label_selector"] == selector


def test_a_cluster_that_stays_silent_is_given_up_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_POLL_S", 0.01)
    client = Client(["one\n", "two\n"], 10_000, "RUNNING", None)
    with pytest.raises(UnavailableError, match="nothing was heard of job job"):
        submit.follow(client, "job", lambda _: None, patience_s=0.1)  # type: ignore[arg-type]


def test_refusals_of_the_dashboard_are_told_apart() -> None:
    from ray.exceptions import AuthenticationError

    with pytest.raises(UnavailableError, match="no cluster answers"), submit.translated("http://x"):
        raise ConnectionError
    with pytest.raises(AccessError, match="no token, or a wrong one"), submit.translated("http://x"):
        raise AuthenticationError("no")
    with pytest.raises(UnavailableError, match="boom"), submit.translated("http://x"):
        raise RuntimeError("Request failed with status code 500: boom")
    with (
        pytest.raises(UnavailableError, match=r"already exists\n  -> choose another --id"),
        submit.translated("http://x"),
    ):
        raise RuntimeError(
            "status code 500: Traceback\n  File x\nValueError: Job with submission_id a already exists\n"
        )


def test_a_cluster_that_has_only_just_started_is_asked_again(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_POLL_S", 0.0)
    answers = iter([RuntimeError("status code 500: No available agent to submit job"), "raysubmit_1"])

    def submit_job(**_: Any) -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    job = submit.prepare(repository / "jobs" / "train.py", [])
    assert submit.start(SimpleNamespace(submit_job=submit_job), job, "http://x") == "raysubmit_1"  # type: ignore[arg-type]
