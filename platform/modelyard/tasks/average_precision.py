"""Average precision of boxes, as COCO counts it (Lin et al. 2014), split in two: what of a row is right, and the rest.

Which boxes of one image are right depends on this image alone, so it is a statistic of a row; the curves of precision
over recall are made of all rows together. Areas of all sizes count, and no crowds are known.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

OVERLAPS = np.linspace(0.5, 0.95, 10)
"""Intersection over union from which a box counts as found."""
_RECALLS = np.linspace(0, 1, 101)
_NEARLY_ONE = 1 - 1e-10

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]


def overlaps(boxes: Floats, others: Floats) -> Floats:
    """Intersection over union of corners (n, 4) and (m, 4), as (n, m)."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(axis=2)
    areas = [(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (boxes, others)]
    found: Floats = both / np.maximum(areas[0][:, None] + areas[1][None] - both, 1e-12)
    return found


def matched(scores: Floats, classes: Ints, boxes: Floats, true_classes: Ints, true_boxes: Floats) -> Ints:
    """Which of K found boxes are right, int64 (K,): bit t is set where they are at `OVERLAPS[t]`.

    The surest box takes the free true box of its class that it overlaps most; a true box is taken once.
    """
    right = np.zeros((len(scores), len(OVERLAPS)), np.bool_)
    order = np.argsort(-scores, kind="stable")
    shared = overlaps(boxes, true_boxes)
    for at, limit in enumerate(np.minimum(OVERLAPS, _NEARLY_ONE)):
        free = np.ones(len(true_classes), np.bool_)
        for place in order:
            candidates = np.where(free & (true_classes == classes[place]), shared[place], -1.0)
            if candidates.size and candidates.max() >= limit:
                best = len(candidates) - 1 - int(candidates[::-1].argmax())  # of equals the last, as COCO does
                free[best], right[place, at] = False, True
    found: Ints = (right << np.arange(len(OVERLAPS))).sum(axis=1).astype(np.int64)
    return found


def average_precisions(scores: Floats, classes: Ints, right: Ints, truths: Ints) -> Floats:
    """Average precision of each class at each overlap, (C, 10); NaN for a class without a true box.

    Args:
        scores, classes, right: of all found boxes of n rows, (n, K); `right` as `matched` gives it.
        truths: true boxes of each class, (n, C).
    """
    totals = truths.sum(axis=0)
    found = np.full((len(totals), len(OVERLAPS)), np.nan)
    for number in np.flatnonzero(totals):
        here = classes == number
        order = np.argsort(-scores[here], kind="stable")
        hits = (right[here][order, None] >> np.arange(len(OVERLAPS))) & 1
        found[number] = _areas(hits.cumsum(axis=0), int(totals[number]))
    return found


def _areas(hits: Ints, total: int) -> Floats:
    """The mean precision at 101 recalls, (10,), from right boxes counted in the order of scores, (n, 10)."""
    if not len(hits):
        return np.zeros(len(OVERLAPS))
    precision = hits / np.arange(1, len(hits) + 1)[:, None]
    best_from_here = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    areas = []
    for at in range(len(OVERLAPS)):
        places = np.searchsorted(hits[:, at] / total, _RECALLS, side="left")
        reached = places < len(hits)
        areas.append(best_from_here[places[reached], at].sum() / len(_RECALLS))
    return np.array(areas)
