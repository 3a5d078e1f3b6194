"""Average precision of boxes: what COCO's own tool counts, from statistics of rows that may come in any order."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest

from modelyard.tasks.average_precision import OVERLAPS, average_precisions, matched, overlaps

CLASSES = 4
# Computed with pycocotools 2.0.11 on `guesses(seed)`: mAP, mAP@.5 and mAP@.75.
REFERENCE = {
    0: (0.376467172, 0.575453483, 0.439711809),
    1: (0.339028130, 0.545814493, 0.363457865),
    2: (0.338705747, 0.549499528, 0.383012207),
    3: (0.378662356, 0.599935426, 0.457349782),
    4: (0.386236575, 0.640059232, 0.452846171),
    5: (0.339321980, 0.543524896, 0.377354064),
}


def box(draw: np.random.Generator) -> np.ndarray:
    low, size = draw.uniform(0, 60, 2), draw.uniform(20, 40, 2)
    return np.concatenate([low, low + size])


def guesses(seed: int, images: int = 30) -> list[dict[str, np.ndarray]]:
    """Images with true boxes, and found ones: some of them near, some twice, some of another class, some nowhere."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(images):
        true = np.array([box(draw) for _ in range(draw.integers(0, 5))]).reshape(-1, 4)
        labels = draw.integers(0, CLASSES, len(true))
        near = np.repeat(true, 2, axis=0) + draw.normal(0, 2, (2 * len(true), 4))
        kept = draw.random(len(near)) < 0.7
        far = np.array([box(draw) for _ in range(draw.integers(0, 4))]).reshape(-1, 4)
        found = np.concatenate([near[kept], far])
        classes = np.concatenate([np.repeat(labels, 2)[kept], draw.integers(0, CLASSES, len(far))])
        wrong = draw.random(len(classes)) < 0.1
        classes[wrong] = draw.integers(0, CLASSES, wrong.sum())
        scores = np.round(draw.random(len(found)), 2)  # with ties
        rows.append({"boxes": true, "labels": labels, "found": found, "classes": classes, "scores": scores})
    return rows


def statistics(rows: list[dict[str, np.ndarray]], width: int = 16) -> dict[str, np.ndarray]:
    """The statistics of rows, padded with boxes that are nowhere and never right, of a class no row has."""
    stats = {
        "scores": np.full((len(rows), width), -1.0),
        "classes": np.full((len(rows), width), -1),
        "right": np.zeros((len(rows), width), np.int64),
        "truths": np.zeros((len(rows), CLASSES), np.int64),
    }
    for place, row in enumerate(rows):
        count = len(row["scores"])
        stats["scores"][place, :count], stats["classes"][place, :count] = row["scores"], row["classes"]
        stats["right"][place, :count] = matched(
            row["scores"], row["classes"], row["found"], row["labels"], row["boxes"]
        )
        stats["truths"][place] = np.bincount(row["labels"], minlength=CLASSES)
    return stats


def figures(rows: list[dict[str, np.ndarray]]) -> tuple[float, float, float]:
    found = average_precisions(**statistics(rows))
    occur = found[~np.isnan(found[:, 0])]
    return float(occur.mean()), float(occur[:, 0].mean()), float(occur[:, 5].mean())


def coco_figures(rows: list[dict[str, np.ndarray]]) -> tuple[float, float, float]:
    """The same by pycocotools."""
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    truth: Any = coco.COCO()
    sized = [(row, *(b[:, 2:] - b[:, :2] for b in (row["boxes"], row["found"]))) for row in rows]
    annotations = [
        {"image_id": n, "category_id": int(label), "bbox": [*b[:2], *size], "area": float(size.prod()), "iscrowd": 0}
        for n, (row, sizes, _) in enumerate(sized)
        for b, size, label in zip(row["boxes"], sizes, row["labels"], strict=True)
    ]
    truth.dataset = {
        "images": [{"id": n, "width": 100, "height": 100} for n in range(len(rows))],
        "categories": [{"id": n, "name": str(n)} for n in range(CLASSES)],
        "annotations": [{"id": n + 1, **one} for n, one in enumerate(annotations)],
        "info": {},
    }
    found = [
        {"image_id": n, "category_id": int(label), "bbox": [*b[:2], *size], "score": float(score)}
        for n, (row, _, sizes) in enumerate(sized)
        for b, size, label, score in zip(row["found"], sizes, row["classes"], row["scores"], strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        run: Any = evaluation.COCOeval(truth, truth.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return float(run.stats[0]), float(run.stats[1]), float(run.stats[2])


@pytest.mark.parametrize("seed", range(6))
def test_figures_are_those_that_pycocotools_once_gave(seed: int) -> None:
    assert figures(guesses(seed)) == pytest.approx(REFERENCE[seed], abs=1e-6)


@pytest.mark.parametrize("seed", range(6, 16))
def test_figures_are_those_of_pycocotools(seed: int) -> None:
    rows = guesses(seed)
    assert figures(rows) == pytest.approx(coco_figures(rows), abs=1e-9)


def test_a_true_box_is_found_once_and_by_the_surest() -> None:
    true = np.array([[0.0, 0, 10, 10]])
    found = np.array([[0.0, 0, 10, 10], [0.0, 0, 10, 9.4], [50.0, 50, 60, 60]])
    right = matched(np.array([0.5, 0.9, 0.99]), np.zeros(3, int), found, np.zeros(1, int), true)
    assert [bool(bits & 1) for bits in right] == [False, True, False]
    assert right[1] == 2**9 - 1, "at overlaps up to 0.9 the less exact but surer box has it"
    assert right[0] == 2**9, "at 0.95 only the exact one will do"


def test_another_class_is_never_right() -> None:
    box = np.array([[0.0, 0, 10, 10]])
    assert matched(np.ones(1), np.array([1]), box, np.array([0]), box).tolist() == [0]
    assert matched(np.ones(1), np.array([0]), box, np.array([0]), box).tolist() == [2 ** len(OVERLAPS) - 1]


def test_perfect_boxes_have_precision_one_and_no_boxes_zero() -> None:
    rows = [
        {"boxes": row["boxes"], "found": row["boxes"], "labels": row["labels"], "classes": row["labels"]}
        | {"scores": np.ones(len(row["labels"]))}
        for row in guesses(1)
    ]
    assert figures(rows) == pytest.approx((1.0, 1.0, 1.0))
    nothing = [
        {**row, "found": np.zeros((0, 4)), "classes": row["classes"][:0], "scores": row["scores"][:0]} for row in rows
    ]
    assert figures(nothing) == (0.0, 0.0, 0.0)


def test_a_class_without_a_true_box_has_no_precision() -> None:
    rows = [{**row, "labels": np.zeros_like(row["labels"])} for row in guesses(2)]
    assert np.isnan(average_precisions(**statistics(rows))).all(axis=1).tolist() == [False, True, True, True]


def test_the_order_of_rows_does_not_matter_without_ties() -> None:
    rows = guesses(3)
    for number, row in enumerate(rows):
        row["scores"] = row["scores"] + 1e-6 * number + 1e-4 * np.random.default_rng(number).random(len(row["scores"]))
    assert figures(rows[::-1]) == pytest.approx(figures(rows), abs=1e-12)


def test_overlaps_are_shares_of_the_area_of_both() -> None:
    found = overlaps(np.array([[0.0, 0, 2, 2], [5, 5, 6, 6]]), np.array([[1.0, 0, 3, 2], [0, 0, 2, 2]]))
    np.testing.assert_allclose(found, [[1 / 3, 1], [0, 0]])
