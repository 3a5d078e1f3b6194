"""Thirty mixed jobs of three tenants on three pools, under faults: python many_jobs.py POLICY JOURNAL_URL.

A cluster of its own: two nodes of 4 logical GPUs in each of the pools a100, l4 and t4. While the jobs run, the
scheduler's actor is killed and a node is lost. Prints one JSON object of what was seen.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from typing import Any

import ray
from ray.cluster_utils import Cluster

from modelyard.errors import WaitTimeoutError
from modelyard.scheduling import Request, lease, service
from modelyard.scheduling.ledger import Status
from modelyard.scheduling.measured import Report
from modelyard.scheduling.scheduler import Timing

JOBS, GPUS_PER_NODE, LIMIT_S = 30, 4, 240.0


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


def main() -> None:
    """Run the jobs and the faults."""
    policy, journal = sys.argv[1:]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    pools = [pool for pool in ("a100", "l4", "t4") for _ in range(2)]
    nodes = [cluster.add_node(num_cpus=0, num_gpus=GPUS_PER_NODE, labels={"modelyard/pool": pool}) for pool in pools]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    actor = service.start(policy, journal=journal, timing=Timing(lease_ttl_s=20.0))

    dice = random.Random(3)
    jobs = [Job(number, dice) for number in range(JOBS)]
    for job in jobs:
        job.start()
    most, unexplained, faults = 0, [], 0
    began = time.monotonic()
    while any(job.is_alive() for job in jobs) and time.monotonic() - began < LIMIT_S:
        _, entries, _, reasons, failure = service.call(actor.look)
        held: dict[str, int] = {}
        for entry in entries.values():
            for node, workers in entry.allocation.items():
                held[node] = held.get(node, 0) + workers
        most = max([most, *held.values()])
        settled = time.time() - 5.0
        unexplained += [
            job
            for job, entry in entries.items()
            if entry.status is Status.WAITING
            and job not in reasons
            and (entry.changed_s or entry.submitted_s) < settled
        ]
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
        "attempts": sum(job.attempts for job in jobs),
        "faults": faults,
        "most_on_a_node": most,
        "unexplained": unexplained,
        "leased_at_the_end": sum(sum(entry.allocation.values()) for entry in entries.values()),
        "free_gpus_at_the_end": free,
        "last_failure": failure,
    }
    service.stop()
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
