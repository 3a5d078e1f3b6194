"""The whole preparation, on a real Ray cluster."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq

from modelyard.artifacts import Registry, filesystem
from modelyard.config import parse
from modelyard.data.config import PrepareConfig
from modelyard.data.dataset import Dataset, DatasetInfo
from modelyard.data.prepare import prepare, prepare_folder
from modelyard.data.progress import Progress
from modelyard.errors import ConfigError, DataError, NotFoundError, StorageError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

WORDS = ["".join(random.Random(i).choices("abcdefghijklmnop", k=3 + i % 7)) for i in range(400)]


def story(seed: int, words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def config(source: dict[str, Any], **changes: Any) -> PrepareConfig:
    text = {"block_tokens": 16, "tokenizer": {"kind": "train", "vocab_size": 400}, **changes.pop("text", {})}
    return parse(PrepareConfig, {"name": "corpus", "source": source, "text": text, **changes})


def write_lines(path: Path, texts: list[str]) -> dict[str, Any]:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"kind": "jsonl", "paths": [str(path)]}


def stories(folder: Path, count: int = 60) -> dict[str, Any]:
    for file in range(6):
        write_lines(folder / f"{file}.jsonl", [story(seed) for seed in range(file, count, 6)])
    return {"kind": "jsonl", "paths": [str(folder)]}


def decoded(folder: Path, split: str) -> str:
    import tokenizers

    dataset = Dataset.open(folder)
    rows = dataset.split(split).read(np.arange(dataset.info.splits[split]))["input_ids"]
    assert dataset.tokenizer_folder is not None
    tokenizer = tokenizers.Tokenizer.from_file(str(dataset.tokenizer_folder / "tokenizer.json"))
    return str(tokenizer.decode(rows.reshape(-1).tolist(), skip_special_tokens=False))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_bytes_do_not_depend_on_the_parallelism(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    settings = config(stories(tmp_path / "in"), rows_per_shard=50)
    for blocks in (1, 3, 8):
        prepare_folder(settings, tmp_path / f"out{blocks}", num_blocks=blocks)
    first = contents(tmp_path / "out1")
    assert len([name for name in first if name.startswith("train-")]) > 1
    assert contents(tmp_path / "out3") == first
    assert contents(tmp_path / "out8") == first


def test_documents_are_packed_in_order_with_end_of_text_between(tmp_path: Path) -> None:
    texts = [story(seed) for seed in range(30)]
    source = write_lines(tmp_path / "a.jsonl", texts)
    info = prepare_folder(config(source, splits={"train": 1.0, "validation": 0.0}), tmp_path / "out")
    expected = "".join(text + "<|endoftext|>" for text in texts)
    assert expected.startswith(decoded(tmp_path / "out", "train"))
    assert info.splits.keys() == {"train"}
    assert info.columns[0].dtype == "uint16"


def test_each_step_is_counted(tmp_path: Path) -> None:
    texts = [story(seed) for seed in range(40)]
    nearly = texts[3].replace(texts[3].split()[5], "different", 1)
    source = write_lines(tmp_path / "a.jsonl", [*texts, "too short", texts[0], texts[7], nearly])
    seen: list[Progress] = []
    info = prepare_folder(config(source), tmp_path / "out", seen.append)
    assert info.documents == {
        "documents": 44,
        "too_short": 1,
        "too_long": 0,
        "unreadable": 0,
        "exact_duplicates": 2,
        "near_duplicates": 1,
        "kept": 40,
    }
    over = [progress for progress in seen if progress.done == progress.total]
    assert [progress.step for progress in over] == ["read", "deduplicate", "split", "tokenizer", "pack"]
    assert over[4].counts["train_rows"] == info.splits["train"]


def test_a_document_keeps_its_split_when_the_corpus_grows(tmp_path: Path) -> None:
    texts = [f"document {seed} " + story(seed) for seed in range(80)]
    before = config(write_lines(tmp_path / "a.jsonl", texts[:40]), splits={"train": 0.5, "validation": 0.5})
    after = config(write_lines(tmp_path / "b.jsonl", texts[::-1]), splits={"train": 0.5, "validation": 0.5})
    prepare_folder(before, tmp_path / "before")
    prepare_folder(after, tmp_path / "after")
    old, new = decoded(tmp_path / "before", "train"), decoded(tmp_path / "after", "train")
    whole = [text for text in texts[:40] if text in old]
    assert 10 < len(whole) < 30
    assert sum(text in new for text in whole) >= len(whole) - 1  # the last one may be cut by the last row


def test_an_existing_tokenizer_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = stories(tmp_path / "in")
    first = prepare_folder(config(source), tmp_path / "one")
    folder = str(tmp_path / "one" / "tokenizer")
    second = prepare_folder(config(source, text={"tokenizer": {"kind": "folder", "path": folder}}), tmp_path / "two")
    assert second.vocab_size == first.vocab_size
    for path in sorted((tmp_path / "one").glob("*.arrow")):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("texts", "changes", "words"),
    [
        ([], {}, "empty"),
        (["", " "], {}, "no document of the corpus is usable: of 2 read, 2 too short"),
        ([story(1)], {}, "is empty: none of the 1 documents falls into its share"),
        ([story(i) for i in range(9)], {"text": {"block_tokens": 4096}}, "less than one block of 4096"),
        (
            [story(i) for i in range(80)],
            {"text": {"block_tokens": 2048}, "splits": {"train": 0.95, "validation": 0.05}},
            "split 'validation' has",
        ),
    ],
)
def test_a_corpus_that_cannot_fill_its_splits_is_refused(
    tmp_path: Path, texts: list[str], changes: dict[str, Any], words: str
) -> None:
    source = write_lines(tmp_path / "a.jsonl", texts)
    with pytest.raises(DataError) as caught:
        prepare_folder(config(source, **changes), tmp_path / "out")
    assert words in str(caught.value)


def test_a_corpus_shorter_than_a_block_says_what_would_fit(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [story(1)])
    whole = {"train": 1.0, "validation": 0.0}
    with pytest.raises(DataError) as caught:
        prepare_folder(config(source, splits=whole, text={"block_tokens": 9999}), tmp_path / "out")
    tokens = int(caught.value.problem.split(" tokens")[0].rsplit(" ", 1)[1])
    assert f"at most {tokens}" in caught.value.todo
    info = prepare_folder(config(source, splits=whole, text={"block_tokens": tokens}), tmp_path / "fits")
    assert info.splits == {"train": 1}


def test_binary_garbage_is_dropped_and_counted_and_refused_when_it_is_all(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for seed in range(3):
        (folder / f"garbage{seed}.txt").write_bytes(np.random.default_rng(seed).bytes(5000))
    source = {"kind": "text", "paths": [str(folder)]}
    with pytest.raises(DataError, match="of 3 read, 3 unreadable"):
        prepare_folder(config(source), tmp_path / "out")
    for seed in range(40):
        (folder / f"story{seed}.txt").write_text(story(seed))
    assert prepare_folder(config(source), tmp_path / "out").documents["unreadable"] == 3


def test_an_error_of_a_worker_arrives_as_it_was_raised(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    source = stories(folder)
    (folder / "9.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match=r"9\.jsonl, byte 17: the line is not JSON") as caught:
        prepare_folder(config(source), tmp_path / "out")
    assert "one JSON object per line" in caught.value.todo


def test_a_wrong_tokenizer_folder_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [story(1)])
    tokenizer = {"kind": "folder", "path": str(tmp_path / "no")}
    with pytest.raises(ConfigError, match="does not exist"):
        prepare_folder(config(source, text={"tokenizer": tokenizer}), tmp_path / "out")


def test_a_corpus_on_s3_is_prepared_by_workers_that_get_the_keys(
    tmp_path: Path, s3_store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [story(seed) for seed in range(40)]
    fs, root = filesystem.resolve(s3_store_uri)
    pq.write_table(pa.table({"text": texts}), f"{root}/a.parquet", filesystem=fs, row_group_size=10)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=10)
    remote = prepare_folder(config({"kind": "parquet", "paths": [s3_store_uri]}), tmp_path / "remote")
    local = prepare_folder(config({"kind": "parquet", "paths": [str(tmp_path)]}), tmp_path / "local")
    assert remote == local
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="denied"):
        prepare_folder(config({"kind": "parquet", "paths": [s3_store_uri]}), tmp_path / "denied")


def images(folder: Path, size: tuple[int, int] = (6, 5)) -> PrepareConfig:
    for index in range(60):
        path = folder / ("cat" if index % 2 else "dog") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index % 50).integers(0, 256, (size[1], size[0]), np.uint8)
        Image.fromarray(pixels).save(path)
    (folder / "dog" / "torn.png").write_bytes(b"\x89PNG")
    return parse(PrepareConfig, {"name": "pets", "source": {"kind": "image_folder", "path": str(folder)}})


def test_an_image_folder_becomes_pixels_and_labels(tmp_path: Path) -> None:
    settings = images(tmp_path / "in")
    info = prepare_folder(settings, tmp_path / "out", num_blocks=3)
    assert info.classes == ("cat", "dog")
    assert info.documents["exact_duplicates"] == 10
    assert info.documents["unreadable"] == 1
    assert sum(info.splits.values()) == info.documents["kept"] == 50
    dataset = Dataset.open(tmp_path / "out")
    rows = dataset.split("train").read(np.arange(info.splits["train"]))
    assert rows["pixels"].shape[1:] == (1, 5, 6)
    known = {np.random.default_rng(i).integers(0, 256, (5, 6), np.uint8).tobytes(): i for i in range(50)}
    for pixels, label in zip(rows["pixels"], rows["label"], strict=True):
        assert info.classes[label] == ("cat" if known[pixels.tobytes()] % 2 else "dog")
    prepare_folder(settings, tmp_path / "again", num_blocks=1)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_images_of_different_sizes_need_a_size(tmp_path: Path) -> None:
    settings = images(tmp_path / "in")
    Image.new("L", (9, 9)).save(tmp_path / "in" / "cat" / "large.png")
    with pytest.raises(DataError, match="2 different sizes: 6x5, 9x9"):
        prepare_folder(settings, tmp_path / "out")
    resized = parse(PrepareConfig, {**settings.model_dump(), "images": {"height": 4, "width": 4}})
    assert prepare_folder(resized, tmp_path / "out").columns[0].shape == (1, 4, 4)


def test_the_same_corpus_prepared_twice_is_the_same_version(tmp_path: Path) -> None:
    settings = config(write_lines(tmp_path / "a.jsonl", [story(seed) for seed in range(40)]))
    first, second = prepare(settings), prepare(settings)
    assert first.reference == "datasets:/corpus/1"
    assert second.digest == first.digest
    assert second.reference == first.reference
    version, folder = Registry.from_settings().open("datasets:/corpus")
    dataset = Dataset.open(folder)
    assert isinstance(dataset.info, DatasetInfo)
    assert version.metrics["tokens"] == 16 * sum(dataset.info.splits.values())
    assert list((tmp_path / "home").glob("prepare-*")) == []


def test_the_settings_of_ray_data_are_put_back(tmp_path: Path) -> None:
    import ray.data

    context = ray.data.DataContext.get_current()
    before = context.execution_options.preserve_order, context.enable_progress_bars
    prepare_folder(config(write_lines(tmp_path / "a.jsonl", [story(i) for i in range(40)])), tmp_path / "out")
    assert (context.execution_options.preserve_order, context.enable_progress_bars) == before


def test_a_store_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("MODELYARD_STORE", str(tmp_path / "file" / "store"))
    seen: list[Progress] = []
    with pytest.raises(NotFoundError, match="file/store"):
        prepare(config(write_lines(tmp_path / "a.jsonl", [story(1)])), on_progress=seen.append)
    assert seen == []
