"""Model in, model out: run a recipe's steps, measure, judge, register."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from modelyard.artifacts import Manifest, Parent, Registry, VersionInfo
from modelyard.artifacts.manifest import MANIFEST_NAME
from modelyard.compression.engines import folder_bytes, prepare
from modelyard.compression.export import check_published
from modelyard.compression.measuring import Request, best_speed, check_threads, measure
from modelyard.compression.preflight import check_recipe, formats
from modelyard.compression.recipe import Recipe
from modelyard.compression.recovery import check_trainings
from modelyard.compression.report import Report, broken_limits, draw
from modelyard.compression.silence import errors_only
from modelyard.compression.source import check_source
from modelyard.compression.steps import run_step
from modelyard.compression.workspace import Workspace, with_compact
from modelyard.config import load, settings
from modelyard.data.dataset import Dataset
from modelyard.errors import ConfigError, DataError, LimitError
from modelyard.tasks import read_task
from modelyard.training.interrupts import terminated_as_interrupted

_UNITS: dict[str, Literal["token", "image", "text"]] = {
    "tokens": "token",
    "images": "image",
    "labelled_text": "text",
    "tagged_text": "text",
}
_SCRATCH = "modelyard-compression-"
_TARGETS = {"onnx": "onnx", "openvino": "openvino", "gguf": "llamacpp"}
"""The engine that measures an export; none does a `torch.export` program."""
OnStep = Callable[[str], None]
"""Called with a line before and after each step."""


@dataclass(frozen=True)
class Compressed:
    """A registered result."""

    model: str
    """Reference of the new version, e.g. `models:/tiny-gpt-int8/1`."""
    digest: str
    report: Report
    notes: tuple[str, ...]
    """What each step did."""
    picture: Path
    """The report as PNG."""


def compress(model: str, recipe: Recipe | str | Path, *overrides: str, on_step: OnStep | None = None) -> Compressed:
    """Compress a registered model as a recipe says and register the result, when it holds the recipe's limits.

    SIGTERM ends it as Ctrl-C does.

    Args:
        model: reference of the model, e.g. `models:/tiny-gpt@production`.
        recipe: a `Recipe` or the path of its YAML file.
        overrides: dotted settings, e.g. `"target.threads=2"`; only with a path.
        on_step: called with a line of text before and after each step.

    Raises:
        InputError: recipe, model and dataset do not fit, or an extra is not installed.
        LimitError: the result is worse than the recipe allows; the error names every limit that does not hold.
        IntegrityError: an export, or what was published, computes something else than the model.
        TrainingError, StorageError: as for `train` and `Store.put`.
    """
    if not isinstance(recipe, Recipe):
        recipe = load(Recipe, recipe, overrides)
    elif overrides:
        raise ConfigError("overrides go with the path of a recipe file", "use recipe.with_changes(...)")
    with terminated_as_interrupted(), scratch_folder() as scratch:
        registry = Registry.from_settings()
        work, report = apply(registry, model, recipe, scratch, on_step=on_step)
        _require_limits(report, recipe)
        with errors_only():
            return _registered(registry, work, report)


def apply(
    registry: Registry,
    model: str,
    recipe: Recipe,
    scratch: Path,
    *,
    on_step: OnStep | None = None,
) -> tuple[Workspace, Report]:
    """Run a recipe and measure what it makes, below `scratch`; judges and registers nothing.

    The speed of the source and of the result is measured twice, see `compression.measuring`.

    Raises:
        InputError, TrainingError, StorageError: as for `compress`.
    """
    tell = on_step or (lambda line: None)
    check_threads(recipe.target.threads)
    work = _begin(registry, model, recipe, scratch)
    tell(f"measure {work.source.reference} on torch")
    timeout_s = recipe.measuring.timeout_s
    source = _request(work, work.source_folder, "torch")
    before = measure(source, timeout_s)
    for number, step in enumerate(recipe.steps, 1):
        tell(f"step {number}/{len(recipe.steps)} {step.kind}")
        with errors_only():
            work = run_step(work, step)
        tell(f"  {work.notes[-1]}")
    tell(f"measure the result on {recipe.target.engine}")
    result = _request(work, work.folder, recipe.target.engine)
    after = measure(result, timeout_s)
    tell("measure the speed of both once more")
    before = best_speed(before, measure(replace(source, speed_only=True), timeout_s))
    after = best_speed(after, measure(replace(result, speed_only=True), timeout_s))
    unit: Literal["token", "image", "text"] = _UNITS[work.dataset.info.format]
    return work, Report(
        work.task.objective,
        before,
        after,
        unit,
        remarks(recipe),
        source_codes=_codes(work.source_folder),
        stored_bytes=(_stored_bytes(work.source_folder), _stored_bytes(work.folder)),
    )


def remarks(recipe: Recipe) -> tuple[str, ...]:
    """What the figures of a recipe's result do not show by themselves. Pure."""
    engine = recipe.target.engine
    found = []
    if pruned := [step for step in recipe.steps if step.kind == "prune"]:
        kernels = "; GPUs since Ampere multiply 2:4 faster" if any(step.pattern == "2:4" for step in pruned) else ""
        found.append(f"zeros are stored and multiplied on {engine} like other weights: no speed, no size{kernels}")
    if engine == "llamacpp":
        found.append("quality is that of the weights on torch: llama.cpp does not give the scores of all tokens")
    exported = formats(recipe)
    for form in sorted(set(exported) - _measured(recipe)):
        how = f"`--target.engine={_TARGETS[form]}` measures it" if form in _TARGETS else "no target.engine runs it"
        found.append(f"the {form} export was compared with the model but is not what was measured on {engine}; {how}")
    return tuple(found)


def _measured(recipe: Recipe) -> set[str]:
    """The exports that the target reads: OpenVINO takes a GGUF file where there is no IR."""
    engine, exported = recipe.target.engine, formats(recipe)
    if engine == "openvino" and "openvino" not in exported:
        return {"gguf"}
    return {form for form, target in _TARGETS.items() if target == engine}


def _begin(registry: Registry, model: str, recipe: Recipe, scratch: Path) -> Workspace:
    """Everything that can be refused is refused here."""
    source, folder = registry.open(model, kind="model")
    version, dataset_folder = registry.open(recipe.dataset, kind="dataset")
    dataset = Dataset.open(dataset_folder)
    task, trained = read_task(folder)
    try:
        task.check_saved(folder, trained, dataset.info, dataset.folder)
    except DataError as error:
        raise DataError(f"{source.reference}: {error.problem}", error.todo) from error
    check_recipe(recipe, task.kind, task.objective)
    parents = [each.reference for each in registry.store.manifest("model", source.digest).parents]
    original = next((reference for reference in parents if reference.startswith("models:")), "a plain model")
    check_source(recipe, task.kind, folder, source.reference, original)
    dataset.split(recipe.split)
    dataset.split(recipe.calibration_split)
    work = Workspace(
        recipe=recipe,
        source=source,
        source_folder=folder,
        folder=folder,
        dataset=dataset,
        dataset_version=version,
        scratch=scratch,
        name=recipe.name or f"{source.name}-compressed",
    )
    check_trainings(work, registry)
    return work


def _request(work: Workspace, folder: Path, engine: Any) -> Request:
    recipe = work.recipe
    prepared = prepare(engine, folder, work.new_folder("engine"))
    return Request(
        folder=str(folder),
        engine=engine,
        threads=recipe.target.threads,
        dataset=str(work.dataset.folder),
        split=recipe.split,
        measuring=recipe.measuring.model_dump(mode="json"),
        prepared=str(prepared) if prepared is not None else None,
        quality_engine="torch" if engine == "llamacpp" else None,
    )


def _stored_bytes(folder: Path) -> int:
    return folder_bytes(path for path in folder.rglob("*") if path.name != MANIFEST_NAME)


def _codes(folder: Path) -> str:
    return " and ".join(sorted({layer.codes for layer in with_compact(folder).quantized.values()}))


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder, removed at the end; what processes left that were killed is removed at the beginning.

    Its lock is gone with its process. It gets its name when it is locked, so that nobody takes it for left over.
    """
    for old in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        _remove_unlocked(old)
    unnamed = Path(tempfile.mkdtemp(prefix="modelyard-new-"))
    lock = os.open(unnamed, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = unnamed.rename(unnamed.with_name(_SCRATCH + unnamed.name.rpartition("-")[2]))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _remove_unlocked(folder: Path) -> None:
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:  # another user's, or just removed
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # its process lives
        pass
    finally:
        os.close(lock)


def _require_limits(report: Report, recipe: Recipe) -> None:
    if broken := broken_limits(report, recipe.limits):
        table = "\n  ".join(report.lines())
        raise LimitError(
            f"not registered, {len(broken)} of the recipe's limits do not hold:\n  "
            + "\n  ".join(broken)
            + f"\n  {table}",
            "make the recipe gentler (or give it recovery training), or widen the limits",
        )


def _registered(registry: Registry, work: Workspace, report: Report) -> Compressed:
    folder = work.folder
    if folder == work.source_folder:
        folder = work.new_folder("same")
        shutil.copytree(work.source_folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
    manifest: Manifest = registry.store.put(
        folder,
        kind="model",
        name=work.name,
        parents=tuple(_parent(version) for version in (work.source, work.dataset_version)),
        metrics=report.metrics(),
        config={
            "recipe": work.recipe.model_dump(mode="json"),
            "steps": list(work.notes),
            "report": report.as_dict(),
        },
    )
    check_published(work, registry.store.open("model", manifest.digest()))
    version = registry.register(manifest)
    picture = settings().home / "compressions" / f"{version.name}-{version.version}" / "report.png"
    draw(report, picture, title=f"{work.source.reference} -> {version.reference}")
    return Compressed(version.reference, version.digest, report, work.notes, picture)


def _parent(version: VersionInfo) -> Parent:
    return Parent(reference=version.reference, digest=version.digest)
