"""What a cluster loses, and for how long it is silent, when its parts fail: one fault after another.

    python benchmarks/chaos.py                        every fault (as root; about half an hour)
    python benchmarks/chaos.py --quick                a killed worker, a short cut, a killed head
    python benchmarks/chaos.py --only head --json out.json
    python benchmarks/chaos.py --quick --together     one run meets them all, one after the other
    python benchmarks/chaos.py --redis                the head's state in a Redis with mutual TLS, not on its disk

Four hosts of network namespaces with ssh, started by `modelyard up`: a head, one for the job's script, two that train
(one worker each, elastic from one to two); and two replicas of a small model behind a gateway, by HTTPS on every host.
Checkpoints and models are in an S3 server of its own. Each fault meets a training run (a fresh one, or with
`--together` the same for all) that records its samples and has a checkpoint, and callers who ask all the time; a caller
whose host refuses goes to the next, as with a load balancer.

`stopped` is the longest time without a finished step, `silent` without an answered call, from the fault on. `redone`
counts steps that were done again since the newest checkpoint; `rows` says whether the finished run used exactly the
rows of an undisturbed one, in their order.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import itertools
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import yaml  # noqa: E402
from tests.clusters.conftest import Launched, cluster_file, must  # noqa: E402
from tests.clusters.hosts import Host, Hosts, hosts, why_not  # noqa: E402
from tests.clusters.lossy import Lossy  # noqa: E402

ROWS, TOKENS, BATCH = 4096, 32, 16
SETTLED_S, AFTER_S = 5.0, 12.0
"""Undisturbed time before a fault, and after it has been mended."""
START_S, END_S, MEND_S = 240.0, 240.0, 240.0
"""Longest wait for a run to start, to end, and for all hosts and replicas to be back."""
ASK_EVERY_S, CALL_S = 0.25, 20.0
CALLERS = 2
S3_PORT, REDIS_PORT = 8333, 6380
QUICK = ("worker", "link10", "head")
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
LOOK = """
import json, os, urllib.request
token = open(os.environ["RAY_AUTH_TOKEN_PATH"]).read().strip()

def get(path):
    call = urllib.request.Request("http://127.0.0.1:8265" + path, headers={"Authorization": "Bearer " + token})
    return json.load(urllib.request.urlopen(call, timeout=10))

nodes = get("/api/v0/nodes?limit=1000")["data"]["result"]["result"]
serve = get("/api/serve/applications/")
found = [each for application in serve["applications"].values() for each in application["deployments"].values()]
running = [sum(replica["state"] == "RUNNING" for replica in each["replicas"]) for each in found]
whole = [each["status"] == "HEALTHY" and n == each["target_num_replicas"] for each, n in zip(found, running)]
print("LOOK" + json.dumps({
    "alive": [node["node_ip"] for node in nodes if node["state"] == "ALIVE"],
    "whole": sum(whole) == len(whole) > 1,
    "open": {proxy["status"] for proxy in serve["proxies"].values()} == {"HEALTHY"},
}))
"""
DRIVER = """
import json, sys
from pathlib import Path
import ray
import modelyard
from modelyard.training.monitor import NAMESPACE

config, folder, run = sys.argv[1], Path(sys.argv[2]), sys.argv[3]

def note(record):
    with (folder / "records").open("a") as file:
        file.write(json.dumps(record) + "\\n")
    if record["kind"] == "step" and (folder / "stop").exists():
        ray.get_actor(f"run-{run}", namespace=NAMESPACE).request.remote("stop", "measured")

done = modelyard.train(config, f"--run={run}", on_record=note, progress=False)
samples = [sample for record in done.history.records for sample in record.get("samples", [])]
(folder / "part").write_text(json.dumps({"model": done.model, "samples": samples}))
(folder / "part").rename(folder / "result")
"""


@dataclass
class Outcome:
    """What one fault did."""

    fault: str
    what: str
    asked: int = 0
    failed: int = 0
    wrong: int = 0
    """Answers that differ from the undisturbed one."""
    silent_s: float = 0.0
    stopped_s: float = 0.0
    redone: int = 0
    steps: int = 0
    rows: str = "lost"
    """`exact`, or what is wrong with them; `lost` when the run never came to its end."""
    mended_s: float | None = None
    """From the fault until every host that can be back is back, with its replicas; None: not within `MEND_S`."""
    gangs: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Load:
    """Callers who ask all the time, each at a steady pace."""

    def __init__(self, urls: Sequence[str], key: str, authority: Path, model: str) -> None:
        self._urls, self._key, self._model = list(urls), key, model
        self._context = ssl.create_default_context(cafile=str(authority))
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self.answers: list[tuple[float, str]] = []
        """When it came, and the text."""
        self.failures: list[tuple[float, str]] = []

    def ask(self) -> str:
        """One answer, from the first host that gives one."""
        body = {"model": self._model, "prompt": "The quick brown", "max_tokens": 8, "temperature": 0}
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        problem: Exception = RuntimeError("no host")
        for url in list(self._urls):
            call = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
            try:
                with urllib.request.urlopen(call, timeout=CALL_S, context=self._context) as answer:
                    return str(json.load(answer)["choices"][0]["text"])
            except urllib.error.HTTPError as error:
                problem = RuntimeError(f"{error.code} {error.read()[:200]!r}")
                if error.code not in (502, 503, 504):
                    break
            except (OSError, ValueError) as error:
                problem = error
        raise problem

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._loop, daemon=True) for _ in range(CALLERS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(CALL_S * len(self._urls) + 5)

    def _loop(self) -> None:
        while not self._over.wait(ASK_EVERY_S):
            try:
                text = self.ask()
                self.answers.append((time.monotonic(), text))
            except Exception as error:  # noqa: BLE001  each failure counts, whatever it is
                self.failures.append((time.monotonic(), f"{type(error).__name__}: {error}"[:200]))


class Training:
    """One submitted run, followed by what its script writes."""

    def __init__(self, chaos: Chaos, name: str) -> None:
        self.folder = chaos.folder / "runs" / name
        self.folder.mkdir(parents=True)
        (self.folder / "driver.py").write_text(DRIVER)
        words = ["submit", "--cluster", str(chaos.cluster.file), "--detach", "--driver-pool", "base", "--installed"]
        words += ["--working-dir", str(self.folder)]
        words += [str(self.folder / "driver.py"), str(chaos.config), str(self.folder), name]
        self.job = must(chaos.cluster.modelyard(*words)).stdout.strip()
        self.steps: list[tuple[float, int]] = []
        """When it was seen, and its number."""
        self.gangs: list[int] = []
        self.checkpoints = 0
        self._over = threading.Event()
        threading.Thread(target=self._follow, daemon=True).start()

    def finish(self) -> list[int] | None:
        """Ask it to stop at its next step; the rows that it used, or None when it never ended."""
        (self.folder / "stop").touch()
        path = self.folder / "result"
        with contextlib.suppress(TimeoutError):
            until(path.exists, END_S, "the run's end")
        self._over.set()
        return json.loads(path.read_text())["samples"] if path.exists() else None

    def _follow(self) -> None:
        position = 0
        while not self._over.wait(0.1):
            path = self.folder / "records"
            if not path.exists():
                continue
            with path.open() as file:
                file.seek(position)
                for line in iter(file.readline, ""):
                    if not line.endswith("\n"):
                        break
                    position += len(line)
                    record = json.loads(line)
                    if record["kind"] == "step":
                        self.steps.append((time.monotonic(), int(record["step"])))
                    elif record["kind"] == "start":
                        self.gangs.append(int(record["num_workers"]))
                    elif record["kind"] == "checkpoint":
                        self.checkpoints += 1

    def is_whole(self, workers: int) -> bool:
        """Whether it trains with so many workers, and has a checkpoint."""
        return self.checkpoints > 0 and len(self.steps) > 20 and self.gangs[-1:] == [workers]

    @property
    def redone(self) -> int:
        """Steps that were done again so far."""
        numbers = [number for _, number in self.steps]
        return len(numbers) - len(set(numbers))


class Chaos:
    """The cluster, its S3 server, what is served on it, and what can happen to it."""

    def __init__(self, made: Hosts, folder: Path, *, with_redis: bool = False) -> None:
        self.folder, self.hosts, self.with_redis = folder, made, with_redis
        self.head, self.base, *self.trainers = made.members
        self.victim: Host = self.trainers[-1]
        self.lost: set[str] = set()
        self._weed: subprocess.Popen[bytes] | None = None
        self._redis: subprocess.Popen[bytes] | None = None
        self._lossy: Lossy | None = None
        self.bridge_address = made[0].address.rpartition(".")[0] + ".254"
        self.cluster = self._prepared()
        self.config = self._training_config()

    # --- set up ---

    def _prepared(self) -> Launched:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MODELYARD_", "AWS_"))
        }
        home = {"HOME": str(self.folder), "MODELYARD_HOME": str(self.folder / "home"), "RAY_TMPDIR": str(self.folder)}
        self.variables = {
            "AWS_ENDPOINT_URL": f"http://{self.bridge_address}:{S3_PORT}",
            "AWS_ACCESS_KEY_ID": "chaos",
            "AWS_SECRET_ACCESS_KEY": "chaos-secret",
            "AWS_REGION": "us-east-1",
            "MODELYARD_STORE": "s3://chaos/store",
            "MODELYARD_TRACKING_URI": f"sqlite:///{self.folder / 'mlflow.db'}",
            "MODELYARD_GATEWAY_DB": f"sqlite:///{self.folder / 'gateway.db'}",
        }
        cluster = Launched(self.hosts, cluster_file(self.hosts, self.folder), self.folder, {**kept, **home})
        data = yaml.safe_load(cluster.file.read_text())
        data["setup_commands"][-1] += " --open 8000"
        machines = data["metadata"]["hosts"]
        machines[self.base.address] |= {"pool": "base", "cpus": 2, "resources": {}}
        for trainer in self.trainers:
            machines[trainer.address]["cpus"] = 2
        cluster.file.write_text(yaml.safe_dump(data))
        return cluster

    def start(self) -> None:
        """S3 server, cluster, model, gateway."""
        self.start_s3()
        os.environ.update(self.variables, MODELYARD_HOME=str(self.folder / "home"))
        extra = [word for name, value in self.variables.items() for word in ("--env", f"{name}={value}")]
        must(self.cluster.modelyard("certs", "create", *extra))
        if self.with_redis:
            self.start_redis()
        for host in self.hosts.members:  # so that a full disk can be had
            must(host.run("mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", "/tmp/ray"))
        must(self.cluster.modelyard("up", str(self.cluster.file), timeout_s=400))
        from tests.serving.models import register, tiny_llama

        register(tiny_llama(self.folder / "model", seed=0), "gpt")
        must(self.on_head("modelyard scheduler start"))
        model = {"reference": "models:/gpt/1", "engine": "transformers", "cache_mib": 32, "max_sequences": 4}
        placement = {"cpus": 0.2, "label_selector": {"modelyard/pool": "in(train,base)"}}
        serving = {
            "host": "0.0.0.0",
            "proxies": "every_node",
            "certificate": "/tmp/ray/gateway.crt",
            "certificate_key": "/tmp/ray/gateway.key",
            "gateway": {"replicas": 2, "cpus": 0.1},
            "models": [{"model": model, "placement": placement, "min_replicas": 2, "max_replicas": 2}],
        }
        (self.folder / "serving.yaml").write_text(yaml.safe_dump(serving))
        until(lambda: len(self.alive()) == len(self.hosts.members), START_S, "every host to join")
        if self.with_redis and not self._redis_keys():
            raise RuntimeError("the head keeps nothing in the Redis")
        for host in self.hosts.members:  # each one's own, at one path; homes differ here
            for end in ("crt", "key"):
                must(host.run("cp", f"{host.home}/.modelyard/cluster/node.{end}", f"/tmp/ray/gateway.{end}"))
        must(self.on_head(f"modelyard serve up {self.folder / 'serving.yaml'} --detach", timeout_s=300))
        from modelyard.security import KeyStore

        self.key = KeyStore(self.variables["MODELYARD_GATEWAY_DB"]).create(tenant="chaos")

    def load(self) -> Load:
        """Callers of this cluster, who prefer a host that nothing happens to."""
        order = [self.base, *self.trainers, self.head]
        urls = [f"https://{host.address}:8000" for host in order if host.address not in self.lost]
        return Load(urls, self.key, self.folder / "home" / "cluster" / "ca.crt", "gpt")

    def _training_config(self) -> Path:
        from modelyard.data.dataset import INFO_FILE, DatasetInfo
        from modelyard.data.shards import Column, ShardWriter

        data = self.folder / "rows"
        data.mkdir()
        columns = (Column(name="input_ids", dtype="uint16", shape=(TOKENS,)),)
        rows = np.random.default_rng(0).integers(64, size=(ROWS, TOKENS)).astype(np.uint16)
        writer = ShardWriter(data, "train", columns, ROWS)
        writer.write({"input_ids": rows})
        writer.close()
        splits = {"train": ROWS}
        info = DatasetInfo(format="tokens", columns=columns, splits=splits, vocab_size=64, block_tokens=TOKENS)
        (data / INFO_FILE).write_text(info.model_dump_json())
        model = {"architecture": "llama", "layers": 2, "hidden_size": 256, "heads": 4, "max_positions": TOKENS}
        config = {
            "name": "chaos",
            "dataset": str(data),
            "task": {"kind": "causal_lm", "model": model},
            "workers": {"min": 1, "max": 2, "cpus": 1, "pool": "train", "resources": {"rack": 1}},
            "training": {
                "max_steps": 100_000,
                "global_batch_size": BATCH,
                "micro_batch_size": 8,
                "zero_stage": 1,
                "record_samples": True,
                "log_every_steps": 1,
            },
            "checkpoint": {"every_s": 10.0},
        }
        path = self.folder / "training.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    # --- look ---

    def on_head(self, command: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command on the head, as its user does."""
        line = f". ~/.modelyard/cluster/node.env; {command}"
        return self.head.run("bash", "-c", line, timeout_s=timeout_s)

    def look(self) -> dict[str, Any]:
        """What the head says about nodes, replicas and proxies; nothing while it is away."""
        found = self.on_head(f"timeout 25 python -S -c '{LOOK}'").stdout.partition("LOOK")[2]
        return dict(json.loads(found)) if found else {}

    def alive(self) -> set[str]:
        """Addresses of the hosts whose Ray is alive; none while the head is away."""
        return set(self.look().get("alive", ()))

    def is_mended(self) -> bool:
        """Whether all that can be there is there: hosts, replicas, ways in."""
        wanted = {host.address for host in self.hosts.members} - self.lost
        found = self.look()
        return bool(found) and set(found["alive"]) == wanted and found["whole"] and found["open"]

    # --- faults ---

    def start_s3(self) -> None:
        """Start the S3 server on the bridge, with what it had before."""
        here = self.folder / "s3"
        here.mkdir(exist_ok=True)
        keys = {"accessKey": "chaos", "secretKey": "chaos-secret"}
        identity = {"name": "chaos", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List"]}
        (here / "s3.json").write_text(json.dumps({"identities": [identity]}))
        weed = shutil.which("weed") or str(Path(sys.executable).with_name("weed"))
        ports = {"master": 9333, "volume": 8380, "filer": 8388, "s3": S3_PORT}
        flags = [f"-{name}.port={port}" for name, port in ports.items()]
        flags += [f"-{name}.port.grpc={port + 10_000}" for name, port in ports.items()]
        words = [weed, "server", f"-dir={here}", f"-ip={self.bridge_address}", f"-ip.bind={self.bridge_address}", "-s3"]
        words += [*flags, f"-s3.config={here / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        words += ["-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=60"]
        words += [f"-filer.localSocket={here / 'filer.sock'}"]
        with (here / "log").open("ab") as log:
            self._weed = subprocess.Popen(words, stdout=log, stderr=log, cwd=here)
        until(self._makes_bucket, 90, "the S3 server")

    def start_redis(self) -> None:
        """Start a Redis on the bridge, with a node's certificate, that asks for one; the head is to use it."""
        from modelyard.clusters import certs

        here = self.folder / "redis"
        certs.issue(here, [ipaddress.ip_address(self.bridge_address)], self.folder / "home" / "cluster")
        words = ["redis-server", "--port", "0", "--tls-port", str(REDIS_PORT), "--bind", self.bridge_address]
        words += ["--requirepass", "chaos-secret", "--save", "", "--dir", str(here), "--logfile", str(here / "log")]
        words += ["--tls-cert-file", str(here / certs.NODE_CERT), "--tls-key-file", str(here / certs.NODE_KEY)]
        self._redis = subprocess.Popen([*words, "--tls-ca-cert-file", str(here / certs.CA_CERT)])
        (here / "password").write_text("chaos-secret")
        where = f"rediss://{self.bridge_address}:{REDIS_PORT}"
        password = str(here / "password")
        must(self.cluster.modelyard("certs", "redis", where, "--name", "chaos", "--redis-password-file", password))

    def _redis_keys(self) -> int:
        """How many there are in the Redis."""
        here = self.folder / "redis"
        words = ["redis-cli", "-h", self.bridge_address, "-p", str(REDIS_PORT), "--tls", "--no-auth-warning"]
        words += ["--cert", str(here / "node.crt"), "--key", str(here / "node.key"), "--cacert", str(here / "ca.crt")]
        answer = must(subprocess.run([*words, "-a", "chaos-secret", "dbsize"], capture_output=True, text=True))
        return int(answer.stdout.split()[-1])

    def stop_servers(self) -> None:
        """Kill what runs on the bridge."""
        self.stop_s3()
        if self._redis is not None:
            self._redis.kill()
            self._redis.wait(20)

    def stop_s3(self) -> None:
        """Kill the S3 server."""
        if self._weed is not None:
            self._weed.kill()
            self._weed.wait(20)
            self._weed = None

    def _makes_bucket(self) -> bool:
        from pyarrow import fs

        client = fs.S3FileSystem(
            access_key="chaos",
            secret_key="chaos-secret",
            endpoint_override=f"{self.bridge_address}:{S3_PORT}",
            scheme="http",
            allow_bucket_creation=True,
            connect_timeout=2,
            request_timeout=5,
        )
        try:
            client.create_dir("chaos")
            with client.open_output_stream("chaos/ready") as stream:
                stream.write(b"ready")
        except OSError:
            return False
        return True

    def spoil(self) -> None:
        """Lose and delay what goes over the victim's cable, each way."""
        self._lossy = Lossy(self.victim.interface, self.hosts.bridge, delay_s=0.2, loss=0.3)

    def unspoil(self) -> None:
        """Give it a good cable again."""
        if self._lossy is not None:
            self._lossy.close()
            self._lossy = None

    def kill_worker(self) -> None:
        """Kill the training worker of one host."""
        if not any(host.kill("RayTrainWorker") for host in reversed(self.trainers)):
            raise RuntimeError("no training worker runs")

    def set_clock(self, shift: str) -> None:
        """Shift the hour that everything of Ray on the victim reads. Seconds; the time between two moments stays."""
        (self.folder / "clock").write_text(shift)

    def give_clock(self) -> None:
        """Start the victim's Ray anew, with a clock of its own."""
        self.set_clock("+0")
        names = {"LD_PRELOAD": FAKETIME, "FAKETIME_TIMESTAMP_FILE": str(self.folder / "clock")}
        names |= {"FAKETIME_CACHE_DURATION": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        with (self.victim.home / ".bashrc").open("a") as profile:
            profile.writelines(f"export {name}={value}\n" for name, value in names.items())
        self.victim.kill("raylet/raylet")
        until(lambda: self.victim.address not in self.alive(), 90, "the host to be missed")
        until(self.is_mended, MEND_S, "the host with its own clock")

    def lose_host(self) -> None:
        """End the victim's first process, and with it all of the host."""
        os.kill(self.victim.pid, signal.SIGKILL)
        self.lost.add(self.victim.address)

    def run(self, names: Sequence[str]) -> list[Outcome]:
        """Faults one after another on one fresh run, under load."""
        for name in names:
            FAULTS[name].prepare(self)
        training = Training(self, names[0])
        until(lambda: training.is_whole(len(self.trainers)), START_S, f"the run {names[0]} to train on all its hosts")
        outcomes = [self._meet(name, training) for name in names]
        rows = judged(training.finish())
        for outcome in outcomes:
            outcome.rows = rows
        return outcomes

    def _meet(self, name: str, training: Training) -> Outcome:
        fault, outcome = FAULTS[name], Outcome(name, FAULTS[name].what)
        redone, gangs = training.redone, len(training.gangs) - 1
        with self.load() as load:
            begun = time.monotonic()
            until(
                lambda: len(load.answers) > 5 and time.monotonic() - begun > SETTLED_S, 90, "answers before the fault"
            )
            text = load.answers[0][1]
            at = time.monotonic()
            fault.strike(self)
            if fault.lasts_s:
                time.sleep(fault.lasts_s)
                fault.heal(self)
            if fault.is_slow_to_show:
                with contextlib.suppress(TimeoutError):
                    until(lambda: self.victim.address not in self.alive(), 60, "the host to be missed")
            with contextlib.suppress(TimeoutError):
                until(self.is_mended, MEND_S, "all of it to be back", pause_s=1.0)
                outcome.mended_s = time.monotonic() - at
            goes_on = len(training.steps)
            with contextlib.suppress(TimeoutError):
                until(lambda: len(training.steps) > goes_on + 5, MEND_S, "the run to go on")
            time.sleep(AFTER_S)
            end = time.monotonic()
        answered = [(when, said) for when, said in load.answers if when >= at]
        outcome.asked = len(load.answers) + len(load.failures)
        outcome.failed = len(load.failures)
        outcome.wrong = sum(said != text for _, said in load.answers)
        outcome.failures = sorted({said for _, said in load.failures})[:5]
        outcome.silent_s = longest_gap([when for when, _ in answered], at, end)
        outcome.stopped_s = longest_gap([when for when, _ in training.steps if when >= at], at, end)
        outcome.gangs = list(training.gangs[gangs:])
        outcome.redone = training.redone - redone
        outcome.steps = max(number for _, number in training.steps)
        return outcome


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong, and how it ends."""

    what: str
    strike: Callable[[Chaos], Any]
    heal: Callable[[Chaos], Any] = lambda _: None
    lasts_s: float = 0.0
    prepare: Callable[[Chaos], Any] = lambda _: None
    """Before the run begins."""
    is_slow_to_show: bool = False
    """Ray takes some time to notice that the host is away."""


FILL = "! cat /dev/zero > /tmp/ray/fill"
FAULTS: dict[str, Fault] = {
    "worker": Fault("SIGKILL of a training worker", lambda c: c.kill_worker()),
    "link10": Fault("a host's link down for 10 s", lambda c: c.victim.cut(), lambda c: c.victim.heal(), 10),
    "loss": Fault(
        "30 % of packets lost and 200 ms of delay on a host's link for 30 s",
        lambda c: c.spoil(),
        lambda c: c.unspoil(),
        30,
    ),
    "disk": Fault(
        "the disk of Ray's folder full on a host for 30 s",
        lambda c: must(c.victim.run("bash", "-c", FILL)),
        lambda c: c.victim.run("rm", "-f", "/tmp/ray/fill"),
        30,
    ),
    "s3": Fault("the S3 server away for 60 s", lambda c: c.stop_s3(), lambda c: c.start_s3(), 60),
    "head": Fault("SIGKILL of the head's GCS", lambda c: c.head.kill("gcs/gcs_server")),
    "raylet": Fault("SIGKILL of a host's raylet", lambda c: c.victim.kill("raylet/raylet"), is_slow_to_show=True),
    "link120": Fault("a host's link down for 120 s", lambda c: c.victim.cut(), lambda c: c.victim.heal(), 120),
    "clock": Fault(
        "a host's clock one hour ahead, then right again",
        lambda c: c.set_clock("+3600"),
        lambda c: c.set_clock("+0"),
        20,
        lambda c: c.give_clock(),
    ),
    "gone": Fault("a host gone for good", lambda c: c.lose_host()),
}


def judged(samples: list[int] | None) -> str:
    """Whether these are the rows of an undisturbed run, in order."""
    from modelyard.data.order import SampleOrder

    if samples is None:
        return "lost"
    expected = SampleOrder(ROWS, 0).sample_ids(np.arange(len(samples))).tolist()
    wrong = sum(found != wanted for found, wanted in zip(samples, expected, strict=True))
    return "exact" if samples and not wrong else f"{wrong} of {len(samples)} wrong"


def longest_gap(moments: Sequence[float], start: float, end: float) -> float:
    """The longest time between two moments, the start and the end included. Seconds."""
    points = [start, *sorted(moments), end]
    return max(after - before for before, after in itertools.pairwise(points))


def until(condition: Callable[[], Any], timeout_s: float, claim: str, pause_s: float = 0.2) -> None:
    """Poll a condition; raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{claim}: not within {timeout_s:g} s")
        time.sleep(pause_s)


@contextlib.contextmanager
def chaos(folder: Path, *, with_redis: bool) -> Iterator[Chaos]:
    """The cluster, up; nothing of it is left afterwards."""
    with hosts(4, folder) as made:
        found = Chaos(made, folder, with_redis=with_redis)
        try:
            found.start()
            yield found
        finally:
            found.unspoil()
            found.stop_servers()


def report(outcomes: Sequence[Outcome], path: Path | None) -> None:
    """Print the table; write the figures."""
    print(
        f"\n{'fault':<9}{'asked':>7}{'failed':>7}{'silent':>8}{'stopped':>9}{'mended':>8}{'redone':>8}"
        f"  {'gangs':<12}rows"
    )
    for each in outcomes:
        mended = "never" if each.mended_s is None else f"{each.mended_s:.0f} s"
        gangs = ",".join(map(str, each.gangs))
        print(
            f"{each.fault:<9}{each.asked:>7}{each.failed:>7}{each.silent_s:>6.1f} s{each.stopped_s:>7.1f} s{mended:>8}"
            f"{each.redone:>8}  {gangs:<12}{each.rows}" + (f", {each.wrong} wrong answers" if each.wrong else "")
        )
    for each in outcomes:
        print(f"{each.fault:<9}{each.what}" + "".join(f"\n         {failure}" for failure in each.failures))
    if path is not None:
        path.write_text(json.dumps([asdict(each) for each in outcomes], indent=1))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=", ".join(QUICK))
    parser.add_argument("--only", nargs="+", choices=FAULTS, metavar="NAME", help=", ".join(FAULTS))
    parser.add_argument("--together", action="store_true", help="one training run for all of them")
    parser.add_argument("--redis", action="store_true", help="keep the head's state in a Redis; needs redis-server")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", action="store_true", help="keep the folder with all logs")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the hosts, too
    if reason := why_not():
        raise SystemExit(f"hosts of network namespaces: {reason}")
    names = sorted(options.only or (QUICK if options.quick else FAULTS), key="gone".__eq__)  # nothing follows that one
    if "clock" in names and not Path(FAKETIME).exists():
        names.remove("clock")
        print("clock: left out, it needs apt install libfaketime", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="my-chaos-"))
    outcomes: list[Outcome] = []
    try:
        with chaos(folder, with_redis=options.redis) as found:
            for group in [names] if options.together else [[name] for name in names]:
                try:
                    met = found.run(group)
                except (
                    RuntimeError,
                    TimeoutError,
                    subprocess.CalledProcessError,
                ) as error:  # the next fault may go better
                    met = [Outcome(name, FAULTS[name].what, failures=[f"not measured: {error}"]) for name in group]
                outcomes += met
                print("".join(f"  {json.dumps(asdict(each))}\n" for each in met), end="", flush=True)
    finally:
        report(outcomes, options.json)
        if options.keep:
            print(f"logs: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
