"""What `modelyard evaluate` prints: metrics with intervals, and a table of classes in the scores of the task."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from modelyard.cli.evaluate import report
from modelyard.tasks.classification_metrics import BoxScore, ClassScore, RegionScore
from modelyard.training.bootstrap import Interval
from modelyard.training.evaluation import ClassRow, EvaluationResult


def result(*classes: ClassRow) -> EvaluationResult:
    version: Any = SimpleNamespace(reference="models:/m/1")
    return EvaluationResult(version, version, "test", 5, ("map", "max"), {"map": Interval(0.5, 0.4, 0.6)}, classes, 0.9)


@pytest.mark.parametrize(
    ("score", "titles", "values"),
    [
        (
            ClassScore(0.5, 0.25, 1 / 3, 7),
            ["precision", "recall", "F1", "support"],
            ["0.5000", "0.2500", "0.3333", "7"],
        ),
        (
            RegionScore(0.5, 0.75, 0.6, 9),
            ["IoU", "precision", "recall", "support"],
            ["0.5000", "0.7500", "0.6000", "9"],
        ),
        (BoxScore(0.25, 0.5, 3), ["AP", "AP@.5", "support"], ["0.2500", "0.5000", "3"]),
    ],
)
def test_each_kind_of_class_has_its_own_columns(score: Any, titles: list[str], values: list[str]) -> None:
    *metrics, _, head, line = report(result(ClassRow("cat", score)))
    assert metrics[-1].split() == ["map", "0.5000", "0.4000", "..", "0.6000"]
    assert head.split() == ["class", *titles]
    assert line.split() == ["cat", *values]


def test_without_classes_there_is_no_table() -> None:
    assert report(result())[-1].startswith("map")
