"""Training between and after steps: a run of the training core that starts from the model as it is now."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from modelyard.artifacts import Parent, Registry
from modelyard.artifacts.manifest import MANIFEST_NAME
from modelyard.compression.recipe import Distill, Recovery, Train
from modelyard.compression.teaching import teaching
from modelyard.compression.workspace import Workspace, copy_beside, require_plain
from modelyard.config import parse
from modelyard.tasks import read_task
from modelyard.tasks.compact import StoredLayer
from modelyard.tasks.movement import Movement
from modelyard.tasks.refined import Refined
from modelyard.tasks.saving import write_task

if TYPE_CHECKING:
    from modelyard.training import Run
    from modelyard.training.config import TrainConfig


def check_trainings(work: Workspace, registry: Registry) -> None:
    """Refuse before any work what a step's training would refuse.

    Raises:
        ConfigError: its settings do not fit each other.
        NotFoundError: its teacher is not registered.
    """
    for number, step in enumerate(work.recipe.steps):
        recovery: Recovery | None = getattr(step, "training", None)
        if recovery is None:
            continue
        task = Refined(task=work.task, start=work.source.reference)
        _config(work, recovery, work.name, task, f"steps.{number}")
        teacher = recovery.distillation.teacher if recovery.distillation else None
        if teacher is not None and not Path(teacher).is_dir():
            registry.resolve(teacher, kind="model")


def distill(work: Workspace, step: Distill) -> Workspace:
    """Train the model as it is now on a teacher's answers."""
    require_plain(work, "distill")
    return recover(work, step.training)


def train(work: Workspace, step: Train) -> Workspace:
    """Train the model as it is now."""
    require_plain(work, "train")
    return recover(work, step.training)


def recover(
    work: Workspace,
    recovery: Recovery,
    *,
    keep_zeros: bool = False,
    rounded: Mapping[str, StoredLayer] | None = None,
    movement: Movement | None = None,
) -> Workspace:
    """Train the model as it is now, of whatever shapes, and go on with the result.

    What it starts from and what comes out are registered as `<name>-steps`: workers on other nodes fetch them, and the
    result's family tree shows them.

    Raises:
        TrainingError: the workers failed.
        InputError: the cluster cannot hold them, or the dataset does not fit.
    """
    from modelyard.training import train as run_training

    registry = Registry.from_settings()
    name = f"{work.name}-steps"
    start = _registered(work, registry, name)
    distillation = recovery.distillation
    if distillation is not None and distillation.teacher is None and distillation.gateway is None:
        distillation = distillation.with_changes(teacher=work.source.reference)
    with ExitStack() as stack:
        if distillation is not None:
            distillation = stack.enter_context(teaching(distillation, registry, f"{name}-teacher", recovery.workers))
        task = Refined(
            task=work.task,
            start=start,
            keep_zeros=keep_zeros,
            rounded=dict(rounded or {}),
            movement=movement,
            distillation=distillation,
        )
        run = run_training(_config(work, recovery, name, task))
    return _taken(work, registry, run)


def _config(
    work: Workspace, recovery: Recovery, name: str, task: Refined, source: str = "the training of a step"
) -> TrainConfig:
    from modelyard.training.config import TrainConfig

    return parse(
        TrainConfig,
        {
            "name": name,
            "dataset": work.dataset_version.reference,
            "task": task.model_dump(),
            "seed": work.recipe.seed,
            "workers": recovery.workers.model_dump(),
            "training": {
                "max_steps": recovery.steps,
                "global_batch_size": recovery.global_batch_size,
                "micro_batch_size": recovery.micro_batch_size,
                "zero_stage": recovery.zero_stage,
                "precision": recovery.precision,
                "noise_every_steps": 0,
            },
            "optimizer": recovery.optimizer.model_dump(),
            "schedule": recovery.schedule.model_dump(),
            "validation": {"max_rows": 64, "final_split": "validation"},
        },
        source=source,
    )


def _taken(work: Workspace, registry: Registry, run: Run) -> Workspace:
    """The model of a run, as the result of a step."""
    trained = registry.open(run.model, kind="model")[1]
    folder = work.new_folder("trained")
    for path in sorted(trained.iterdir()):
        if path.is_file() and path.name != MANIFEST_NAME:
            (folder / path.name).write_bytes(path.read_bytes())
    copy_beside(work.folder, folder)
    write_task(folder, work.task, read_task(work.folder)[1])
    figure = work.task.objective[0]
    before, after = run.initial_metrics.get(figure), run.metrics.get(figure)
    change = f", {figure} {before:.4g} -> {after:.4g}" if before is not None and after is not None else ""
    return work.moved(folder, f"{run.steps} steps of training{change}")


def _registered(work: Workspace, registry: Registry, name: str) -> str:
    """Reference of the model as it is now: the source's own, or a new version of `name`."""
    if work.folder == work.source_folder:
        return work.source.reference
    manifest = registry.store.put(
        work.folder,
        kind="model",
        name=name,
        parents=(Parent(reference=work.source.reference, digest=work.source.digest),),
        config={"recipe": work.recipe.model_dump(mode="json")},
    )
    return registry.register(manifest).reference
