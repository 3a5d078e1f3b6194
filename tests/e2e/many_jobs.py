"""Thirty mixed jobs of three tenants on three pools, under faults: many_jobs.py POLICY JOURNAL_URL CONFIG FOLDER.

A cluster of its own: two nodes of 4 logical GPUs (and 4 logical CPUs) in each of the pools a100, l4 and t4. Two of
the jobs are real training runs of CONFIG, each with a driver process, that write their records into FOLDER. While the
jobs run, the scheduler's actor is killed and a node is lost. Prints one JSON object of what was seen.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from modelyard.errors import WaitTimeoutError
from modelyard.scheduling import Request, lease, service
from modelyard.scheduling.forecast import fits
from modelyard.scheduling.ledger import Status
from modelyard.scheduling.measured import Report
from modelyard.scheduling.model import Snapshot, Wait
from modelyard.scheduling.placement import room_of
from modelyard.scheduling.scheduler import Timing

JOBS, RUNS, GPUS_PER_NODE, LIMIT_S = 28, 2, 4, 300.0
SETTLED_S = 5.0
"""A round of the scheduler takes one second at most; what stands for longer than this is its considered word."""


class Job(threading.Thread):
    """A driver that works in placement groups on what its lease gives, and makes way when asked."""

    def __init__(self, number: int, dice: random.Random) -> None:
        super().__init__(daemon=True)
        least = dice.choice([1, 1, 2, 4])
        self.request = Request(
            job_id=f"job-{number:02d}",
            tenant=dice.choice(["vision", "speech", "text"]),
            priority=dice.choice([0, 0, 5]),
            min_workers=least,
            max_workers=least * dice.choice([1, 2]),
            resources={"GPU": 1.0, "CPU": 1.0},
            pools=dice.choice([(), (), ("a100",), ("l4", "t4")]),
            work=dice.uniform(3, 10),
            restart_s=1.0,
        )
        self.done, self.attempts, self.error = 0.0, 0, ""

    def run(self) -> None:
        try:
            with lease(self.request, renew_s=1.0) as held:
                self._work(held)
        except Exception as error:  # noqa: BLE001 - the test shows it
            self.error = repr(error)

    def _work(self, held: Any) -> None:
        assert self.request.work is not None
        while True:
            self.attempts += 1
            try:
                with held.placement_group(timeout_s=20.0):
                    while self.done < self.request.work and not held.must_yield:
                        time.sleep(0.2)
                        self.done += 0.2 * held.workers / self.request.min_workers
                        held.report(Report(self.done, self.request.min_workers / held.workers, 0.0, 64))
            except WaitTimeoutError:
                pass  # a node of the lease is gone
            if self.done >= self.request.work:
                return
            held.give_way(timeout_s=LIMIT_S)


class Watch:
    """What must hold at every look at the scheduler."""

    def __init__(self) -> None:
        self.most_on_a_node = 0
        self.unexplained: list[str] = []
        self.untrue: list[str] = []
        self.resizes: set[tuple[str, int]] = set()
        self._fitting: dict[str, tuple[float, str]] = {}

    def look(self, snapshot: Snapshot, entries: dict[str, Any], reasons: dict[str, Any]) -> None:
        held: dict[str, int] = {}
        for entry in entries.values():
            for node, workers in entry.allocation.items():
                held[node] = held.get(node, 0) + workers
        self.most_on_a_node = max([self.most_on_a_node, *held.values()])
        now = time.time()
        room = room_of(snapshot)
        fitting = {}
        for job_id, entry in entries.items():
            request = entry.request
            if entry.status is not Status.WAITING or (entry.changed_s or entry.submitted_s) > now - SETTLED_S:
                continue
            if job_id not in reasons:
                self.unexplained.append(job_id)
            elif reasons[job_id].code is Wait.NO_ROOM and "chosen" not in reasons[job_id].text:
                pools = [pool for pool in request.pools or tuple(room.members) if pool in room.members]
                if fits(room, request, pools, request.min_workers):
                    fitting[job_id] = self._fitting.get(job_id, (now, reasons[job_id].text))
        self.untrue += [text for since, text in fitting.values() if now - since > SETTLED_S]
        self._fitting = fitting


def start_run(name: str, config: str, folder: Path, address: str, *overrides: str) -> subprocess.Popen[bytes]:
    """A driver process that trains `config` under a lease."""
    driver = Path(__file__).with_name("driver.py")
    command = [sys.executable, str(driver), config, str(folder / f"{name}.jsonl"), f"--run={name}", *overrides]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "RAY_ADDRESS": address})


def steps_done(folder: Path, name: str) -> int:
    """Steps that the driver of a run has seen."""
    file = folder / f"{name}.jsonl"
    return file.read_text().count('"kind": "step"') if file.exists() else 0


def main() -> None:
    """Run the jobs and the faults."""
    policy, journal, config, folder = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    pools = [pool for pool in ("a100", "l4", "t4") for _ in range(2)]
    size = {"num_cpus": GPUS_PER_NODE, "num_gpus": GPUS_PER_NODE}
    nodes = [cluster.add_node(**size, labels={"modelyard/pool": pool}) for pool in pools]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    actor = service.start(policy, journal=journal, timing=Timing(lease_ttl_s=20.0))

    names = [f"run-{number}" for number in range(RUNS)]
    runs = [start_run(name, config, folder, cluster.address) for name in names]
    began = time.monotonic()
    while min(steps_done(folder, name) for name in names) < 5 and time.monotonic() - began < LIMIT_S:
        time.sleep(0.2)  # they hold what they may have before the others come
    dice = random.Random(3)
    jobs = [Job(number, dice) for number in range(JOBS)]
    for job in jobs:
        job.start()
    watch, faults = Watch(), 0
    while time.monotonic() - began < LIMIT_S and (
        any(job.is_alive() for job in jobs) or any(run.poll() is None for run in runs)
    ):
        snapshot, entries, _, reasons, failure = service.call(actor.look)
        watch.look(snapshot, entries, reasons)
        finished = sum(entry.status is Status.DONE for entry in entries.values())
        if faults == 0 and finished >= 5:
            faults = 1
            ray.kill(actor, no_restart=False)
        elif faults == 1 and finished >= 10:
            faults = 2
            cluster.remove_node(nodes[3], allow_graceful=False)
        time.sleep(0.3)
    entries = service.call(actor.look)[1]
    deadline = time.monotonic() + 20.0
    while (free := ray.available_resources().get("GPU", 0.0)) < 20 and time.monotonic() < deadline:
        time.sleep(0.2)
    result = {
        "statuses": sorted({str(entry.status) for entry in entries.values()}),
        "jobs": len(entries),
        "errors": [job.error for job in jobs if job.error],
        "unfinished": [job.name for job in jobs if job.is_alive()],
        "runs": [run.poll() for run in runs],
        "seconds": round(time.monotonic() - began, 1),
        "attempts": sum(job.attempts for job in jobs),
        "faults": faults,
        "most_on_a_node": watch.most_on_a_node,
        "unexplained": watch.unexplained,
        "untrue": watch.untrue,
        "leased_at_the_end": sum(sum(entry.allocation.values()) for entry in entries.values()),
        "free_gpus_at_the_end": free,
        "last_failure": failure,
    }
    service.stop()
    for run in runs:
        run.kill()
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
