"""The private parts of Ray that Modelyard hooks are where it expects them.

Each failure says which file to adapt after an upgrade of Ray (the version is pinned in pyproject.toml).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from ray._private import state
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution import context
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.preemption import PreemptionContext
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.scaling_policy import ScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroupState
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.train.v2.api.result import Result
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial

from modelyard.training.elastic import RoomPolicy


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def fields(kind: type) -> list[str]:
    return list(getattr(kind, "__dataclass_fields__", {}))


def test_the_trainer_still_hands_its_policies_to_one_method_by_keyword() -> None:
    method = inspect.signature(TorchTrainer._initialize_and_run_controller).parameters
    kinds = [parameter.kind for name, parameter in method.items() if name != "self"]
    says = "adapt training/trainer.py: TorchTrainer._initialize_and_run_controller(**arguments) has changed"
    assert kinds == [inspect.Parameter.VAR_KEYWORD], says
    body = inspect.getsource(TorchTrainer.fit)
    for keyword in ("scaling_policy=", "failure_policy="):
        assert keyword in body, f"adapt training/trainer.py: fit() no longer passes {keyword} to the controller"
    for keyword in ("scaling_policy", "failure_policy"):
        assert keyword in parameters(TrainController.__init__), (
            f"adapt training/trainer.py: TrainController takes no {keyword}"
        )


def test_a_scaling_policy_still_has_these_three_abstract_methods() -> None:
    expected = {
        "make_decision_for_non_running_worker_group": [],
        "make_decision_for_running_worker_group": ["worker_group_state", "worker_group_status"],
        "_get_num_workers_for_resource_request": [],
    }
    says = "adapt training/elastic.py: RoomPolicy implements other methods than ScalingPolicy asks for"
    assert set(ScalingPolicy.__abstractmethods__) == set(expected), says
    for name, arguments in expected.items():
        assert parameters(getattr(ScalingPolicy, name)) == arguments, f"{says} ({name})"
    assert not RoomPolicy.__abstractmethods__, says


def test_scaling_decisions_and_the_state_they_are_made_from_have_the_fields_we_use() -> None:
    says = "adapt training/elastic.py: "
    assert fields(ResizeDecision) == ["num_workers", "resources_per_worker"], says + "ResizeDecision has changed"
    assert fields(NoopDecision) == [], says + "NoopDecision has changed"
    assert "workers" in fields(WorkerGroupState), says + "WorkerGroupState.workers is gone"
    assert hasattr(WorkerGroupState, "num_workers"), says + "WorkerGroupState.num_workers is gone"
    from ray.train.v2._internal.execution.worker_group.worker import ActorMetadata, Worker

    assert "node_id" in fields(ActorMetadata), says + "ActorMetadata.node_id is gone"
    has_metadata = "metadata" in fields(Worker) or hasattr(Worker, "metadata")
    assert has_metadata or "self.metadata" in inspect.getsource(Worker.__init__), says + "Worker.metadata is gone"


def test_the_scaling_policy_base_class_still_sends_resource_requests() -> None:
    says = "adapt training/elastic.py: ScalingPolicy._maybe_send_resource_request() has changed"
    assert parameters(ScalingPolicy._maybe_send_resource_request) == [], says
    assert parameters(ScalingPolicy.__init__) == ["scaling_config"], says


def test_a_failure_policy_still_decides_on_one_error() -> None:
    says = "adapt training/elastic.py: DefaultFailurePolicy has changed"
    assert parameters(DefaultFailurePolicy.make_decision) == ["training_failed_error"], says
    assert parameters(DefaultFailurePolicy.__init__) == ["failure_config"], says
    assert issubclass(DefaultFailurePolicy, FailurePolicy), says
    assert {"RETRY", "RAISE"} <= {decision.name for decision in FailureDecision}, says


def test_worker_failures_are_still_told_by_rank_and_controller_failures_by_their_cause() -> None:
    cause = ValueError("x")
    assert WorkerGroupError("it failed", {3: cause}).worker_failures == {3: cause}, (
        "adapt training/launch.py and training/elastic.py: WorkerGroupError.worker_failures is gone"
    )
    assert ControllerError(cause).controller_failure is cause, (
        "adapt training/launch.py: ControllerError.controller_failure is gone"
    )


def test_rays_wrappers_still_keep_the_original_error_where_we_look_for_it() -> None:
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

    from modelyard.training.interrupts import original_error

    says = "adapt training/interrupts.py: original_error looks at other attributes than Ray has"
    inner = KeyError("step")
    assert original_error(UserExceptionWithTraceback(inner, "traceback")) is inner, says
    assert original_error(WorkerHealthCheckFailedError("gone", failure=inner)) is inner, says
    from ray.exceptions import RayTaskError

    assert original_error(RayTaskError("f", "traceback", inner)) is inner, says


def test_a_worker_still_sees_preemptions_in_its_train_context() -> None:
    says = "adapt training/worker.py: _is_preempted reads get_train_context().preemption_context.preemption_info"
    assert callable(context.get_train_context), says
    assert "preemption_context" in fields(context.TrainContext), says
    assert "preemption_info" in fields(PreemptionContext) or hasattr(PreemptionContext, "preemption_info"), says


def test_a_result_still_carries_what_worker_0_returned() -> None:
    assert "return_value" in fields(Result), "adapt training/launch.py: Result.return_value is gone"


def test_ray_train_still_has_the_settings_we_tighten() -> None:
    from ray.train.v2._internal import constants

    known = {value for value in vars(constants).values() if isinstance(value, str)}
    for name in (
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
    ):
        assert name in known, f"adapt training/launch.py: Ray Train has no setting {name} any more"


def test_the_budget_of_failures_is_still_called_max_failures() -> None:
    assert FailureConfig(max_failures=2).max_failures == 2, "adapt training/trainer.py: FailureConfig has changed"


@pytest.mark.parametrize("name", ["get_draining_nodes", "get_cluster_config"])
def test_rays_cluster_state_still_answers_without_arguments(name: str) -> None:
    assert parameters(getattr(state.state, name)) == [], (
        f"adapt cluster.py: ray._private.state.state.{name} has changed"
    )


def test_free_resources_are_still_told_per_node() -> None:
    says = "adapt cluster.py: ray._private.state.available_resources_per_node() has changed"
    assert parameters(state.available_resources_per_node) == [], says


@pytest.mark.ray
def test_rays_cluster_state_still_has_the_shape_we_read(ray_cluster: str) -> None:
    import ray

    (entry,) = ray.nodes()
    for key in ("NodeID", "Resources", "Labels", "Alive"):
        assert key in entry, f"adapt cluster.py: ray.nodes() tells no {key}"
    free = state.available_resources_per_node()
    assert entry["NodeID"] in free, "adapt cluster.py: free resources are not told by the hex id of a node"
    assert state.state.get_draining_nodes() == {}, "adapt cluster.py: get_draining_nodes() is no dict of node ids"


def test_a_trial_of_tune_still_names_the_actor_that_runs_it() -> None:
    says = "adapt tuning/recorder.py: a trial's actor is no longer trial.temporary_state.ray_actor"
    assert Trial("any", stub=True).temporary_state.ray_actor is None, says
    assert "on_experiment_end" in inspect.getsource(TuneController.end_experiment_callbacks), (
        "adapt tuning/recorder.py: the callback hears no longer of the end of the study"
    )
