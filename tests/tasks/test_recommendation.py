"""Recommendation: it learns what follows what, ranks all items a user does not know, and names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from modelyard.data.dataset import Column, Dataset, DatasetInfo
from modelyard.errors import ConfigError, DataError, InputError
from modelyard.tasks import Recommendation

from .conftest import assert_saved_whole, images_info, measure, row_losses, train, write_dataset

Architecture = Literal["sequence", "two_tower"]
ITEMS, LENGTH = 20, 6
SMALL: dict[str, Any] = {"hidden_size": 16, "layers": 1, "heads": 2, "dropout": 0.0}


@pytest.fixture
def circle(tmp_path: Path) -> Path:
    """Users who go round a circle of 20 items, one after the other; histories of 2 to 6 items."""
    generator = np.random.default_rng(0)
    history, target = np.zeros((80, LENGTH), np.int32), np.zeros(80, np.int32)
    for row, (start, length) in enumerate(
        zip(generator.integers(0, 20, 80), generator.integers(2, 7, 80), strict=True)
    ):
        history[row, LENGTH - length :] = (start + np.arange(length)) % ITEMS + 1
        target[row] = (start + length) % ITEMS + 1
    rows = {"history": history, "target": target, "popularity_rank": np.full(80, 7, np.int32)}
    return write_dataset(tmp_path / "circle", _info(), {"train": rows, "test": rows})


@pytest.mark.parametrize("architecture", ["sequence", "two_tower"])
def test_what_comes_next_is_learned(architecture: Architecture, circle: Path) -> None:
    task = Recommendation(architecture=architecture, **SMALL)
    model = train(task, circle, 250, rate=0.01)
    metrics = task.metrics(measure(task, model, circle))
    assert metrics["ndcg_at_10"] > 0.8
    assert metrics["popularity_ndcg_at_10"] == pytest.approx(1 / 3)
    best = task.predict(model, [["i4", "i5", "i6"], np.array(["i17", "i18", "i19"])], top=3)
    assert "i7" in [found["item"] for found in best[0]]
    assert "i0" in [found["item"] for found in best[1]]


def test_ranks_become_metrics_as_by_hand() -> None:
    stats = {"rank": np.array([1, 3, 10, 11]), "popularity_rank": np.array([2, 2, 2, 20])}
    assert Recommendation().metrics(stats) == pytest.approx(
        {
            "ndcg_at_10": (1 + 1 / 2 + 1 / np.log2(11)) / 4,
            "hit_rate_at_10": 3 / 4,
            "mrr": (1 + 1 / 3 + 1 / 10 + 1 / 11) / 4,
            "popularity_ndcg_at_10": 3 / 4 / np.log2(3),
        }
    )


@pytest.mark.parametrize("architecture", ["sequence", "two_tower"])
def test_known_items_are_neither_ranked_nor_recommended(architecture: Architecture, circle: Path) -> None:
    task = Recommendation(architecture=architecture, **SMALL)
    model = train(task, circle, 5)
    known = [f"i{i}" for i in range(15, 20)]
    (answer,) = task.predict(model, [known], top=100)
    assert sorted(found["item"] for found in answer) == sorted(f"i{i}" for i in range(15))
    rows = {"history": np.array([[0, 16, 17, 18, 19, 20]]), "target": np.array([3]), "popularity_rank": np.array([1])}
    with torch.inference_mode():
        rank = int(task.statistics(model, task.collate(rows, "cpu"))["rank"][0])
    assert [found["item"] for found in answer].index("i2") + 1 == rank


@pytest.mark.parametrize("architecture", ["sequence", "two_tower"])
def test_a_step_does_not_see_what_comes_later(architecture: Architecture, circle: Path) -> None:
    model = train(Recommendation(architecture=architecture, **SMALL), circle, 5)
    with torch.inference_mode():
        one, other = (model(torch.tensor([[0, 3, 4, 5, 6, last]])) for last in (7, 19))
    torch.testing.assert_close(one[:, :-1], other[:, :-1])
    assert not torch.allclose(one[:, -1], other[:, -1])
    assert bool(one.isfinite().all())


def test_padding_does_not_count_in_the_loss(circle: Path) -> None:
    task = Recommendation(**SMALL)
    model = train(task, circle, 0)
    rows = {"history": np.array([[0, 0, 0, 0, 0, 4]]), "target": np.array([5]), "popularity_rank": np.array([1])}
    with torch.inference_mode():
        scores = model(torch.tensor([[0, 0, 0, 0, 0, 4]]))[0, -1]
    torch.testing.assert_close(row_losses(task, model, rows)[0], -scores.log_softmax(dim=0)[5])


@pytest.mark.parametrize("architecture", ["sequence", "two_tower"])
def test_a_saved_model_answers_identically(architecture: Architecture, circle: Path, tmp_path: Path) -> None:
    task = Recommendation(architecture=architecture, **SMALL)
    model = train(task, circle, 2)
    assert_saved_whole(task, model, circle, tmp_path)
    assert task.flops_per_row(model) > 1000


def test_what_does_not_fit_is_refused(circle: Path) -> None:
    info = Dataset.open(circle).info
    with pytest.raises(DataError, match="needs a dataset of interactions, this one holds images"):
        Recommendation().check(images_info())
    with pytest.raises(ConfigError, match=r"task\.heads=3 does not divide"):
        Recommendation(heads=3).check(info)
    task = Recommendation(**SMALL)
    model = train(task, circle, 0)
    with pytest.raises(InputError, match="no item 'i99'"):
        task.predict(model, [["i1", "i99"]])
    with pytest.raises(InputError, match="no list of items"):
        task.predict(model, [[]])
    with pytest.raises(InputError, match="no option 'top'"):
        task.predict(model, [["i1"]], top=0)
    with pytest.raises(DataError, match="knows 20 items, the dataset holds 19"):
        task.check_saved(circle, info, info.with_changes(classes=info.classes[1:]), circle)


def _info() -> DatasetInfo:
    columns = (
        Column(name="history", dtype="int32", shape=(LENGTH,)),
        Column(name="target", dtype="int32"),
        Column(name="popularity_rank", dtype="int32"),
    )
    classes = tuple(f"i{i}" for i in range(ITEMS))
    return DatasetInfo(format="interactions", columns=columns, splits={}, classes=classes)
