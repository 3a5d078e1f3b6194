"""The laptop's cluster: what is planned, and a real one that outlives its command and leaves nothing."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tests.serving.models import register, tiny_llama

from modelyard.cluster import FakeCluster, Node
from modelyard.clusters import drain, laptop
from modelyard.errors import ConfigError, NotFoundError

ROOT = Path(__file__).parents[2]
MODELYARD = str(Path(sys.executable).with_name("modelyard"))


def test_pools_and_sites_become_labelled_nodes() -> None:
    nodes = laptop.plan(["a100=2x4", "cpu=1:3"], ["north"])
    assert [node.name for node in nodes] == ["head", "a100-0", "a100-1", "cpu-0", "edge-north"]
    assert [(node.gpus, node.cpus) for node in nodes[1:4]] == [(4, max(4, os.cpu_count() or 1))] * 2 + [(0, 3)]
    assert nodes[0].cpus == 0
    assert nodes[1].labels["ray.io/accelerator-type"] == "A100"
    assert {"modelyard/tier": "edge", "modelyard/site": "north"}.items() <= nodes[4].labels.items()


def test_without_pools_the_head_takes_the_work() -> None:
    (head,) = laptop.plan([], [])
    assert head.labels["modelyard/pool"] == "cpu"
    assert head.cpus == os.cpu_count()


@pytest.mark.parametrize(
    ("pools", "sites", "problem"),
    [
        (["a100"], [], "cannot be read"),
        (["a100=two"], [], "cannot be read"),
        (["a=1", "a=2"], [], "there twice"),
        ([], ["north", "north"], "there twice"),
        (["a=99"], [], "100 nodes on one machine"),
        (["a=0x1"], [], "a node at least"),
        (["a=1x1:1000000000000"], [], "at most 4096 CPUs"),
        ([], ["a/b"], "'a/b' is no name"),
        ([], [""], "'' is no name"),
    ],
)
def test_what_cannot_be_planned_is_refused(pools: list[str], sites: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        laptop.plan(pools, sites)


def test_the_node_to_drain_is_found_by_id_name_or_address() -> None:
    nodes = FakeCluster(
        [
            Node("aaaaaa11", {"node:__internal_head__": 1}, {}),
            Node("bbbbbb22", {}, {}, {"modelyard/node": "l4-0"}),
            Node("bbbbbb33", {}, {}, {"modelyard/node": "l4-1"}),
            Node("cccccc44", {}, {}, alive=False),
        ]
    ).nodes()
    assert drain.find(nodes, "l4-1", {}).node_id == "bbbbbb33"
    assert drain.find(nodes, "bbbbbb2", {}).node_id == "bbbbbb22"
    assert drain.find(nodes, "10.0.0.2", {"bbbbbb22": "10.0.0.2"}).node_id == "bbbbbb22"
    with pytest.raises(ConfigError, match="names 2 nodes"):
        drain.find(nodes, "bbbbbb", {})
    with pytest.raises(ConfigError, match="is the head"):
        drain.find(nodes, "aaaaaa11", {})
    with pytest.raises(NotFoundError, match="no node 'cccccc44' is alive"):
        drain.find(nodes, "cccccc44", {})


@pytest.mark.parametrize("text", ["{", "[]", '{"address": 5, "nodes": []}'])
def test_a_damaged_note_of_the_cluster_is_named_and_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("MODELYARD_HOME", str(tmp_path))
    (tmp_path / "laptop.json").write_text(text)
    with pytest.raises(ConfigError, match=r"laptop.json is damaged"):
        laptop.up(laptop.plan([], []), tmp_path)
    assert (tmp_path / "laptop.json").read_text() == text


def test_two_starts_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELYARD_HOME", str(tmp_path))
    with (tmp_path / "laptop.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        said: list[str] = []
        with pytest.raises(ConfigError, match="is being started here already"):
            laptop.up(laptop.plan([], []), tmp_path, say=said.append)
        assert said == []


class Laptop:
    """The command line with a home of its own."""

    def __init__(self, folder: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MODELYARD_"))}
        self.folder = folder
        self.environment = {**kept, "HOME": str(folder), "MODELYARD_HOME": str(folder / "home")}

    def run(self, *words: str, code: int = 0) -> str:
        command = [MODELYARD, *words]
        answer = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=240, check=False, cwd=self.folder
        )
        assert answer.returncode == code, f"{words}\n{answer.stdout}\n{answer.stderr}"
        return answer.stdout + answer.stderr

    def pools(self) -> str:
        """What `modelyard pools --json` prints, without what Ray logs before it."""
        return "[\n" + self.run("pools", "--json").partition("[\n")[2].rpartition("]")[0] + "]"

    def processes(self) -> list[psutil.Process]:
        stored = json.loads((self.folder / "home" / "laptop.json").read_text())
        marked = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(laptop.ENV_ID) == stored["cluster_id"]:
                    marked.append(process)
            except (psutil.Error, OSError):
                continue
        return marked


def until(claim: str, condition: Callable[[], Any], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"never happened within {timeout_s:g} s: {claim}"
        time.sleep(0.1)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    """`modelyard up` with two pools and a site."""
    here = Laptop(tmp_path_factory.mktemp("laptop"))
    short = tmp_path_factory.mktemp("r")
    pools = ["--pool", "a100=2x4:2", "--pool", "serve=2x0:1", "--site", "north"]
    here.run("up", *pools, "--temp-dir", str(short), "--start-timeout-s", "200")
    yield here
    if (here.folder / "home" / "laptop.json").exists():
        here.run("down")


def serve(running: Laptop, port: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Serve a small model, two replicas of it and of the gateway, in the pool `serve`; returns a key."""
    for name in ("MODELYARD_STORE", "MODELYARD_TRACKING_URI"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("MODELYARD_HOME", str(running.folder / "home"))
    register(tiny_llama(running.folder / "model", seed=0), "gpt")
    model = {"reference": "models:/gpt/1", "engine": "transformers", "cache_mib": 32, "max_sequences": 4}
    config = {
        "port": port,
        "gateway": {"replicas": 2, "cpus": 0.1, "label_selector": {"modelyard/pool": "serve"}},
        "models": [{"model": model, "placement": {"pool": "serve", "cpus": 0.3}, "min_replicas": 2, "max_replicas": 2}],
    }
    (running.folder / "serving.yaml").write_text(yaml.safe_dump(config))
    said = running.run("serve", "up", "serving.yaml", "--detach")
    return next(line.split()[1] for line in said.splitlines() if line.startswith("key "))


class Callers:
    """Two threads that ask all the time; a call is made once, and counts."""

    def __init__(self, port: int, key: str) -> None:
        self._url, self._key = f"http://127.0.0.1:{port}/v1/completions", key
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._loop) for _ in range(2)]
        self.answers = 0
        self.failures: list[str] = []

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(90)

    def _loop(self) -> None:
        body = json.dumps({"model": "gpt", "prompt": "The quick", "max_tokens": 8}).encode()
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        while not self._over.wait(0.1):
            try:
                with urllib.request.urlopen(urllib.request.Request(self._url, body, headers), timeout=60) as answer:
                    json.load(answer)
                self.answers += 1
            except (OSError, ValueError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")


ray_slow = [pytest.mark.ray, pytest.mark.slow]
JOB = """
import sys, ray
ray.init(log_to_driver=False)

@ray.remote(num_cpus=1, label_selector={"modelyard/site": "north"})
def where():
    return ray.get_runtime_context().get_node_labels()["modelyard/node"]

print("runs on", ray.get(where.remote()))
sys.exit(7)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_up_that_is_told_to_end_leaves_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    here, short = Laptop(tmp_path_factory.mktemp("ended")), tmp_path_factory.mktemp("e")
    words = [MODELYARD, "up", "--pool", "cpu=1", "--temp-dir", str(short)]
    with subprocess.Popen(words, env=here.environment, stderr=subprocess.PIPE, text=True) as starting:
        until("the first node starts", lambda: (here.folder / "home" / "laptop.json").exists() and here.processes(), 60)
        begun = here.processes()
        starting.terminate()
        said = starting.communicate(timeout=120)[1]
    assert (starting.returncode, "interrupted" in said) == (130, True), said
    assert [process for process in begun if _runs(process)] == []
    assert not (here.folder / "home" / "laptop.json").exists()


class TestRunning:
    """One real cluster for all of these; the last one stops it."""

    pytestmark = ray_slow

    def test_it_outlives_its_command_and_other_commands_find_it(self, running: Laptop) -> None:
        status: dict[str, Any] = json.loads(running.run("status", "--json"))
        assert {row["node"]: row["alive"] for row in status["nodes"]} == dict.fromkeys(
            ("head", "a100-0", "a100-1", "serve-0", "serve-1", "edge-north"), True
        )
        assert {each["pool"]: each["total"] for each in json.loads(running.pools())} == {
            "a100": 8,
            "edge": os.cpu_count(),
            "head": 0,
            "serve": 2,
        }

    def test_a_job_gets_its_node_and_its_exit_code_comes_back(self, running: Laptop) -> None:
        (running.folder / "job.py").write_text(JOB)
        output = running.run("submit", "job.py", "--working-dir", ".", code=7)
        assert "runs on edge-north" in output

    def test_a_script_on_another_node_is_heard_too(self, running: Laptop) -> None:
        (running.folder / "job.py").write_text(JOB)
        output = running.run("submit", "job.py", "--working-dir", ".", "--driver-pool", "serve", code=7)
        assert "runs on edge-north" in output

    def test_without_the_token_nobody_gets_in(self, running: Laptop) -> None:
        url = json.loads(running.run("status", "--json"))["dashboard"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{url}/api/jobs/", timeout=10)
        assert "asks for a token" in running.run("doctor", "--cluster")

    def test_a_second_one_is_refused(self, running: Laptop) -> None:
        said = running.run("up", code=2)
        assert "a cluster runs here already" in said
        assert "starting" not in said

    def test_a_drain_moves_a_served_model_without_a_failed_call(
        self, running: Laptop, free_ports: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (port,) = free_ports(1)
        key = serve(running, port, monkeypatch)
        with Callers(port, key) as callers:
            until("calls are answered", lambda: callers.answers > 20, 60)
            assert "serve-0 is empty" in running.run("drain", "serve-0", "--deadline-s", "120")
            enough = callers.answers + 40
            until("calls are answered after it", lambda: callers.answers > enough, 60)
        assert callers.failures == []
        assert {each["pool"]: each["total"] for each in json.loads(running.pools())}["serve"] == 1
        running.run("serve", "down", "gpt")

    def test_a_drain_moves_a_training_run_and_leaves_the_node_empty(self, running: Laptop, token_folder: Path) -> None:
        model = {"architecture": "llama", "layers": 1, "hidden_size": 32, "heads": 2, "max_positions": 16}
        config = {
            "name": "counter",
            "dataset": str(token_folder),
            "task": {"kind": "causal_lm", "model": model},
            "workers": {"min": 1, "max": 2, "cpus": 2, "pool": "a100"},
            "training": {"max_steps": 400, "global_batch_size": 8, "micro_batch_size": 4, "zero_stage": 2},
            "schedule": {"warmup_steps": 2},
        }
        (running.folder / "job.yaml").write_text(yaml.safe_dump(config))
        words = ["submit", str(ROOT / "jobs" / "train.py"), "--config", str(running.folder / "job.yaml")]
        log = running.folder / "job.log"
        with log.open("w") as stream:
            job = subprocess.Popen([MODELYARD, *words], env=running.environment, stdout=stream, stderr=stream)
        until("it trains", lambda: "step 1/400" in log.read_text(), 240)
        assert "training starts with 2 workers" in log.read_text()
        assert "a100-0 is empty" in running.run("drain", "a100-0", "--deadline-s", "90")
        assert job.wait(300) == 0, log.read_text()
        assert "400 steps (all steps done)" in log.read_text()
        assert {each["pool"]: each["total"] for each in json.loads(running.pools())}["a100"] == 4

    def test_down_ends_exactly_its_own_processes(self, running: Laptop) -> None:
        mine = running.processes()
        neighbour = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # raylet gcs_server"])
        assert len(mine) > 5
        running.run("down")
        try:
            assert [process for process in mine if _runs(process)] == []
            assert neighbour.poll() is None
        finally:
            neighbour.kill()
        assert "no laptop cluster runs here" in running.run("status", code=2)
