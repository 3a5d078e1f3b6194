"""A cluster that `modelyard up FILE` starts by ssh on hosts of this machine."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.clusters.hosts import Host, Hosts, hosts, why_not

ROOT = Path(__file__).parents[2]
POOL, NODES = "train", 4


@dataclass(frozen=True)
class Launched:
    """The running cluster, and how to talk to it from outside."""

    hosts: Hosts
    file: Path
    folder: Path
    environment: dict[str, str] = field(repr=False)
    stranger: Host | None = None
    """A host on the same network that is not of the cluster."""

    @property
    def variables(self) -> dict[str, str]:
        """Where its artifacts, runs and keys are, in a folder that all hosts share."""
        return {
            "MODELYARD_STORE": str(self.folder / "store"),
            "MODELYARD_TRACKING_URI": f"sqlite:///{self.folder / 'mlflow.db'}",
            "MODELYARD_GATEWAY_DB": f"sqlite:///{self.folder / 'gateway.db'}",
        }

    def modelyard(self, *words: str, timeout_s: float = 180, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run the command line outside of the cluster."""
        command = [str(Path(sys.executable).with_name("modelyard")), *words]
        return subprocess.run(
            command, env={**self.environment, **changes}, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def on_head(self, *command: str, timeout_s: float = 200) -> subprocess.CompletedProcess[str]:
        """Run a command on the head, as its user does."""
        line = '. ~/.modelyard/cluster/node.env; exec "$@"'
        return self.hosts[0].run("bash", "-c", line, "-", *command, timeout_s=timeout_s)

    @property
    def node_environment(self) -> dict[str, str]:
        """What Ray needs on a host, without its certificate's key."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.hosts[0].home / ".modelyard/cluster/token")}


def cluster_file(made: Hosts, folder: Path) -> Path:
    """`clusters/local.yaml` with the addresses, key and folders of these hosts; programs are shared already."""
    data: dict[str, Any] = yaml.safe_load((ROOT / "clusters" / "local.yaml").read_text())
    head, *workers = made.members
    where = {"site": "here", "tier": "cloud", "zone": "rack-1"}
    data["provider"] |= {"head_ip": head.address, "worker_ips": [worker.address for worker in workers]}
    data["auth"] = {"ssh_user": "root", "ssh_private_key": str(made.key)}
    data["metadata"]["hosts"] = {
        head.address: {"pool": "head", **where, "cpus": 0},
        **{worker.address: {"pool": POOL, **where, "cpus": 1, "resources": {"rack": 1}} for worker in workers},
    }
    path = folder / "cluster.yaml"
    data["file_mounts"] = {
        "~/.modelyard/cluster": str(folder / "home" / "cluster"),
        "~/.modelyard/cluster.yaml": str(path),
    }
    data["setup_commands"] = ["chmod 700 ~/.modelyard ~/.modelyard/cluster", "modelyard certs node"]
    data["setup_commands"].append("modelyard cluster firewall ~/.modelyard/cluster.yaml --apply")
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    """A head, two hosts that train, one at the site `north`: the cluster is up on them; a fifth host is a stranger."""
    if reason := why_not():
        pytest.skip(f"hosts of network namespaces: {reason}")
    folder = tmp_path_factory.mktemp("hosts")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MODELYARD_"))}
    home = folder / "home"
    environment = {**kept, "HOME": str(folder), "MODELYARD_HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    environment["RAY_TMPDIR"] = str(folder)
    with hosts(NODES + 1, folder) as everyone:
        made = Hosts(everyone.members[:NODES], everyone.key, everyone.bridge)
        cluster = Launched(made, cluster_file(made, folder), folder, environment, everyone[NODES])
        edge = {"pool": "edge", "site": "north", "tier": "edge", "resources": {}}
        data = yaml.safe_load(cluster.file.read_text())
        data["metadata"]["hosts"][made[3].address] |= edge
        cluster.file.write_text(yaml.safe_dump(data))
        store, uri, keys = cluster.variables.items()
        words = ["--store", store[1], "--tracking-uri", uri[1], "--env", "=".join(keys)]
        must(cluster.modelyard("certs", "create", *words))
        must(cluster.modelyard("up", str(cluster.file), timeout_s=300))
        until("every host has joined", lambda: joined(cluster) == NODES, 240)
        yield cluster


def joined(cluster: Launched) -> int:
    """How many nodes are alive, as the head's dashboard says."""
    code = (
        "import json, os, urllib.request as u; token = open(os.environ['RAY_AUTH_TOKEN_PATH']).read().strip();"
        "call = u.Request('http://127.0.0.1:8265/api/v0/nodes', headers={'Authorization': 'Bearer ' + token});"
        "nodes = json.load(u.urlopen(call, timeout=10))['data']['result']['result'];"
        "print(sum(node['state'] == 'ALIVE' for node in nodes))"
    )
    answer = cluster.hosts[0].run("bash", "-c", f'. ~/.modelyard/cluster/node.env; python -S -c "{code}"')
    return int(answer.stdout or 0)


@pytest.fixture
def free_ports() -> Callable[[int], list[int]]:
    """Finds ports of the loopback interface that nobody listens on."""

    def find(count: int) -> list[int]:
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            return [int(each.getsockname()[1]) for each in sockets]

    return find


def until(claim: str, condition: Callable[[], Any], timeout_s: float = 90.0) -> Any:
    """Wait for what `condition` gives once it is true."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"never happened within {timeout_s:g} s: {claim}")
        time.sleep(0.5)
    return found


def must(answer: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """The answer of a command that has to succeed."""
    assert answer.returncode == 0, f"{answer.args}\n{answer.stdout[-6000:]}\n{answer.stderr[-3000:]}"
    return answer
