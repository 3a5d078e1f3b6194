"""Classification metrics equal scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from modelyard.tasks import ImageClassification
from modelyard.tasks.classification_metrics import accuracy, class_scores, macro_f1

labels_and_predictions = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60)


@given(labels_and_predictions)
def test_every_score_equals_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    labels, predictions = np.array(pairs).T
    assert accuracy(labels, predictions) == pytest.approx(sk.accuracy_score(labels, predictions))
    assert macro_f1(labels, predictions) == pytest.approx(
        sk.f1_score(labels, predictions, average="macro", zero_division=0)
    )
    expected = sk.precision_recall_fscore_support(labels, predictions, labels=range(7), zero_division=0)
    ours = class_scores(labels, predictions, 7)
    for column, theirs in enumerate(expected):
        assert [score[column] for score in ours] == pytest.approx(list(theirs))


def test_no_rows_score_nothing() -> None:
    empty = np.array([], dtype=np.int64)
    assert ImageClassification().metrics({"label": empty, "prediction": empty, "loss": empty.astype(float)}) == {
        "accuracy": 0.0,
        "macro_f1": 0.0,
        "loss": 0.0,
    }
    assert [tuple(score) for score in class_scores(empty, empty, 2)] == [(0.0, 0.0, 0.0, 0)] * 2
