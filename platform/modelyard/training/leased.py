"""Training under a lease of the scheduler: on what it gives, until it asks for it back, and then on again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from modelyard.cluster import Cluster, Node, NodeGroup
from modelyard.errors import ConfigError, LeaseLostError
from modelyard.scheduling.client import Lease
from modelyard.scheduling.model import Request
from modelyard.training.config import TrainConfig

logger = logging.getLogger(__name__)

LOOK_S = 0.25
"""Seconds between looks at whether the lease must be given back."""
T = TypeVar("T")
Selectors = Sequence[Mapping[str, str]]
"""Ray label selector of each worker."""


def request_of(config: TrainConfig, job_id: str, now_s: float) -> Request:
    """What a run asks of the scheduler. Progress is counted in optimizer steps."""
    lease, workers = config.lease, config.workers
    assert lease is not None
    pools = lease.pools or ((workers.pool,) if workers.pool else ())
    return Request(
        job_id=job_id,
        tenant=lease.tenant,
        priority=lease.priority,
        min_workers=workers.min,
        max_workers=workers.max,
        resources=workers.per_worker,
        pools=tuple(pools),
        span_pools=lease.span_pools,
        deadline_s=None if lease.deadline_s is None else now_s + lease.deadline_s,
        work=float(config.training.max_steps),
    )


def train_on(lease: Lease, fit: Callable[[Selectors | None], T | None], ask_to_stop: Callable[[str], None]) -> T:
    """Call `fit` on each allocation in turn until it returns a result.

    Args:
        fit: trains on one worker per label selector; None when it stopped at a step boundary to make way. Called
            with None when there is no scheduler.
        ask_to_stop: makes a running `fit` checkpoint and return None; may be called again.

    Raises:
        LeaseLostError: the scheduler took the lease away.
    """
    while True:
        selectors = None if lease.is_local else [labels for _, labels in lease.bundles]
        with watched(lease, ask_to_stop):
            result = fit(selectors)
        if result is not None:
            return result
        if lease.is_lost:
            raise LeaseLostError(
                f"the scheduler took the lease of {lease.request.job_id!r} away", "run the same command to go on"
            )
        logger.warning("giving way: %s", lease.reason or "the workers' nodes are gone")
        lease.give_way()


@contextmanager
def watched(lease: Lease, ask_to_stop: Callable[[str], None]) -> Iterator[None]:
    """While the body runs, call `ask_to_stop` (again and again) once the lease must be given back."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_S):
            if lease.must_yield:
                ask_to_stop(lease.reason or "the lease was lost")
                over.wait(5.0)  # a gang that was just starting had not heard it

    thread = threading.Thread(target=watch, name="lease-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(10.0)


@dataclass(frozen=True)
class LeasedNodes:
    """The cluster as one lease sees it: its nodes, with exactly its workers' room free on each."""

    cluster: Cluster
    resources: Mapping[str, float]
    """Of one worker."""
    workers: Mapping[str, int]
    """Node id to number of workers."""

    def nodes(self) -> tuple[Node, ...]:
        """Those of the lease's nodes that are usable."""
        return tuple(
            Node(
                node.node_id,
                node.total,
                {n: a * self.workers[node.node_id] for n, a in self.resources.items()},
                node.labels,
            )
            for node in self.cluster.nodes()
            if node.is_usable and node.node_id in self.workers
        )

    def node_groups(self) -> tuple[NodeGroup, ...]:
        """A lease does not grow by itself."""
        return ()


def check_lease(config: TrainConfig) -> None:
    """Refuse a lease that contradicts the workers' own placement.

    Raises:
        ConfigError: `workers.pool` is not among `lease.pools`.
    """
    lease, pool = config.lease, config.workers.pool
    if lease is not None and pool and lease.pools and pool not in lease.pools:
        raise ConfigError(f"workers.pool={pool!r} is not among lease.pools={list(lease.pools)}", "drop one of the two")
