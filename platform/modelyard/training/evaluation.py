"""Measure a registered model on held-out rows, with confidence intervals, and record the figures on its version."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from modelyard.artifacts import Registry, VersionInfo
from modelyard.config import Config
from modelyard.data.dataset import Dataset
from modelyard.errors import DataError
from modelyard.tasks import Task, load_model, read_task
from modelyard.tasks.classification_metrics import Score
from modelyard.training.bootstrap import Interval, Stats, bootstrap

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
"""Called with (rows done, rows in all) after each batch."""


class EvaluateConfig(Config):
    """One evaluation: which model, on which rows, and how sure."""

    model: str
    """Reference of the model, e.g. `models:/tiny-gpt/3`."""
    dataset: str
    """Reference of the dataset, e.g. `datasets:/pydocs/1`."""
    split: str = "test"
    """Split to measure on; all of its rows are used."""
    batch_size: int = Field(default=16, gt=0)
    """Rows in one forward pass; changes speed and memory, not the result."""
    bootstrap_samples: int = Field(default=1000, ge=0)
    """Resamples behind the confidence intervals; 0 leaves the intervals out."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Confidence of the intervals."""
    seed: int = 0
    """Seed of the resamples."""


class ClassRow(NamedTuple):
    """One line of the per-class table."""

    name: str
    score: Score


@dataclass(frozen=True)
class EvaluationResult:
    """What a model scored on a split."""

    model: VersionInfo
    dataset: VersionInfo
    split: str
    num_rows: int
    objective: tuple[str, Literal["min", "max"]]
    """Deciding metric and its better direction."""
    metrics: dict[str, Interval]
    classes: tuple[ClassRow, ...]
    """Per class, for classifiers; else empty."""
    confidence: float


class Plan(NamedTuple):
    """How to measure: the numbers of an `EvaluateConfig` that both models of a comparison share."""

    split: str
    batch_size: int
    samples: int
    confidence: float
    seed: int


def evaluate(
    model_ref: str,
    dataset_ref: str,
    *,
    split: str = "test",
    batch_size: int = 16,
    registry: Registry | None = None,
    bootstrap_samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> EvaluationResult:
    """Measure a registered model on every row of a split, in this process, and record the figures on its version.

    Recorded as `<split>/<metric>`, `<split>/<metric>_low`, `<split>/<metric>_high`, `<split>/rows`, and
    `<split>/dataset_digest`: the first 48 bits of the dataset's digest as a whole number.

    Raises:
        NotFoundError: a reference names nothing.
        DataError: the dataset has no such split, or is not one the model can read.
        IntegrityError, StorageError: an artifact is damaged or cannot be reached.
    """
    registry = registry or Registry.from_settings()
    plan = Plan(split, batch_size, bootstrap_samples, confidence, seed)
    subject = Subject.open(registry, model_ref)
    version, dataset = open_dataset(registry, dataset_ref)
    stats = subject.score(dataset, split, batch_size, on_progress)
    result = summarize(subject, (version, dataset), stats, plan)
    record(registry, result)
    return result


@dataclass(frozen=True)
class Subject:
    """A registered model, opened to be measured."""

    version: VersionInfo
    folder: Path
    task: Task

    @classmethod
    def open(cls, registry: Registry, ref: str) -> Subject:
        """Fetch and verify the model; its weights are loaded only by `score`.

        Raises:
            NotFoundError, IntegrityError, StorageError: as for `Registry.open` and `read_task`.
        """
        version, folder = registry.open(ref, kind="model")
        return cls(version, folder, read_task(folder)[0])

    def require_fit(self, dataset: Dataset) -> None:
        """Refuse a dataset this model cannot read, before anything is loaded.

        Raises:
            DataError: what does not fit is named.
        """
        trained = read_task(self.folder)[1]
        try:
            self.task.check_saved(self.folder, trained, dataset.info, dataset.folder)
        except DataError as error:
            raise DataError(f"{self.version.reference}: {error.problem}", error.todo) from error

    def score(self, dataset: Dataset, split: str, batch_size: int, on_progress: OnProgress | None = None) -> Stats:
        """Statistics (n, ...) of every row of a split, in the order of the rows.

        Raises:
            DataError: the dataset does not fit, or has no such split.
        """
        import torch

        self.require_fit(dataset)
        rows = dataset.split(split)
        further = self.task.row_statistics(self.folder)
        model = load_model(self.folder)[1]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = model.to(device).eval()
        parts: list[dict[str, np.ndarray]] = []
        with torch.inference_mode():
            for start in range(0, rows.num_rows, batch_size):
                stop = min(start + batch_size, rows.num_rows)
                batch = rows.read(np.arange(start, stop, dtype=np.int64))
                found = self.task.statistics(model, self.task.collate(batch, device))
                parts.append({name: value.cpu().numpy() for name, value in found.items()} | further(batch))
                if on_progress is not None:
                    on_progress(stop, rows.num_rows)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def open_dataset(registry: Registry, ref: str) -> tuple[VersionInfo, Dataset]:
    """A registered dataset, verified and mapped.

    Raises:
        NotFoundError, IntegrityError, StorageError, DataError: as for `Registry.open` and `Dataset.open`.
    """
    version, folder = registry.open(ref, kind="dataset")
    return version, Dataset.open(folder)


def summarize(subject: Subject, data: tuple[VersionInfo, Dataset], stats: Stats, plan: Plan) -> EvaluationResult:
    """Metrics with intervals, and the per-class table of a classifier, from the statistics of all rows."""
    version, dataset = data
    metrics = bootstrap(subject.task.metrics, stats, samples=plan.samples, confidence=plan.confidence, seed=plan.seed)
    classes = tuple(ClassRow(name, score) for name, score in subject.task.class_table(stats, dataset.info))
    return EvaluationResult(
        model=subject.version,
        dataset=version,
        split=plan.split,
        num_rows=len(next(iter(stats.values()))),
        objective=subject.task.objective,
        metrics=metrics,
        classes=classes,
        confidence=plan.confidence,
    )


def record(registry: Registry, result: EvaluationResult) -> None:
    """Write the figures of a result onto the model's version; figures that are not finite are left out."""
    figures: dict[str, float] = {
        "rows": result.num_rows,
        "dataset_digest": int(result.dataset.digest.removeprefix("sha256:")[:12], 16),  # 48 bits: exact as a float
    }
    for name, interval in result.metrics.items():
        figures |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    finite = {f"{result.split}/{name}": value for name, value in figures.items() if math.isfinite(value)}
    if len(finite) < len(figures):
        logger.warning("%s: some metrics are not finite and were not recorded", result.model.reference)
    registry.log_metrics(result.model.reference, finite)
