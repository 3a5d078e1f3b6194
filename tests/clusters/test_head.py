"""A head that dies on a cluster of hosts: what is there again without a hand, and what must be sent again."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.clusters import conftest
from tests.clusters.conftest import NODES, POOL, Launched, must

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(480)]

SETUP = """
import ray
from ray import serve
ray.init(address="auto", namespace="test", log_to_driver=False, logging_level="ERROR")
POOL = {"modelyard/pool": "train"}

@ray.remote(num_cpus=0, label_selector=POOL, max_restarts=-1, lifetime="detached", name="counter")
class Counter:
    def __init__(self):
        self.count = 0
    def add(self):
        self.count += 1
        return self.count

@serve.deployment(ray_actor_options={"num_cpus": 0, "label_selector": POOL})
class Hello:
    def __call__(self, request):
        return "hello"

counter = Counter.remote()
ray.get([counter.add.remote() for _ in range(3)])
serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": 8000})
serve.run(Hello.bind(), name="hello", route_prefix="/hello")
print("READY")
"""
LOOK = """
import json, urllib.request, ray
ray.init(address="auto", namespace="test", log_to_driver=False, logging_level="ERROR")
count = ray.get(ray.get_actor("counter").add.remote(), timeout=30)
said = urllib.request.urlopen("http://127.0.0.1:8000/hello", timeout=30).read().decode()
alive = sum(node["Alive"] for node in ray.nodes())
print("LOOK" + json.dumps([count, said, alive]))
"""
JOB = """
import os, sys, time, ray
ray.init(log_to_driver=False)
pool = ray.get_runtime_context().get_node_labels()["modelyard/pool"]
print("runs in", pool, flush=True)
marks = [name for name in os.listdir(sys.argv[1]) if name.startswith("begun-")]
open(os.path.join(sys.argv[1], f"begun-{len(marks)}"), "w").close()
while not os.path.exists(os.path.join(sys.argv[1], "go")):
    time.sleep(0.2)

@ray.remote(num_cpus=0, resources={"rack": 0.1})
def where():
    return "work is done"

print(ray.get(where.remote()), flush=True)
"""


until = partial(conftest.until, timeout_s=120.0)


@dataclass(frozen=True)
class Aftermath:
    """What was there again after the head had been killed once."""

    seen: list[Any]
    tenants: str
    codes: dict[str, int]
    """Exit codes of the jobs, by where their script runs."""
    logs: dict[str, str]
    begun: dict[str, int]
    """How often each script was started."""
    left: list[str]
    """Scripts that still run on the head."""


def look(cluster: Launched) -> list[Any] | None:
    """The detached actor's count, Serve's answer, and how many nodes are alive; None while the head is away."""
    text = cluster.on_head("timeout", "90", "python", "-c", LOOK).stdout.partition("LOOK")[2]
    return json.loads(text) if text else None


def kill_head(cluster: Launched) -> None:
    """Kill the head's GCS, and wait until its keeper has noticed."""
    head = cluster.hosts[0]
    (before,) = head.run("pgrep", "-f", "gcs/gcs_server").stdout.split()
    head.kill("gcs/gcs_server")
    until("a new GCS runs", lambda: head.run("pgrep", "-f", "gcs/gcs_server").stdout.split() not in ([], [before]))


@contextlib.contextmanager
def submitted(cluster: Launched, folder: Path, pool: str | None) -> Iterator[subprocess.Popen[str]]:
    """A job that has begun, and waits for the file `go`; it is sent again when its node is lost."""
    marks = folder / f"marks-{pool}"
    marks.mkdir()
    script = folder / "sent" / "job.py"
    words = ["submit", "--cluster", str(cluster.file), "--working-dir", str(script.parent), "--restarts", "2"]
    words += ["--driver-pool", pool] if pool else []
    command = [str(Path(sys.executable).with_name("modelyard")), *words, str(script), str(marks)]
    log = folder / f"{pool}.log"
    with log.open("w") as stream:
        job = subprocess.Popen(command, env=cluster.environment, stdout=stream, stderr=stream, text=True)
    try:
        yield job
    finally:
        job.kill()
        job.wait(20)


@pytest.fixture(scope="module")
def aftermath(launched: Launched, tmp_path_factory: pytest.TempPathFactory) -> Aftermath:
    """An actor, Serve, the scheduler and two jobs on a cluster whose head is killed."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "sent").mkdir()
    (folder / "sent" / "job.py").write_text(JOB)
    with contextlib.ExitStack() as stack:
        jobs = {pool: stack.enter_context(submitted(launched, folder, pool)) for pool in (POOL, None)}
        assert "READY" in must(launched.on_head("python", "-c", SETUP)).stdout
        until("all nodes, an actor and Serve answer", lambda: (found := look(launched)) and found[2] == NODES)
        must(launched.on_head("modelyard", "scheduler", "start", "--policy", "priority"))
        must(launched.on_head("modelyard", "quota", "set", "vision", "--guaranteed", f"{POOL}=1"))
        until("both scripts run", lambda: all((folder / f"marks-{pool}" / "begun-0").exists() for pool in jobs))
        kill_head(launched)
        seen = until(
            "all of it is back", lambda: (found := look(launched)) and found[2] == NODES and found, timeout_s=240
        )
        tenants = until("the scheduler answers", lambda: launched.on_head("modelyard", "quota", "show").stdout)
        for pool in jobs:
            (folder / f"marks-{pool}" / "go").touch()
        codes = {str(pool): job.wait(180) for pool, job in jobs.items()}
        left = [line for line in launched.hosts[0].processes() if "marks-" in line]
    return Aftermath(
        left=left,
        seen=seen,
        tenants=tenants,
        codes=codes,
        logs={str(pool): (folder / f"{pool}.log").read_text() for pool in jobs},
        begun={str(pool): len(list((folder / f"marks-{pool}").glob("begun-*"))) for pool in jobs},
    )


def test_actors_serve_and_the_scheduler_come_back_with_a_killed_head(aftermath: Aftermath) -> None:
    count, said, _ = aftermath.seen
    assert count >= 5, "the actor on another host went on, and kept what it knew"
    assert said == "hello"
    assert "vision" in aftermath.tenants


@pytest.mark.parametrize("pool", [POOL, "None"])
def test_a_script_outlives_the_head_in_a_pool_and_is_sent_again_otherwise(aftermath: Aftermath, pool: str) -> None:
    log = aftermath.logs[pool]
    assert aftermath.codes[pool] == 0, log
    assert "work is done" in log
    assert aftermath.begun[pool] == (1 if pool == POOL else 2)
    assert ("it is sent again" in log) == (pool == "None")


def test_no_script_outlives_the_head_that_it_ran_on(aftermath: Aftermath) -> None:
    assert aftermath.left == []


LISTENING = """
import json, psutil
ports = {}
for process in psutil.process_iter():
    for each in process.net_connections("tcp"):
        if each.status == psutil.CONN_LISTEN and each.laddr.ip not in ("127.0.0.1", "::1"):
            ports[each.laddr.port] = process.name()
print(json.dumps(ports))
"""
KNOCK = """
import json, socket, sys, urllib.error, urllib.request
from concurrent.futures import ThreadPoolExecutor
address, ports = sys.argv[1], json.loads(sys.argv[2])

def knock(port):
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return "closed"
    try:
        with urllib.request.urlopen(f"http://{address}:{port}/", timeout=4) as answer:
            return "metrics" if b"# HELP" in answer.read(100_000) else f"answers {answer.status}"
    except urllib.error.HTTPError as error:
        return f"refuses {error.code}"
    except Exception:
        return "refuses"

with ThreadPoolExecutor(16) as pool:
    print(json.dumps(dict(zip(ports, pool.map(knock, ports)))))
"""


def knocked(cluster: Launched, door: int, visitor: int | None) -> dict[str, str]:
    """What each open port of one host says to a visitor without token or certificate; None: the stranger."""
    host = cluster.hosts[door]
    ports = json.loads(must(host.run("python", "-c", LISTENING)).stdout)
    assert len(ports) > 5, ports
    outside = cluster.stranger if visitor is None else cluster.hosts[visitor]
    assert outside is not None
    asked = json.dumps([int(port) for port in ports])
    said = must(outside.run("python", "-c", KNOCK, host.address, asked, timeout_s=120)).stdout
    return {f"{port} {ports[port]}": word for port, word in json.loads(said).items()}


@pytest.mark.parametrize("door", [0, 1])
def test_a_stranger_reaches_ssh_and_nothing_else(launched: Launched, door: int) -> None:
    reached = {port: word for port, word in knocked(launched, door, None).items() if word != "closed"}
    assert reached == {"22 sshd": "refuses"}


@pytest.mark.parametrize("door", [0, 1])
def test_another_host_of_the_cluster_reads_metrics_without_a_token_and_nothing_else(
    launched: Launched, door: int
) -> None:
    said = knocked(launched, door, 2)
    useful = {port: word for port, word in said.items() if not word.startswith(("refuses", "closed", "metrics"))}
    assert useful == {}
    assert "refuses" in said.values()
