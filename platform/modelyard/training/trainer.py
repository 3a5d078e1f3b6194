"""Ray Train's `TorchTrainer` with our scaling and failure policies in place of its own.

`TorchTrainer` offers no argument for them; `_initialize_and_run_controller` is the narrowest place where they can
be given. `tests/training/test_ray_contract.py` fails when a new Ray moves it.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import ray.train
import ray.train.torch
from ray.train.v2.api.result import Result

from modelyard.artifacts import filesystem
from modelyard.cluster import RayCluster
from modelyard.scheduling.placement import NODE_ID_LABEL
from modelyard.training.config import TrainConfig
from modelyard.training.elastic import InterruptAwareFailurePolicy, RoomPolicy, resize_request
from modelyard.training.leased import LeasedNodes, Selectors
from modelyard.training.monitor import is_closing

LEASED_START_TIMEOUT_S = 10.0
"""Longest wait for a leased node: one that is gone does not come back under the same name."""


class _Trainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]
    """Hands the controller the policies it was built with."""

    policies: dict[str, Any]

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        return super()._initialize_and_run_controller(**{**arguments, **self.policies})


def trainer(
    worker: Callable[[dict[str, Any]], Any],
    payload: dict[str, Any],
    config: TrainConfig,
    *,
    monitor: Any,
    storage_uri: str,
    selectors: Selectors | None = None,
) -> ray.train.torch.TorchTrainer:
    """A trainer that runs `worker(payload)` on a gang as `config.workers` describes it.

    Ray Train keeps its own notes below `storage_uri`; what must last is in the run's folder, not there. With
    `selectors` (of a lease) there is one worker for each, on the node it names, and no other number of workers.
    """
    workers, cluster = config.workers, None
    if selectors is not None:
        count = len(selectors)
        workers = workers.with_changes(min=count, max=count, start_timeout_s=LEASED_START_TIMEOUT_S)
        on_nodes = Counter(labels[NODE_ID_LABEL] for labels in selectors)
        cluster = LeasedNodes(RayCluster(), workers.per_worker, dict(on_nodes))
    storage_filesystem, storage_path = filesystem.resolve(storage_uri)
    scaling = ray.train.ScalingConfig(
        num_workers=(workers.min, workers.max) if workers.min < workers.max else workers.max,
        use_gpu=workers.gpus > 0,
        resources_per_worker=workers.per_worker,
        label_selector=[dict(each) for each in selectors] if selectors is not None else workers.selector or None,
    )
    failures = ray.train.FailureConfig(max_failures=config.failures.max_failures)
    result = _Trainer(
        worker,
        train_loop_config=payload,
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if workers.gpus > 0 else "gloo"),
        scaling_config=scaling,
        run_config=ray.train.RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=storage_path,
            storage_filesystem=storage_filesystem,
            failure_config=failures,
        ),
    )
    result.policies = {
        "scaling_policy": RoomPolicy(
            scaling,
            workers,
            resize_request(monitor),
            cluster,
            partial(is_closing, monitor),
            config.training.parallel.size,
        ),
        "failure_policy": InterruptAwareFailurePolicy(failures, is_leased=selectors is not None),
    }
    return result
