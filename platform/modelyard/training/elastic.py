"""How a run follows its cluster: how many workers to start, when to resize, which failures to retry.

The decisions are pure functions over `Node` values. The two classes below hand them to Ray Train 2.60's
controller. They replace its elastic policy, which (measured on 2.60) ignores label selectors when it counts room
for workers and restarts on a resource view up to 20 s old, so that a lost node costs a 60 s wait for a placement
group that can never be. The hooks are private to Ray, hence the exact version pin and
`tests/training/test_ray_contract.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.scaling_policy import ScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from modelyard.cluster import Cluster, Node, RayCluster
from modelyard.errors import CapacityError, DivergedError, InputError, IntegrityError, TrainingError, WaitTimeoutError
from modelyard.scheduling.growth import launchable
from modelyard.training.config import Workers
from modelyard.training.interrupts import Interrupted, original_error
from modelyard.training.monitor import stop_request


def room(nodes: Sequence[Node], workers: Workers, held: Mapping[str, int], group: int = 1) -> int:
    """Workers that could run now: free room on usable matching nodes plus `held` (node id -> own workers there).

    Capped at `workers.max`, and a whole number of groups of `group` workers.
    """
    total = 0
    for node in nodes:
        if node.is_usable and node.matches(workers.selector):
            total += node.fits(workers.per_worker) + held.get(node.node_id, 0)
    total = min(total, workers.max)
    return total - total % group


def check_capacity(cluster: Cluster, workers: Workers) -> None:
    """Refuse a gang that the cluster can never hold, however idle and however far its autoscaler goes.

    Raises:
        CapacityError: with what one worker needs and what each matching node has.
    """
    nodes = [node for node in cluster.nodes() if node.alive]
    nodes += launchable(nodes, cluster.node_groups(), workers.min)
    matching = [node for node in nodes if node.matches(workers.selector)]
    fitting = sum(node.fits(workers.per_worker, among=node.total) for node in matching)
    if fitting >= workers.min:
        return
    need = _shown(workers.per_worker, workers.per_worker)
    if workers.selector and not matching:
        labels = sorted({f"{key}={value}" for node in nodes for key, value in node.labels.items()})
        raise CapacityError(
            f"no node matches the workers' label selector {workers.selector}",
            f"labels in this cluster: {', '.join(labels) or 'none'}",
        )
    has = "; ".join(_shown(node.total, workers.per_worker) for node in matching) or "nothing"
    raise CapacityError(
        f"workers.min={workers.min} workers of {need} each do not fit: room for {fitting} on {len(matching)} "
        f"matching node(s) with {has}",
        f"set workers to at most {fitting}" if fitting else f"ask for less than {need} per worker, or add nodes",
    )


def _shown(resources: Mapping[str, float], asked: Mapping[str, float]) -> str:
    """`4 CPU, 1 GPU`; what every node has by itself (memory, its own name) only when it was asked for."""
    by_itself = ("node:", "memory", "object_store_memory")
    shown = {k: v for k, v in resources.items() if k in asked or not k.startswith(by_itself)}
    return ", ".join(_amount(name, shown[name]) for name in sorted(shown)) or "no resources"


def _amount(name: str, amount: float) -> str:
    return f"{amount / (1 << 30):.3g} GiB {name}" if name.endswith("memory") else f"{amount:g} {name}"


class RoomPolicy(ScalingPolicy):  # type: ignore[misc]
    """Starts as many workers as there is room for, within min..max, and asks to grow at a step boundary.

    Growing never kills a step in flight: `request_resize` tells the workers, which checkpoint, stop with
    `Interrupted`, and are started again by the failure policy with the new number.
    """

    def __init__(
        self,
        scaling_config: ScalingConfig,
        workers: Workers,
        request_resize: Callable[[int], None],
        cluster: Cluster | None = None,
        is_closing: Callable[[], bool] = lambda: False,
        group: int = 1,
    ) -> None:
        """`group`: workers that hold one model together; only whole groups are started."""
        super().__init__(scaling_config)
        self._workers = workers
        self._need = _shown(workers.per_worker, workers.per_worker)
        self._request_resize = request_resize
        self._cluster = cluster or RayCluster()
        self._is_closing = is_closing
        self._group = group
        self._held: dict[str, int] = {}
        self._waiting_since: float | None = None
        self._looked_at = time.monotonic()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start with whatever fits; wait (up to `workers.start_timeout_s`) while that is below the minimum."""
        if self._is_closing():
            raise TrainingError("the run's driver leaves", "the same command continues at the newest checkpoint")
        self._maybe_send_resource_request()
        fitting = room(self._cluster.nodes(), self._workers, self._held, self._group)
        now = time.monotonic()
        if fitting < self._workers.min:
            self._waiting_since = self._waiting_since or now
            if now - self._waiting_since > self._workers.start_timeout_s:
                raise WaitTimeoutError(
                    f"room for {self._workers.min} workers of {self._need} (there is room for {fitting})",
                    self._workers.start_timeout_s,
                    "workers.start_timeout_s",
                )
            time.sleep(0.2)  # this loop of Ray's has no pause of its own
            return NoopDecision()
        # The old group's placement group goes as soon as this decision is carried out.
        self._held, self._waiting_since, self._looked_at = {}, None, now
        return self._resize(fitting)

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Every `workers.resize_interval_s`, ask the workers to make way for a larger group if it would fit."""
        self._maybe_send_resource_request()
        self._held = {}
        for worker in worker_group_state.workers:
            self._held[worker.metadata.node_id] = self._held.get(worker.metadata.node_id, 0) + 1
        now = time.monotonic()
        current = worker_group_state.num_workers
        if current < self._workers.max and now - self._looked_at >= self._workers.resize_interval_s:
            self._looked_at = now
            fitting = room(self._cluster.nodes(), self._workers, self._held, self._group)
            if fitting > current:
                self._request_resize(fitting)
        return NoopDecision()

    def _get_num_workers_for_resource_request(self) -> int:
        return self._workers.max

    def _resize(self, num_workers: int) -> ResizeDecision:
        return ResizeDecision(num_workers=num_workers, resources_per_worker=self._workers.per_worker)


class InterruptAwareFailurePolicy(DefaultFailurePolicy):  # type: ignore[misc]
    """Retries interruptions for free and never retries what a retry cannot change."""

    def __init__(self, failure_config: FailureConfig, *, is_leased: bool = False) -> None:
        """With a lease an interruption ends the attempt: the driver gives the lease back and asks for another."""
        super().__init__(failure_config)
        self._interruption = FailureDecision.RAISE if is_leased else FailureDecision.RETRY

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """RETRY after an `Interrupted` (RAISE with a lease), RAISE on what no retry changes, else Ray's own budgets."""
        if isinstance(training_failed_error, WorkerGroupError):
            causes = [original_error(error) for error in training_failed_error.worker_failures.values()]
            if any(isinstance(cause, Interrupted) for cause in causes):
                return self._interruption
            if any(isinstance(cause, InputError | IntegrityError | DivergedError) for cause in causes):
                return FailureDecision.RAISE
        decision: FailureDecision = super().make_decision(training_failed_error)
        return decision


def resize_request(monitor: Any) -> Callable[[int], None]:
    """A callback for `RoomPolicy` that leaves the wish with the run's monitor actor, where the workers see it."""
    ask = stop_request(monitor)
    return lambda num_workers: ask(f"room for {num_workers} workers")
