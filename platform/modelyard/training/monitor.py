"""How a run is watched and steered while it goes on, beside Ray Train's own `report`, which blocks every worker.

Worker 0 hands its records to a `Reporter` thread, that pushes them to the run's monitor actor; the driver pulls
them from there. Wishes (stop, resize) travel back on the same call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

logger = logging.getLogger(__name__)

NAMESPACE = "modelyard"
_CALL_TIMEOUT_S = 30.0
Wish = Literal["resize", "stop"]
Record = dict[str, Any]


class RunMonitor:
    """The actor in the middle: keeps records until the driver has them, and wishes until the workers have them."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._wish: tuple[Wish, str] | None = None
        self._closing = False

    def push(self, records: list[Record]) -> tuple[Wish, str] | None:
        """Called by worker 0. Takes records, returns the wish that is waiting, if any."""
        self._records.extend(records)
        return self._wish

    def pull(self, after: int) -> list[Record]:
        """Called by the driver: the records from number `after` on."""
        return self._records[after:]

    def request(self, wish: Wish, reason: str) -> None:
        """Ask the workers to checkpoint and stop; a later wish replaces an earlier one, but never a `stop`."""
        if self._wish is None or self._wish[0] != "stop":
            self._wish = (wish, reason)

    def close(self, reason: str) -> None:
        """The driver leaves: ask the workers to checkpoint and stop, and let no other gang start."""
        self._closing = True
        self.request("resize", reason)

    def is_closing(self) -> bool:
        """Whether the driver leaves."""
        return self._closing

    def started(self) -> None:
        """A new gang runs: a wish to resize has been fulfilled."""
        if self._wish is not None and self._wish[0] == "resize":
            self._wish = None

    def ping(self) -> None:
        """Answers once the actor is up."""


def start_monitor(run_id: str) -> Any:
    """The monitor actor of a run, on the driver's node: it has to outlive the workers' nodes, not the driver's.

    Its name keeps a second driver of the same run out of this cluster.

    Raises:
        ValueError: a monitor of that name is alive.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=0)(RunMonitor)
    return actor.options(name=f"run-{run_id}", namespace=NAMESPACE, scheduling_strategy=here).remote()


def stop_request(monitor: Any) -> Callable[[str], None]:
    """A callback that asks the run's workers to checkpoint and leave at a step boundary, for another gang."""

    def ask(reason: str) -> None:
        try:
            ray.get(monitor.request.remote("resize", reason), timeout=_CALL_TIMEOUT_S)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            logger.warning("the run's monitor did not take the wish to make way; trying again", exc_info=True)

    return ask


def is_closing(monitor: Any) -> bool:
    """Whether the run's driver leaves, or is gone and its monitor with it."""
    try:
        return bool(ray.get(monitor.is_closing.remote(), timeout=_CALL_TIMEOUT_S))
    except ray.exceptions.GetTimeoutError:
        return False
    except ray.exceptions.RayActorError:
        return True


class Reporter:
    """Worker 0's thread that pushes records about twice a second. Never blocks the training loop.

    `wish` is what the driver or the scaling policy last asked for. A monitor out of reach costs records on the
    screen, not the run.
    """

    def __init__(self, monitor: Any, interval_s: float = 0.5) -> None:
        self._monitor = monitor
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._queue: list[Record] = []
        self._closing = threading.Event()
        self.wish: tuple[Wish, str] | None = None
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        """Queue one record with its Unix time, e.g. `record("step", {"step": 3, "loss": 2.1})`."""
        with self._lock:
            self._queue.append({"kind": kind, "time_s": time.time(), **values})

    def at_boundary(self, step: int) -> None:
        """Called by the loop after each step, once what is due there (validation, checkpoint) has been done."""

    def close(self) -> None:
        """Push what is left and stop."""
        self._closing.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        # Before the first push, which would else bring back the wish that ended the gang before this one.
        self._call(self._monitor.started)
        while not self._closing.wait(self._interval_s):
            self._push()
        self._push()

    def _push(self) -> None:
        with self._lock:
            batch, self._queue = self._queue, []
        answered, wish = self._call(self._monitor.push, batch)
        if answered:
            self.wish = wish
        else:
            logger.warning("the run's monitor does not answer; %d records were not shown", len(batch))

    def _call(self, method: Any, *arguments: Any) -> tuple[bool, Any]:
        try:
            return True, ray.get(method.remote(*arguments), timeout=_CALL_TIMEOUT_S)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            return False, None
