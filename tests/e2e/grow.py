"""A waiting job, and then a served model, make an autoscaled cluster grow: python grow.py JOURNAL_URL FOLDER.

Models and keys go to FOLDER. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from tests.e2e.growing_cluster import growing_cluster
from tests.serving.models import register, tiny_llama

from modelyard.cluster import LAUNCHED_BY, RayCluster
from modelyard.config import parse
from modelyard.errors import ConfigError
from modelyard.scheduling import Request, lease, service
from modelyard.scheduling.model import pool_of
from modelyard.serving.deployment import control
from modelyard.serving.deployment.config import ServingConfig

LIMIT_S = 90.0


def main() -> None:
    """A job fills the only node of l4 that its start brought up; another must make the cluster grow by a second."""
    each = {"resources": {"CPU": 1, "GPU": 2}, "min_workers": 0, "max_workers": 2}
    types = {pool: {**each, "labels": {"modelyard/pool": pool}} for pool in ("a100", "l4")}
    seen: dict[str, object] = {}
    folder = Path(sys.argv[2])
    os.environ |= {"HOME": str(folder), "MODELYARD_GATEWAY_DB": f"sqlite:///{folder / 'gateway.db'}"}
    with growing_cluster(types) as (_, config):
        LAUNCHED_BY.expanduser().write_text(config.read_text())  # as `ray up` leaves it on a head
        actor = service.start("fifo", journal=sys.argv[1])
        try:
            with lease(gang("typo", "h100")):
                pass
        except ConfigError as error:
            seen["unknown_pool"] = str(error)
        over = threading.Event()
        watcher = threading.Thread(target=note_reasons, args=(actor, seen, over))
        watcher.start()
        try:
            with lease(gang("first", "l4"), timeout_s=LIMIT_S) as first:
                seen["first"] = pools(first.allocation)
                with lease(gang("second", "l4"), timeout_s=LIMIT_S) as second:
                    seen["second"] = pools(second.allocation)
                    seen["disjoint"] = not set(first.allocation) & set(second.allocation)
                    with second.placement_group(timeout_s=30):
                        seen["nodes"] = alive()
        finally:
            over.set()
            watcher.join(20)
        service.stop()
        register(tiny_llama(folder / "model", seed=0), "gpt")
        model = {"reference": "models:/gpt/1", "engine": "transformers", "cache_mib": 32}
        app = {"model": model, "placement": {"pool": "a100", "cpus": 1}, "start_timeout_s": LIMIT_S}
        said: list[str] = []
        control.up(parse(ServingConfig, {"gateway": None, "models": [app]}), said.append)
        seen["served"], seen["said"] = alive(), said
    print(json.dumps(seen))


def gang(job: str, pool: str) -> Request:
    """Two workers of one GPU each."""
    return Request(job_id=job, min_workers=2, max_workers=2, pools=(pool,))


def alive() -> list[str]:
    """The pools of the nodes that are up."""
    return sorted(pool_of(node) for node in RayCluster().nodes() if node.alive)


def pools(allocation: dict[str, int]) -> dict[str, int]:
    """Workers by pool."""
    found: dict[str, int] = {}
    by_id = {node.node_id: node for node in RayCluster().nodes()}
    for node, count in allocation.items():
        found[pool_of(by_id[node])] = found.get(pool_of(by_id[node]), 0) + count
    return found


def note_reasons(actor: object, seen: dict[str, object], over: threading.Event) -> None:
    """Remember what each job was told while it waited."""
    while not over.wait(0.2):
        reasons = service.call(actor.look)[3]  # type: ignore[attr-defined]
        for job, reason in reasons.items():
            if "asked for" in reason.text:
                seen[f"{job}_reason"] = reason.text


if __name__ == "__main__":
    main()
