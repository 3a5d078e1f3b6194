"""Metrics of a classifier from labels and predictions. Pure numpy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer[Any]]


class ClassScore(NamedTuple):
    """How one class fares; the three scores are 0 where they would divide by 0."""

    precision: float
    recall: float
    f1: float
    support: int
    """Rows whose label is this class."""


class RegionScore(NamedTuple):
    """How one class of pixels fares; 0 where a score would divide by 0."""

    iou: float
    """Pixels that are both found and true, as a share of those that are either."""
    precision: float
    recall: float
    support: int
    """Pixels whose class is this one."""


class BoxScore(NamedTuple):
    """How one class of boxes fares."""

    ap: float
    """Average precision, the mean over overlaps of 0.5, 0.55, ... 0.95; NaN without a true box."""
    ap_50: float
    """The same at an overlap of 0.5."""
    support: int
    """True boxes of this class."""


Score = ClassScore | RegionScore | BoxScore
"""One line of a table of classes."""


def confusion(labels: IntArray, predictions: IntArray) -> npt.NDArray[np.int64]:
    """Counts by (label, prediction) of n rows, (C, C) with C the largest class number seen plus one."""
    size = int(max(labels.max(initial=-1), predictions.max(initial=-1))) + 1
    cells = labels.astype(np.int64) * size + predictions
    return np.bincount(cells, minlength=size * size).reshape(size, size).astype(np.int64)


def class_scores(labels: IntArray, predictions: IntArray, classes: int = 0) -> list[ClassScore]:
    """The score of each class 0..C-1; C is at least `classes`."""
    table = confusion(labels, predictions)
    hit = np.diag(table)
    predicted, support = table.sum(axis=0), table.sum(axis=1)
    f1 = 2 * hit / np.maximum(predicted + support, 1)
    precision, recall = hit / np.maximum(predicted, 1), hit / np.maximum(support, 1)
    scores = [
        ClassScore(float(p), float(r), float(f), int(s))
        for p, r, f, s in zip(precision, recall, f1, support, strict=True)
    ]
    return scores + [ClassScore(0.0, 0.0, 0.0, 0)] * (classes - len(scores))


def accuracy(labels: IntArray, predictions: IntArray) -> float:
    """Share of the n rows that are predicted right; 0 for no rows."""
    return float(np.mean(labels == predictions)) if labels.size else 0.0


def macro_f1(labels: IntArray, predictions: IntArray) -> float:
    """Mean F1 over the classes that occur among labels or predictions (as in scikit-learn)."""
    table = confusion(labels, predictions)
    seen = table.sum(axis=0) + table.sum(axis=1)
    f1 = 2 * np.diag(table) / np.maximum(seen, 1)
    return float(f1[seen > 0].mean()) if (seen > 0).any() else 0.0
