"""A head that is started again whenever it dies, and where its state is in the meantime."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from tests.clusters import conftest

from modelyard.cli.main import modelyard
from modelyard.clusters import certs, keeper
from modelyard.clusters.keeper import Look, judge, pause_s
from modelyard.errors import ConfigError

MODELYARD = str(Path(sys.executable).with_name("modelyard"))


@pytest.mark.parametrize(
    ("look", "step"),
    [
        (Look(None, True, True, 900), "wait"),
        (Look(1, False, False, 0), "restart"),
        (Look(-9, True, True, 900), "restart"),
        (Look(None, False, True, 1), "wait"),
        (Look(None, False, True, 6), "restart"),
        (Look(None, True, False, 20), "wait"),
        (Look(None, True, False, 31), "restart"),
        (Look(None, False, False, 20), "wait"),
        (Look(None, False, False, 31), "end"),
    ],
)
def test_what_died_is_started_again_and_what_was_stopped_is_not(look: Look, step: str) -> None:
    assert judge(look) == step


def test_a_head_that_dies_at_once_is_given_more_time_each_time() -> None:
    assert [pause_s(5, failures) for failures in range(7)] == [0, 1, 2, 4, 8, 16, 30]
    assert pause_s(3600, 7) == 0


def test_state_is_on_the_disk_unless_a_redis_is_named(tmp_path: Path) -> None:
    found, options = keeper.environment(tmp_path, tmp_path / "state", {"HOME": "/h"})
    assert found == {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(tmp_path / "state"), "HOME": "/h"}
    assert options == []
    certs.create(tmp_path)
    certs.issue(tmp_path)
    certs.set_redis(tmp_path, "mine", "rediss://10.0.0.9:6380", "it's a secret")
    found, options = keeper.environment(tmp_path, tmp_path / "state", {})
    assert found["RAY_REDIS_ADDRESS"] == "rediss://10.0.0.9:6380"
    assert found["RAY_external_storage_namespace"] == "mine"
    assert found["RAY_REDIS_CA_CERT"] == str(tmp_path / "ca.crt")
    assert found["RAY_REDIS_CLIENT_KEY"] == str(tmp_path / "node.key")
    assert "RAY_gcs_storage" not in found
    assert options == ["--redis-password=it's a secret"]
    assert (tmp_path / certs.HEAD_ENV).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("10.0.0.9", "is no address"),
        ("http://10.0.0.9:6380", "is no address"),
        ("redis://10.0.0.9:6379", "would travel in plain text"),
        ("rediss://10.0.0.9:0", "there is no such port"),
        ("rediss://10.0.0.9:65536", "there is no such port"),
        ("rediss://10.0.0.9:" + "9" * 5000, "there is no such port"),
        ("rediss://10.0.0.9:\u0663", "is no address"),
    ],
)
def test_a_redis_that_cannot_be_used_is_refused_before_anything_is_made(
    address: str, problem: str, tmp_path: Path
) -> None:
    words = ["certs", "create", "--folder", str(tmp_path / "folder"), "--redis", address]
    answer = CliRunner().invoke(modelyard, words)
    assert isinstance(answer.exception, ConfigError)
    assert problem in str(answer.exception)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("address", ["rediss://me:hush@10.0.0.9:6380", "me:hush@10.0.0.9", "http://:hush@10.0.0.9:1"])
@pytest.mark.parametrize("command", [["create", "--redis"], ["redis"]])
def test_a_password_in_the_address_of_a_redis_is_refused_and_not_shown(
    address: str, command: list[str], tmp_path: Path
) -> None:
    if command == ["redis"]:
        certs.create(tmp_path)
    answer = CliRunner().invoke(modelyard, ["certs", *command, address, "--folder", str(tmp_path)])
    assert isinstance(answer.exception, ConfigError)
    assert "--redis-password-file" in str(answer.exception)
    assert "hush" not in f"{answer.exception} {answer.output}"
    assert not (tmp_path / certs.HEAD_ENV).exists()


@pytest.mark.parametrize(
    ("option", "content", "problem"),
    [
        ("--redis-password-file", b"\n", "is empty"),
        ("--redis-password-file", b"\xff\xfe", "is no text"),
        ("--redis-ca", b"", "is no certificate"),
        ("--redis-ca", b"junk", "is no certificate"),
    ],
)
@pytest.mark.parametrize("command", [["create", "--redis"], ["redis"]])
def test_a_file_that_holds_nothing_for_a_redis_is_refused(
    option: str, content: bytes, problem: str, command: list[str], tmp_path: Path
) -> None:
    (tmp_path / "given").write_bytes(content)
    folder = tmp_path / "folder"
    if command == ["redis"]:
        certs.create(folder)
    words = [*command, "rediss://10.0.0.9:6380", option, str(tmp_path / "given"), "--folder", str(folder)]
    answer = CliRunner().invoke(modelyard, ["certs", *words])
    assert isinstance(answer.exception, ConfigError)
    assert problem in str(answer.exception)
    assert not (folder / certs.HEAD_ENV).exists()
    assert folder.exists() == (command == ["redis"])


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--", "ray", "start", "--address=10.0.0.1:6379"], "starts no head"),
        (["--forget"], "--forget goes with --stop"),
        (["--stop", "ray", "start"], "--stop takes no command"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], problem: str) -> None:
    answer = CliRunner().invoke(modelyard, ["cluster", "keep-head", *words])
    assert isinstance(answer.exception, ConfigError)
    assert problem in str(answer.exception)


def test_a_second_cluster_on_one_port_is_refused_and_the_first_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        words = ["cluster", "keep-head", "--", "ray", "start", "--head", f"--port={port}"]
        answer = CliRunner().invoke(modelyard, words)
    assert isinstance(answer.exception, ConfigError)
    assert f"port {port} is taken by process {os.getpid()}" in str(answer.exception)
    assert "give another --port" in str(answer.exception)


def test_there_is_nothing_to_stop() -> None:
    answer = CliRunner().invoke(modelyard, ["cluster", "keep-head", "--stop"])
    assert (answer.exit_code, answer.output) == (0, "no head is kept here\n")


ACTOR = """
import sys, ray
ray.init(address=sys.argv[1], namespace="test", log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=0, max_restarts=-1, lifetime="detached", name="keeper-test")
class Kept:
    def where(self):
        import os
        return os.getpid()

actor = Kept.remote() if "make" in sys.argv else ray.get_actor("keeper-test")
print("PID", ray.get(actor.where.remote(), timeout=60))
"""


@dataclass(frozen=True)
class Head:
    """A head on this machine, with a home and ports of its own."""

    folder: Path
    ports: list[int]

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MODELYARD_"))}
        mine = {"HOME": str(self.folder), "MODELYARD_HOME": str(self.folder / "home"), "RAY_AUTH_MODE": "disabled"}
        return {**kept, **mine, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def keep_head(self, *words: str) -> str:
        command = [MODELYARD, "cluster", "keep-head", *words]
        answer = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=240, check=False, cwd=self.folder
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    def start(self) -> None:
        head, client, agent = self.ports
        flags = [f"--port={head}", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
        flags += ["--num-cpus=1", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
        self.keep_head("--", "ray", "start", "--head", *flags, f"--temp-dir={self.folder / 't'}")

    def actor(self, *words: str) -> str | None:
        """The process of the detached actor; None while nobody answers."""
        command = [sys.executable, "-c", ACTOR, f"127.0.0.1:{self.ports[0]}", *words]
        answer = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=240, check=False)
        return answer.stdout.split()[-1] if "PID" in answer.stdout else None

    def process(self, name: str) -> psutil.Process | None:
        """A main process of the head."""
        stored = json.loads((self.folder / "home" / "head" / "keeper.json").read_text())
        try:
            family = psutil.Process(stored["pid"]).children(recursive=True)
            return next((each for each in family if each.name() == name), None)
        except psutil.Error:
            return None


until = partial(conftest.until, timeout_s=150.0)


@pytest.fixture
def head(free_ports: Callable[[int], list[int]]) -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="my-k-"))  # short, for Ray's sockets
    made = Head(folder, free_ports(3))
    try:
        yield made
    finally:
        made.keep_head("--stop")
        shutil.rmtree(folder, ignore_errors=True)


heavy = [pytest.mark.ray, pytest.mark.slow]


class TestKept:
    """Real heads."""

    pytestmark = heavy

    @pytest.mark.parametrize("number", [9, 15])
    def test_a_killed_gcs_is_followed_by_a_new_head_with_the_actors_of_the_old(self, head: Head, number: int) -> None:
        head.start()
        before = head.actor("make")
        old = head.process("gcs_server")
        assert old is not None
        old.send_signal(number)
        after = until("the actor answers again", head.actor)
        assert after != before
        new = head.process("gcs_server")
        assert new is not None
        assert new.pid != old.pid

    def test_a_stop_leaves_nothing_and_forgets_when_told(self, head: Head) -> None:
        head.start()
        head.actor("make")
        family = [process for name in ("gcs_server", "raylet") if (process := head.process(name))]
        assert head.keep_head("--stop") == "stopped\n"
        assert not any(process.is_running() for process in family)
        head.start()
        assert head.actor() is not None, "the state was kept"
        head.keep_head("--stop", "--forget")
        head.start()
        assert head.actor() is None

    def test_with_redis_the_state_outlives_the_machine(
        self, head: Head, redis_server: Callable[[Path, int], None], free_ports: Callable[[int], list[int]]
    ) -> None:
        folder, (port,) = head.folder / "home" / "cluster", free_ports(1)
        certs.create(folder)
        certs.issue(folder)
        certs.set_redis(folder, "test", f"rediss://127.0.0.1:{port}", "secret")
        redis_server(folder, port)
        head.start()
        assert head.actor("make") is not None
        head.keep_head("--stop")
        shutil.rmtree(head.folder / "home" / "head")
        shutil.rmtree(head.folder / "t")
        head.start()
        assert head.actor() is not None
        head.keep_head("--stop", "--forget")
        head.start()
        assert head.actor() is None


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[Callable[[Path, int], None]]:
    """Starts a Redis that speaks TLS with a node's certificate, and asks for one and for the password `secret`."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("needs redis-server (apt install redis-server)")
    started: list[subprocess.Popen[bytes]] = []

    def start(folder: Path, port: int) -> None:
        words = [program, "--port", "0", "--tls-port", str(port), "--bind", "127.0.0.1", "--requirepass", "secret"]
        words += ["--tls-cert-file", str(folder / "node.crt"), "--tls-key-file", str(folder / "node.key")]
        words += ["--tls-ca-cert-file", str(folder / "ca.crt"), "--save", "", "--dir", str(tmp_path)]
        with (tmp_path / "redis.log").open("wb") as log:
            started.append(subprocess.Popen(words, stdout=log, stderr=log))

    yield start
    for process in started:
        process.kill()
        process.wait(10)
