"""Whether a cluster that works for long is at its end what it was at its start: small jobs and requests, for minutes.

    python benchmarks/soak.py                         30 minutes
    python benchmarks/soak.py --minutes 5 --json out.json
    python benchmarks/soak.py --quick                 two minutes

A cluster of this machine (`modelyard up`: a head, two nodes), a scheduler, a served model. Leased training runs follow
each other, callers ask all the time, the model is scaled up and down, a run is cancelled now and then. After the first
round and after the last one, with nothing to do for a while, these are counted: memory (PSS), open files, processes,
actors that live, placement groups that exist, leases, shared memory. A rise that grows with the number of rounds is a
leak; the last column is the rise per round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import yaml  # noqa: E402

MODELYARD = str(Path(sys.executable).with_name("modelyard"))
REST_S = 20.0
"""Without work before counting: idle workers end, caches are dropped."""
ALLOWED = {"memory_mib": 60.0, "open_files": 60.0, "processes": 3.0}
"""A rise up to this is no leak: pools fill, caches warm up."""
BOUNDS = {
    "RAY_LOG_MONITOR_MAX_OPEN_FILES": "10",  # of logs, a node; 200
    "RAY_grpc_client_idle_timeout_ms": "10000",  # of connections to workers that ended; half an hour
    "RAY_subscriber_timeout_ms": "20000",  # of connections from workers that ended; five minutes
    "RAY_task_events_max_num_task_in_gcs": "100",  # 100,000
    "RAY_maximum_gcs_destroyed_actor_cached_count": "10",  # 100,000
    "RAY_maximum_gcs_dead_worker_cached_count": "10",  # 1,000
}
"""What Ray keeps of work that has ended grows to a bound; with Ray's own bounds (behind each) it would grow all the
time that this takes, and hide a leak."""
COUNTED = ("memory_mib", "open_files", "processes", "actors", "placement_groups", "leases", "shared_memory_mib")


class Soak:
    """The cluster, and what works on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MODELYARD_", "AWS_"))
        }
        mine = {"HOME": str(folder), "MODELYARD_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        mine |= {"MODELYARD_GATEWAY_DB": f"sqlite:///{folder / 'gateway.db'}", "RAY_USAGE_STATS_ENABLED": "0"}
        self.environment = {**kept, **mine, **BOUNDS}
        self.answers = self.failures = self.jobs = self.cancelled = 0
        self.problems: list[str] = []
        self._over = threading.Event()

    def modelyard(self, *words: str, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
        """Run the command line."""
        return subprocess.run(
            [MODELYARD, *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            cwd=self.folder,
        )

    def must(self, *words: str, timeout_s: float = 600) -> str:
        """The output of a command that has to succeed."""
        answer = self.modelyard(*words, timeout_s=timeout_s)
        if answer.returncode:
            raise RuntimeError(f"{words}: {answer.stdout[-2000:]}{answer.stderr[-3000:]}")
        return answer.stdout

    def start(self, port: int) -> None:
        """Cluster, scheduler, model, gateway."""
        os.environ.update({name: self.environment[name] for name in ("MODELYARD_HOME", "MODELYARD_GATEWAY_DB")})
        short = tempfile.mkdtemp(prefix="my-r-")
        self.short = Path(short)
        self.must("up", "--pool", "train=2x0:1", "--cpus", "2", "--temp-dir", short, "--start-timeout-s", "200")
        self.must("scheduler", "start", "--policy", "fair_share")
        from tests.serving.models import register, tiny_llama

        register(tiny_llama(self.folder / "model", seed=0), "gpt")
        model = {"reference": "models:/gpt/1", "engine": "transformers", "cache_mib": 32, "max_sequences": 4}
        placement = {"cpus": 0.3, "label_selector": {"modelyard/pool": "head"}}
        serving = {
            "port": port,
            "gateway": {"replicas": 1, "cpus": 0.1, "label_selector": {"modelyard/pool": "head"}},
            "models": [{"model": model, "placement": placement}],
        }
        (self.folder / "serving.yaml").write_text(yaml.safe_dump(serving))
        self.must("serve", "up", str(self.folder / "serving.yaml"), "--detach")
        from modelyard.security import KeyStore

        self.key = KeyStore(self.environment["MODELYARD_GATEWAY_DB"]).create(tenant="soak")
        self.url = f"http://127.0.0.1:{port}"
        self._write_job()

    def _write_job(self) -> None:
        from modelyard.data.dataset import INFO_FILE, DatasetInfo
        from modelyard.data.shards import Column, ShardWriter

        columns = (Column(name="input_ids", dtype="uint16", shape=(16,)),)
        rows = np.random.default_rng(0).integers(64, size=(256, 16)).astype(np.uint16)
        data = self.folder / "rows"
        data.mkdir()
        writer = ShardWriter(data, "train", columns, 256)
        writer.write({"input_ids": rows})
        writer.close()
        info = DatasetInfo(format="tokens", columns=columns, splits={"train": 256}, vocab_size=64, block_tokens=16)
        (data / INFO_FILE).write_text(info.model_dump_json())
        model = {"architecture": "llama", "layers": 1, "hidden_size": 32, "heads": 2, "max_positions": 16}
        config = {
            "name": "soak",
            "dataset": str(data),
            "task": {"kind": "causal_lm", "model": model},
            "workers": {"min": 1, "max": 2, "cpus": 1, "pool": "train"},
            "training": {"max_steps": 20, "global_batch_size": 8, "micro_batch_size": 4, "zero_stage": 1},
            "lease": {"tenant": "soak"},
        }
        (self.folder / "job.yaml").write_text(yaml.safe_dump(config))

    def round(self, number: int) -> None:
        """One job after another has been done: one to its end, one cancelled every third time; the model is scaled."""
        words = ["submit", str(ROOT / "jobs" / "train.py"), "--config", str(self.folder / "job.yaml"), "--installed"]
        words += ["--working-dir", str(ROOT / "jobs"), f"--run=soak-{number}"]
        answer = self.modelyard(*words, timeout_s=600)
        self.jobs += 1
        if answer.returncode:
            self.problems.append(f"job {number}: {(answer.stdout + answer.stderr)[-1500:]}")
        if number % 3 == 2:
            self.cancel(number)
        for count in ("2", "1"):
            scaled = self.modelyard("serve", "scale", "gpt", "--min", count, "--max", count)
            if scaled.returncode:
                self.problems.append(f"scale {count}: {scaled.stderr[-500:]}")

    def cancel(self, number: int) -> None:
        """Start a long run, and end it by the scheduler."""
        words = ["submit", str(ROOT / "jobs" / "train.py"), "--config", str(self.folder / "job.yaml"), "--installed"]
        words += [
            "--working-dir",
            str(ROOT / "jobs"),
            "--detach",
            f"--run=long-{number}",
            "--training.max_steps=100000",
        ]
        self.must(*words)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            rows = json.loads(after(self.must("queue", "--json"), "["))
            mine = [row for row in rows if row["job"] == f"long-{number}"]
            if mine and mine[0]["state"] == "running":
                self.modelyard("queue", "cancel", mine[0]["job"])
                self.cancelled += 1
                return
            time.sleep(1)
        self.problems.append(f"long-{number} never ran")

    def ask(self) -> None:
        """Ask all the time, until `close`."""
        import urllib.request

        body = {"model": "gpt", "prompt": "The quick brown", "max_tokens": 8, "temperature": 0}
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        while not self._over.wait(0.2):
            call = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers)
            try:
                with urllib.request.urlopen(call, timeout=60) as answer:
                    json.load(answer)
                self.answers += 1
            except Exception as error:  # noqa: BLE001  each failure counts, whatever it is
                self.failures += 1
                self.problems.append(f"call: {type(error).__name__}: {error}"[:200])

    def close(self) -> None:
        """Stop asking."""
        self._over.set()

    def count(self) -> dict[str, float]:
        """What the cluster holds now."""
        stored = json.loads((self.folder / "home" / "laptop.json").read_text())
        from modelyard.clusters.laptop import ENV_ID

        memory = files = processes = 0.0
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(ENV_ID) == stored["cluster_id"]:
                    memory += process.memory_full_info().pss
                    files += process.num_fds()
                    processes += 1
        words = [sys.executable, "-c", LOOK]
        environment = {**self.environment, "RAY_ADDRESS": stored["address"], "RAY_AUTH_MODE": "token"}
        answer = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
        if "LOOK" not in answer.stdout:
            raise RuntimeError(answer.stderr[-3000:])
        found: dict[str, float] = json.loads(answer.stdout.partition("LOOK")[2])
        return {
            "memory_mib": memory / 2**20,
            "open_files": files,
            "processes": processes,
            **found,
            "shared_memory_mib": found.pop("object_store_bytes", 0.0) / 2**20,
        }


LOOK = """
import json, ray
from ray.util import placement_group_table
from ray.util.state import list_actors
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
alive = [each for each in list_actors(limit=10000, raise_on_missing_output=False) if each.state != "DEAD"]
groups = [each for each in placement_group_table().values() if each["state"] != "REMOVED"]
from modelyard.scheduling import service
snapshot, entries, *_ = service.call(service.required().look)
leases = sum(entry.status.name == "RUNNING" for entry in entries.values())
total, free = ray.cluster_resources(), ray.available_resources()
used = total.get("object_store_memory", 0) - free.get("object_store_memory", 0)
print("LOOK" + json.dumps({"actors": len(alive), "placement_groups": len(groups), "leases": leases,
                           "object_store_bytes": used}))
"""


def after(text: str, mark: str) -> str:
    """The text from a mark on."""
    return mark + text.partition(mark)[2]


def verdict(first: dict[str, float], last: dict[str, float]) -> list[str]:
    """What rose by more than it may. Pure."""
    return [name for name in COUNTED if last[name] - first[name] > ALLOWED.get(name, 0.0)]


def soak(minutes: float, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Work for so long; what was counted at the start and at the end."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    work = Soak(folder)
    try:
        work.start(port)
        asker = threading.Thread(target=work.ask, daemon=True)
        asker.start()
        work.round(0)
        time.sleep(REST_S)
        first, rounds = work.count(), 0
        say(f"  start {json.dumps(first)}")
        deadline = time.monotonic() + minutes * 60
        while time.monotonic() < deadline or rounds < 2:  # the second one has a job that is cancelled
            rounds += 1
            work.round(rounds)
            say(f"  round {rounds}: {work.jobs} jobs, {work.answers} answers, {work.failures} failed")
        work.close()
        asker.join(90)
        time.sleep(REST_S)
        last = work.count()
    finally:
        work.close()
        work.modelyard("down")
        shutil.rmtree(getattr(work, "short", folder), ignore_errors=True)
    return {
        "rounds": rounds,
        "jobs": work.jobs,
        "cancelled": work.cancelled,
        "answers": work.answers,
        "failed_calls": work.failures,
        "problems": work.problems[:10],
        "start": first,
        "end": last,
        "leaks": verdict(first, last),
    }


def report(found: dict[str, Any], path: Path | None) -> None:
    """Print the table; write the figures."""
    print(
        f"\n{found['jobs']} jobs, {found['cancelled']} cancelled, {found['answers']} answers, "
        f"{found['failed_calls']} failed calls, {found['rounds']} rounds after the first"
    )
    print(f"{'':<20}{'start':>10}{'end':>10}{'per round':>12}")
    for name in COUNTED:
        first, last = found["start"][name], found["end"][name]
        mark = "  <- rose" if name in found["leaks"] else ""
        print(f"{name:<20}{first:>10.0f}{last:>10.0f}{(last - first) / max(found['rounds'], 1):>12.1f}{mark}")
    for problem in found["problems"]:
        print(f"problem: {problem}")
    if path is not None:
        path.write_text(json.dumps(found, indent=1))


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--quick", action="store_true", help="two minutes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    folder = Path(tempfile.mkdtemp(prefix="my-soak-"))
    try:
        report(
            soak(2.0 if options.quick else options.minutes, folder, lambda text: print(text, flush=True)), options.json
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
