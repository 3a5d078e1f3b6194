"""A cluster on hosts with real ssh: brought up, closed to strangers, trained on, and gone afterwards."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.clusters.capture import Capture
from tests.clusters.conftest import NODES, POOL, Launched, must, until
from tests.serving.models import register, tiny_llama

from modelyard.security import KeyStore

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(480)]


def nodes(cluster: Launched) -> list[dict[str, Any]]:
    """The nodes that are alive, as the head sees them."""
    code = (
        "import json, ray; ray.init(address='auto', log_to_driver=False, logging_level='ERROR');"
        "print('NODES' + json.dumps([n for n in ray.nodes() if n['Alive']]))"
    )
    text = must(cluster.on_head("python", "-c", code)).stdout
    found: list[dict[str, Any]] = json.loads(text.partition("NODES")[2])
    return found


@pytest.fixture(scope="module", autouse=True)
def intruder(launched: Launched) -> Iterator[subprocess.Popen[bytes]]:
    """A Ray node without certificates, inside the firewall and with the token, that tries to join all the time."""
    host, head = launched.hosts[2], launched.hosts[0]
    words = ["ray", "start", f"--address={head.address}:6379", "--num-cpus=1", "--temp-dir=/tmp/ray/stranger"]
    process = host.start("timeout", "30", *words, env=launched.node_environment)
    yield process
    process.kill()
    process.wait(20)


def test_up_brings_every_host_up_with_its_labels(launched: Launched) -> None:
    found = until("every node has joined", lambda: len(each := nodes(launched)) == NODES and each)
    pools = {node["NodeManagerAddress"]: node["Labels"]["modelyard/pool"] for node in found}
    head, first, second, edge = (host.address for host in launched.hosts.members)
    assert pools == {head: "head", first: POOL, second: POOL, edge: "edge"}
    labels = {node["NodeManagerAddress"]: node["Labels"] for node in found}
    assert {"modelyard/site": "north", "modelyard/tier": "edge"}.items() <= labels[edge].items()
    assert all(node["Labels"]["ray.io/availability-zone"] == "rack-1" for node in found)


def test_a_wrong_key_and_a_dead_host_are_named_before_anything_is_started(launched: Launched, tmp_path: Path) -> None:
    data = yaml.safe_load(launched.file.read_text())
    other = tmp_path / "other.yaml"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "wrong")], check=True)
    other.write_text(yaml.safe_dump({**data, "auth": {**data["auth"], "ssh_private_key": str(tmp_path / "wrong")}}))
    answer = launched.modelyard("up", str(other))
    assert answer.returncode == 1
    assert "refuses user 'root' with the key" in answer.stderr
    dead = launched.hosts[0].address.rpartition(".")[0] + ".200"
    hosts = {**data["metadata"]["hosts"], dead: {"pool": "cpu", "site": "here", "tier": "cloud", "zone": "rack-1"}}
    provider = {**data["provider"], "worker_ips": [*data["provider"]["worker_ips"], dead]}
    other.write_text(yaml.safe_dump({**data, "provider": provider, "metadata": {"hosts": hosts}}))
    answer = launched.modelyard("up", str(other))
    assert answer.returncode == 1
    assert f"{dead} cannot be reached by ssh" in answer.stderr


def test_a_job_submission_without_the_token_is_refused(launched: Launched, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("print('never')")
    empty = tmp_path / "empty"
    empty.write_text("not-the-token")
    words = ["submit", "--cluster", str(launched.file), "--token-file", str(empty), str(tmp_path / "job.py")]
    answer = launched.modelyard(*words, "--working-dir", str(tmp_path))
    assert answer.returncode == 1
    assert "refuses: no token, or a wrong one" in answer.stderr
    call = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8265/api/jobs/'))"
    refused = launched.hosts[0].run("python", "-c", call)
    assert "401" in refused.stderr


CARRIER = """
import sys
import ray

ray.init(address="auto", log_to_driver=False)
first, second = [node["NodeManagerAddress"] for node in ray.nodes() if "rack" in node["Resources"]]

@ray.remote(num_cpus=0.1)
def make(marker):
    return marker * 100_000

@ray.remote(num_cpus=0.1)
def count(text, marker):
    return text.count(marker)

made = make.options(resources={f"node:{first}": 0.01}).remote(sys.argv[1])
print("carried", ray.get(count.options(resources={f"node:{second}": 0.01}).remote(made, sys.argv[1])))
"""


def test_what_travels_between_hosts_cannot_be_read(launched: Launched) -> None:
    script = launched.folder / "carry.py"
    script.write_text(CARRIER)
    marker = "the-weights-of-the-model"
    token = (launched.folder / "home" / "cluster" / "token").read_text()
    with Capture(launched.hosts[1].interface, [marker.encode(), token.encode()]) as capture:
        answer = must(launched.on_head("python", str(script), marker))
    assert "carried 100000" in answer.stdout
    assert capture.bytes_seen > 2_000_000, "the object did travel"
    assert capture.found == set()
    with Capture(launched.hosts[1].interface, [marker.encode()]) as control:
        send = "import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); "
        send += "s.sendto(sys.argv[1].encode(), (sys.argv[2], 9))"
        launched.hosts[1].run("python", "-c", send, marker, launched.hosts[2].address)
        until("the capture sees plain text", lambda: control.found, 10)


def test_a_node_without_a_certificate_has_not_joined(launched: Launched, intruder: subprocess.Popen[bytes]) -> None:
    assert intruder.wait(60) != 0
    assert len(nodes(launched)) == NODES


def test_a_submitted_training_runs_over_two_hosts(launched: Launched, token_folder: Path, tmp_path: Path) -> None:
    model = {"architecture": "llama", "layers": 1, "hidden_size": 16, "heads": 2, "max_positions": 16}
    config = {
        "name": "counter",
        "dataset": str(token_folder),
        "task": {"kind": "causal_lm", "model": model},
        "workers": {"min": 2, "max": 2, "cpus": 1, "pool": POOL, "resources": {"rack": 1}},
        "training": {"max_steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "zero_stage": 2},
        "schedule": {"warmup_steps": 2},
    }
    path = launched.folder / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    words = ["submit", "--cluster", str(launched.file), "jobs/train.py", "--config", str(path)]
    answer = must(launched.modelyard(*words, timeout_s=240))
    assert "models:/counter/1" in answer.stdout
    assert "training starts with 2 workers" in answer.stdout


ASK = """
import json, sys, urllib.request
body = {"model": "gpt", "prompt": "The quick", "max_tokens": 8, "temperature": 0}
headers = {"Authorization": "Bearer " + sys.argv[1], "Content-Type": "application/json"}
call = urllib.request.Request("http://127.0.0.1:8000/v1/completions", json.dumps(body).encode(), headers)
with urllib.request.urlopen(call, timeout=20) as answer:
    print(answer.headers["x-modelyard-site"], repr(json.load(answer)["choices"][0]["text"]))
"""


def test_an_edge_application_answers_on_its_host_while_its_link_is_cut(
    launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in launched.variables.items():
        monkeypatch.setenv(name, value)
    register(tiny_llama(launched.folder / "model", seed=0), "gpt")
    key = KeyStore(launched.variables["MODELYARD_GATEWAY_DB"]).create(tenant="north")
    model = {"reference": "models:/gpt/1", "engine": "transformers", "cache_mib": 32, "max_sequences": 4}
    site = {"modelyard/site": "north"}
    serving = {
        "proxies": "every_node",
        "gateway": {"cpus": 0.1, "label_selector": site, "settings": {"site": "north"}},
        "models": [{"model": model, "placement": {"site": "north", "cpus": 0.2}}],
    }
    (launched.folder / "serving.yaml").write_text(yaml.safe_dump(serving))
    must(launched.on_head("modelyard", "serve", "up", str(launched.folder / "serving.yaml"), "--detach"))
    edge = launched.hosts[3]
    said = until("it answers on its host", lambda: edge.run("python", "-c", ASK, key).stdout)
    assert said.startswith("north '")
    edge.cut()
    try:
        alone = must(edge.run("python", "-c", ASK, key)).stdout
    finally:
        edge.heal()
    assert alone == said
    refused = edge.run("python", "-c", ASK, "no-key")
    assert "401" in refused.stderr
    must(launched.on_head("modelyard", "serve", "down", "--all"))


def test_down_leaves_nothing_on_any_host(launched: Launched) -> None:
    must(launched.modelyard("down", str(launched.file)))

    def left() -> dict[str, list[str]]:
        return {host.address: found for host in launched.hosts.members if (found := host.processes())}

    with contextlib.suppress(pytest.fail.Exception):
        until("no process of Ray is left", lambda: not left(), 20)
    assert left() == {}
