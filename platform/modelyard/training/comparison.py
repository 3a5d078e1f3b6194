"""Compare two registered models on the same rows: is one better, or is it chance?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from modelyard.artifacts import Registry
from modelyard.errors import DataError, InputError
from modelyard.training.bootstrap import Interval, paired_bootstrap
from modelyard.training.evaluation import (
    EvaluationResult,
    OnProgress,
    Plan,
    Subject,
    open_dataset,
    record,
    summarize,
)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same rows."""

    first: EvaluationResult
    second: EvaluationResult
    differences: dict[str, Interval]
    """Metric of the first minus metric of the second, with its paired interval."""

    @property
    def better(self) -> Literal["first", "second"] | None:
        """The model that is better by the deciding metric; None when the difference may be chance.

        That is when its interval holds 0, and always without resamples.
        """
        metric, direction = self.first.objective
        difference = self.differences[metric]
        if not all(map(math.isfinite, difference)) or difference.holds(0.0) or difference.low == difference.high:
            return None
        return "first" if (difference.value < 0) == (direction == "min") else "second"


def compare(
    first_ref: str,
    second_ref: str,
    dataset_ref: str | None = None,
    *,
    split: str = "test",
    batch_size: int = 16,
    registry: Registry | None = None,
    bootstrap_samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Comparison:
    """Measure two models on every row of a split, record both, and give an interval of their difference.

    Args:
        dataset_ref: default: the dataset both were trained on, when it is the same one.

    Raises:
        InputError: they cannot be compared: other tasks, other tokenizers or classes, or no common dataset.
        NotFoundError, IntegrityError, StorageError: as for `evaluate`.
    """
    registry = registry or Registry.from_settings()
    plan = Plan(split, batch_size, bootstrap_samples, confidence, seed)
    subjects = Subject.open(registry, first_ref), Subject.open(registry, second_ref)
    _require_one_task(*subjects)
    data = open_dataset(registry, dataset_ref or _common_dataset(registry, *subjects))
    for subject in subjects:
        try:
            subject.require_fit(data[1])
        except DataError as error:
            raise _incomparable(subjects, split, error) from error
    stats = [subject.score(data[1], split, batch_size, on_progress) for subject in subjects]
    results = [summarize(subject, data, found, plan) for subject, found in zip(subjects, stats, strict=True)]
    for result in results:
        record(registry, result)
    differences = paired_bootstrap(
        subjects[0].task.metrics,
        stats[0],
        stats[1],
        samples=plan.samples,
        confidence=plan.confidence,
        seed=plan.seed,
    )
    return Comparison(results[0], results[1], differences)


def _require_one_task(first: Subject, second: Subject) -> None:
    if first.task.kind != second.task.kind:
        raise InputError(
            f"{first.version.reference} is for {first.task.kind}, {second.version.reference} for "
            f"{second.task.kind}: no metric measures both",
            "compare models of one task",
        )


def _common_dataset(registry: Registry, first: Subject, second: Subject) -> str:
    """The dataset both models were trained on, by their manifests."""
    found: list[dict[str, str]] = []
    for subject in (first, second):
        parents = registry.store.manifest("model", subject.version.digest).parents
        found.append({p.digest: p.reference for p in parents if p.reference.startswith("datasets:/")})
    shared = sorted(set(found[0]) & set(found[1]))
    if len(shared) != 1:
        names = [", ".join(sorted(parents.values())) or "no known dataset" for parents in found]
        raise InputError(
            f"{first.version.reference} was trained on {names[0]}, {second.version.reference} on {names[1]}",
            "name the dataset to compare them on: --dataset REF",
        )
    return found[0][shared[0]]


def _incomparable(subjects: tuple[Subject, Subject], split: str, error: DataError) -> InputError:
    """Why there are no common rows, and what there is instead: bits per byte do not depend on the tokenizer."""
    key = f"{split}/bits_per_byte"
    known = [(s.version.reference, s.version.metrics[key]) for s in subjects if key in s.version.metrics]
    if len(known) == len(subjects):
        figures = ", ".join(f"{name} {value:.4f}" for name, value in known)
        return InputError(
            f"they cannot be measured on the same rows: {error.problem}",
            f"their recorded {key}, each on its own dataset, say which is likely better if the texts are the same: "
            f"{figures} (less is better)",
        )
    return InputError(
        f"they cannot be measured on the same rows: {error.problem}",
        "evaluate each on a dataset of its own tokenizer and the same text, then compare bits_per_byte: "
        "modelyard evaluate --model REF --dataset REF",
    )
