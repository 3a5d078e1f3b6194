"""Rows of named columns: numbers, series and interactions become datasets. No cluster is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.config import parse
from modelyard.data.config import PrepareConfig
from modelyard.data.dataset import Dataset, DatasetInfo
from modelyard.data.histories import popularity_ranks
from modelyard.data.prepare import prepare_folder
from modelyard.errors import ConfigError, DataError


def prepared(folder: Path, source: dict[str, Any], **changes: Any) -> tuple[Dataset, DatasetInfo]:
    info = prepare_folder(parse(PrepareConfig, {"name": "corpus", "source": source, **changes}), folder)
    return Dataset.open(folder), info


def rows(dataset: Dataset, split: str) -> dict[str, np.ndarray]:
    return dataset.split(split).read(np.arange(dataset.info.splits[split]))


# --- numbers ----------------------------------------------------------------------------------------------------

ALL_TRAIN = {"train": 1.0, "validation": 0.0}


def test_points_of_the_config_become_features_and_targets(tmp_path: Path) -> None:
    source = {"kind": "points", "rows": [[1, 2, 5], [2, 4, 7]]}
    dataset, info = prepared(tmp_path, source, splits=ALL_TRAIN)
    found = rows(dataset, "train")
    assert found["features"].tolist() == [[1, 2], [2, 4]]
    assert found["targets"].tolist() == [[5], [7]]
    assert (info.features, info.targets) == (("x1", "x2"), ("y",))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_reads_the_same_from_every_format(suffix: str, tmp_path: Path) -> None:
    write_table(tmp_path / f"a.{suffix}", {"y": [1.5, 2.5, 3.5], "x": [1, 2, 3], "other": ["a", "b", "c"]})
    source = {"kind": "table", "paths": [str(tmp_path / f"a.{suffix}")], "features": ["x"], "targets": ["y"]}
    dataset, info = prepared(tmp_path / "out", source, splits=ALL_TRAIN)
    found = rows(dataset, "train")
    assert (found["features"][:, 0].tolist(), found["targets"][:, 0].tolist()) == ([1, 2, 3], [1.5, 2.5, 3.5])
    assert (info.features, info.targets) == (("x",), ("y",))


def test_equal_rows_share_a_split(tmp_path: Path) -> None:
    source = {"kind": "points", "rows": [[number % 20, 0] for number in range(200)]}
    dataset, _ = prepared(tmp_path, source, splits={"train": 0.6, "validation": 0.2, "test": 0.2})
    seen = [set(rows(dataset, split)["features"][:, 0].tolist()) for split in ("train", "validation", "test")]
    assert not seen[0] & (seen[1] | seen[2])
    assert not seen[1] & seen[2]
    assert sum(dataset.info.splits.values()) == 200


@pytest.mark.parametrize(
    ("columns", "source", "words"),
    [
        ({"x": ["a", "b"], "y": [1, 2]}, {}, "holds string, no numbers"),
        ({"x": [1, None], "y": [1, 2]}, {}, "no finite number in row 1"),
        ({"x1": [1, 2], "y": [1, 2]}, {}, "no column 'x'; did you mean 'x1'"),
        ({"x": [1, 2], "y": [1, 2]}, {"paths": ["{folder}/a.xls"]}, "does not exist"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(
    columns: dict[str, list[Any]], source: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write_table(tmp_path / "a.csv", columns)
    paths = [path.format(folder=tmp_path) for path in source.get("paths", ["{folder}/a.csv"])]
    with pytest.raises(DataError, match=words):
        prepared(tmp_path / "out", {"kind": "table", "paths": paths, "features": ["x"], "targets": ["y"]})


def test_rows_of_several_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match="rows hold 2, 3 numbers"):
        parse(PrepareConfig, {"name": "a", "source": {"kind": "points", "rows": [[1, 2], [1, 2, 3]]}})


# --- series -----------------------------------------------------------------------------------------------------

WINDOWS = {"past": 8, "future": 4, "season": 4}
BY_TIME = {"train": 0.5, "validation": 0.2, "test": 0.3}


def hundred(tmp_path: Path) -> dict[str, Any]:
    """Two series of 100 points: the point's number, shuffled but for the column of time; and its square."""
    order = np.random.default_rng(0).permutation(100)
    write_table(tmp_path / "a.csv", {"hour": order.tolist(), "a": order.tolist(), "b": (order**2).tolist()})
    return {"kind": "series", "paths": [str(tmp_path / "a.csv")], "columns": ["a", "b"], "time_column": "hour"}


def test_windows_follow_time_and_no_future_reaches_into_another_split(tmp_path: Path) -> None:
    dataset, info = prepared(tmp_path / "out", hundred(tmp_path), splits=BY_TIME, windows=WINDOWS)
    spans = {}
    for split in ("train", "validation", "test"):
        found = rows(dataset, split)
        first = found["series"] == 0
        both = np.concatenate([found["past"], found["future"]], axis=1)[first]
        assert (np.diff(both, axis=1) == 1).all()
        spans[split] = (found["future"][first].min(), found["future"][first].max())
    assert spans == {"train": (8, 49), "validation": (50, 69), "test": (70, 97)}
    assert (info.features, info.season) == (("a", "b"), 4)


def test_train_windows_overlap_and_held_out_ones_do_not(tmp_path: Path) -> None:
    dataset, _ = prepared(tmp_path / "out", hundred(tmp_path), splits=BY_TIME, windows=WINDOWS)
    assert dataset.info.splits == {"train": 2 * 39, "validation": 2 * 5, "test": 2 * 7}
    assert np.unique(rows(dataset, "test")["future"][:7]).size == 28


def test_the_scale_is_the_seasonal_naive_error_of_the_train_split_alone(tmp_path: Path) -> None:
    dataset, _ = prepared(tmp_path / "out", hundred(tmp_path), splits=BY_TIME, windows=WINDOWS)
    found = rows(dataset, "test")
    squares = np.arange(50) ** 2.0
    expected = [4.0, np.abs(squares[4:] - squares[:-4]).mean()]
    assert found["scale"].tolist() == pytest.approx([expected[number] for number in found["series"]])


def test_series_that_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    source = hundred(tmp_path)
    with pytest.raises(DataError, match="split 'validation' has no room for a window: it ends at point 52"):
        prepared(tmp_path / "a", source, splits={"train": 0.5, "validation": 0.02, "test": 0.48}, windows=WINDOWS)
    write_table(tmp_path / "flat.csv", {"a": [7] * 100})
    flat = {"kind": "series", "paths": [str(tmp_path / "flat.csv")], "columns": ["a"]}
    with pytest.raises(DataError, match="series 'a' repeats itself exactly"):
        prepared(tmp_path / "b", flat, splits=BY_TIME, windows=WINDOWS)
    with pytest.raises(ConfigError, match=r"past=3 is shorter than season=4"):
        prepared(tmp_path / "c", source, splits=BY_TIME, windows={"past": 3, "future": 1, "season": 4})
    with pytest.raises(ConfigError, match=r"windows\.past"):
        prepared(tmp_path / "d", source, splits=BY_TIME)


# --- interactions -----------------------------------------------------------------------------------------------

THREE = {"train": 0.8, "validation": 0.1, "test": 0.1}


def visits(tmp_path: Path) -> dict[str, Any]:
    """Ann does a, b, c, d, e, f in this order; Bob x, b, a, b, c; Cleo only two things."""
    events = [("ann", item, time) for time, item in enumerate("abcdef")]
    events += [("bob", item, 10 - time) for time, item in enumerate("cbabx")] + [("cleo", "a", 1), ("cleo", "b", 2)]
    shuffled = [events[i] for i in np.random.default_rng(1).permutation(len(events))]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"user": user, "item": item, "time": time}) + "\n" for user, item, time in shuffled)
    )
    return {"kind": "interactions", "paths": [str(tmp_path / "a.jsonl")]}


def named(dataset: Dataset, split: str) -> set[tuple[str, str]]:
    """The rows as (history, what came next), without the padding."""
    names = ("", *dataset.info.classes)
    found = rows(dataset, split)
    return {
        ("".join(names[i] for i in past), names[target])
        for past, target in zip(found["history"].tolist(), found["target"].tolist(), strict=True)
    }


def test_the_last_two_things_of_each_user_are_held_out(tmp_path: Path) -> None:
    histories = {"length": 4, "stride": 1, "min_interactions": 4}
    dataset, info = prepared(tmp_path / "out", visits(tmp_path), splits=THREE, histories=histories)
    assert named(dataset, "test") == {("bcde", "f"), ("xbab", "c")}
    assert named(dataset, "validation") == {("abcd", "e"), ("xba", "b")}
    assert named(dataset, "train") == {("a", "b"), ("ab", "c"), ("abc", "d"), ("x", "b"), ("xb", "a")}
    assert info.classes == ("a", "b", "c", "d", "e", "f", "x")
    assert info.documents == {"documents": 13, "users": 2, "kept": 11}


def test_popularity_ranks_count_only_items_the_user_does_not_know() -> None:
    counts = np.array([0, 5, 9, 1, 5])  # item 2, then 1 and 4 (equal: the lower number), then 3
    history = np.array([[0, 0], [0, 2], [2, 1], [0, 1]], dtype=np.int32)
    target = np.array([3, 3, 4, 2], dtype=np.int32)
    assert popularity_ranks(history, target, counts).tolist() == [4, 3, 1, 1]


def test_interactions_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    source = visits(tmp_path)
    with pytest.raises(DataError, match="no user has 9 interactions"):
        prepared(tmp_path / "a", source, splits=THREE, histories={"min_interactions": 9})
    with pytest.raises(ConfigError, match="split into train, validation and test"):
        prepared(tmp_path / "b", source, splits=ALL_TRAIN)
    with pytest.raises(DataError, match="no column 'when'; known: item, time, user"):
        prepared(tmp_path / "c", {**source, "time_column": "when"}, splits=THREE)


def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.csv
    from pyarrow import parquet

    table = pa.table(columns)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        options = pyarrow.csv.WriteOptions(delimiter="," if path.suffix == ".csv" else "\t")
        pyarrow.csv.write_csv(table, path, options)


def test_the_command_line_shows_rows_by_their_columns(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from modelyard.cli.main import modelyard
    from modelyard.data.prepare import prepare

    plain = {"name": "line", "source": {"kind": "points", "rows": [[1, 2], [3, 4]]}, "splits": ALL_TRAIN}
    prepare(parse(PrepareConfig, plain))
    result = CliRunner().invoke(modelyard, ["data", "show", "line", "--samples", "1"], catch_exceptions=False)
    assert result.output.splitlines()[3].split() == ["format", "numbers"]
    assert "features: [1.]" in result.output
    assert "targets: [2.]" in result.output
