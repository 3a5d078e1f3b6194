from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from modelyard.data.dataset import INFO_FILE, Column, Dataset, DatasetInfo
from modelyard.data.shards import ShardWriter
from modelyard.errors import DataError

COLUMNS = (Column(name="input_ids", dtype="uint16", shape=(4,)), Column(name="label", dtype="int64"))


def rows(start: int, stop: int) -> dict[str, np.ndarray]:
    label = np.arange(start, stop, dtype=np.int64)
    return {"input_ids": (label[:, None] * 4 + np.arange(4)).astype(np.uint16), "label": label}


def write(folder: Path, num_rows: int = 10, cuts: tuple[int, ...] = (3, 7), per_shard: int = 4) -> Path:
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, "train", COLUMNS, per_shard)
    bounds = [0, *cuts, num_rows]
    for start, stop in itertools.pairwise(bounds):
        writer.write(rows(start, stop))
    writer.close()
    info = DatasetInfo(format="tokens", columns=COLUMNS, splits={"train": num_rows})
    (folder / INFO_FILE).write_text(json.dumps(info.model_dump(mode="json")))
    return folder


@pytest.mark.parametrize("per_shard", [1, 4, 10, 100])
def test_rows_come_back_in_the_order_asked(tmp_path: Path, per_shard: int) -> None:
    split = Dataset.open(write(tmp_path / "d", per_shard=per_shard)).split("train")
    wanted = np.array([9, 0, 3, 3, 4, 8])
    read = split.read(wanted)
    assert split.num_rows == 10
    assert read["label"].tolist() == wanted.tolist()
    assert np.array_equal(read["input_ids"], rows(0, 10)["input_ids"][wanted])
    assert read["input_ids"].dtype == np.uint16
    read["input_ids"][0] = 7  # a fresh array, not the map


def test_no_rows_can_be_asked(tmp_path: Path) -> None:
    read = Dataset.open(write(tmp_path / "d")).split("train").read(np.array([], dtype=np.int64))
    assert read["input_ids"].shape == (0, 4)


def test_bytes_do_not_depend_on_how_the_writes_were_cut(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", cuts=(1, 2, 9)), write(tmp_path / "two", cuts=())
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    assert all(path.read_bytes() == (two / path.name).read_bytes() for path in one.iterdir())


def test_shards_are_mapped_not_loaded(tmp_path: Path) -> None:
    split = Dataset.open(write(tmp_path / "d", per_shard=100)).split("train")
    assert not split._shards[0]["input_ids"].flags.owndata
    assert not split._shards[0]["input_ids"].flags.writeable


@pytest.mark.parametrize("wanted", [[10], [-1], [0, 99]])
def test_rows_outside_the_split_are_refused(tmp_path: Path, wanted: list[int]) -> None:
    split = Dataset.open(write(tmp_path / "d")).split("train")
    with pytest.raises(DataError, match=r"which has 0\.\.9"):
        split.read(np.array(wanted))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def overwrite_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40] + b"\xff" * 40)


def overwrite_all(path: Path) -> None:
    path.write_bytes(b"\x00" * path.stat().st_size)


@pytest.mark.parametrize("damage", [truncate, empty, overwrite_end, overwrite_all, Path.unlink])
def test_a_damaged_shard_is_named_when_the_dataset_is_opened(tmp_path: Path, damage: object) -> None:
    folder = write(tmp_path / "d")
    damage(folder / "train-00001-of-00003.arrow")  # type: ignore[operator]
    with pytest.raises(DataError, match=r"train-00001-of-00003\.arrow"):
        Dataset.open(folder)


@pytest.mark.parametrize("keep", range(0, 900, 61))
def test_a_shard_cut_anywhere_is_refused_and_named(tmp_path: Path, keep: int) -> None:
    folder = write(tmp_path / "d")
    path = folder / "train-00000-of-00003.arrow"
    assert keep < path.stat().st_size
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="train-00000-of-00003"):
        Dataset.open(folder)


def test_a_shard_of_other_columns_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "d")
    text = (folder / INFO_FILE).read_text().replace("uint16", "uint32")
    (folder / INFO_FILE).write_text(text)
    with pytest.raises(DataError, match="has the columns"):
        Dataset.open(folder)


def test_wrong_row_counts_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "d")
    (folder / INFO_FILE).write_text((folder / INFO_FILE).read_text().replace('"train": 10', '"train": 11'))
    with pytest.raises(DataError, match="has 10 rows"):
        Dataset.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "tokens"}', '{"format": "tea"}'])
def test_damaged_metadata_is_refused(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path / "d")
    (folder / INFO_FILE).write_text(text)
    with pytest.raises(DataError, match=INFO_FILE):
        Dataset.open(folder)


def test_a_folder_without_metadata_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dataset"):
        Dataset.open(tmp_path)
    with pytest.raises(DataError, match="no dataset"):
        Dataset.open(tmp_path / "nowhere")


def test_a_misspelt_split_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'train'"):
        Dataset.open(write(tmp_path / "d")).split("trian")
