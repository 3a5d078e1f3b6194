from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq

from modelyard.config import parse
from modelyard.data import sources
from modelyard.data.config import ImageConfig, PrepareConfig
from modelyard.data.prepare import plan
from modelyard.data.sources import paths, text
from modelyard.errors import DataError, NotFoundError, StorageError


def config(**source: Any) -> PrepareConfig:
    return parse(PrepareConfig, {"name": "corpus", "source": source})


def documents(**source: Any) -> list[Any]:
    prepared = config(**source)
    images = {"images": prepared.images} if prepared.images else {}
    return [found for part in plan(prepared) for found in sources.read(prepared.source, part, **images)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/deep/d.txt", "sub/e.md", ".hidden/f.txt", "sub/.g.txt"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    return tmp_path / "tree"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", ["a.txt", "b.txt", "sub/c.txt", "sub/deep/d.txt"]),
        ("sub", ["sub/c.txt", "sub/deep/d.txt"]),
        ("b.txt", ["b.txt"]),
        ("*.txt", ["a.txt", "b.txt"]),
        ("**/*.txt", ["a.txt", "b.txt", "sub/c.txt", "sub/deep/d.txt"]),
        ("s*/[a-d].txt", ["sub/c.txt"]),
        ("sub/?.md", ["sub/e.md"]),
    ],
)
def test_files_folders_and_globs_find_sorted_files(tree: Path, path: str, expected: list[str]) -> None:
    found = paths.find_files([str(tree / path)], ["*.txt"])
    assert [Path(file.uri).relative_to(tree).as_posix() for file in found] == expected


def test_a_file_named_twice_is_read_once(tree: Path) -> None:
    assert documents(kind="text", paths=[str(tree / "a.txt"), str(tree / "*.txt")]) == [
        "text of a.txt",
        "text of b.txt",
    ]


def test_a_missing_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'.*/nowhere' does not exist"):
        plan(config(kind="text", paths=[str(tmp_path / "nowhere")]))


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "image_parquet"])
def test_a_folder_without_fitting_files_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "notes.doc").write_text("x")
    with pytest.raises(DataError, match="holds no file like"):
        plan(config(kind=kind, paths=[str(tmp_path)]))


def test_a_separator_cuts_a_file_into_documents(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_bytes(b"one\r\n\r\ntwo\n\nthree")
    assert documents(kind="text", paths=[str(tmp_path)], separator="\n\n") == ["one", "two", "three"]


def test_binary_files_are_unreadable_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(np.random.default_rng(0).bytes(1000))
    (tmp_path / "b.txt").write_text("text")
    assert documents(kind="text", paths=[str(tmp_path)]) == [None, "text"]


# --- JSON Lines -------------------------------------------------------------------------------------------------


def write_lines(path: Path, texts: list[str], end: str = "\n") -> None:
    data = "\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)) + end
    path.write_bytes(gzip.compress(data.encode()) if path.suffix == ".gz" else data.encode())


@pytest.mark.parametrize("range_bytes", [1, 7, 30, 31, 64, 1000])
@pytest.mark.parametrize("end", ["\n", "", "\n\n"])
def test_ranges_of_any_size_read_each_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, range_bytes: int, end: str
) -> None:
    texts = ["x" * (i * 7 % 40) + "é" for i in range(30)]
    write_lines(tmp_path / "a.jsonl", texts, end)
    monkeypatch.setattr(text, "_RANGE_BYTES", range_bytes)
    assert documents(kind="jsonl", paths=[str(tmp_path)]) == texts


def test_compressed_lines_are_read(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl.gz", ["one", "two"])
    assert documents(kind="jsonl", paths=[str(tmp_path)]) == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"id": 1, "body": "x"}', "no column 'text'; it has: id, body"),
        ("[1]", "holds a list"),
        ('{"text": 5}', "column 'text' holds a int"),
        ('{"text": "cut', "is not JSON"),
    ],
)
def test_a_bad_line_is_refused_with_its_place(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        documents(kind="jsonl", paths=[str(tmp_path)])
    assert words in str(caught.value)
    assert "a.jsonl, byte 17" in str(caught.value)


# --- Parquet ----------------------------------------------------------------------------------------------------


def test_parquet_rows_are_read_in_order_across_row_groups(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(10)] + [None]
    pq.write_table(pa.table({"n": range(11), "text": texts}), tmp_path / "a.parquet", row_group_size=3)
    assert len(plan(config(kind="parquet", paths=[str(tmp_path)]))) == 4
    assert documents(kind="parquet", paths=[str(tmp_path)]) == [*texts[:10], ""]


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_truncated_parquet_file_is_named_before_work_starts(tmp_path: Path, keep: int) -> None:
    pq.write_table(pa.table({"text": ["x" * 99] * 50}), tmp_path / "good.parquet")
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:keep])
    with pytest.raises(DataError, match=r"torn\.parquet: no whole Parquet file"):
        plan(config(kind="parquet", paths=[str(tmp_path)]))


@pytest.mark.parametrize("compression", ["zstd", "snappy", "gzip", "lz4", "brotli", "none"])
def test_damaged_parquet_data_is_named_when_it_is_read(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a.parquet"
    rows = [np.random.default_rng(i).bytes(40).hex() for i in range(500)]
    pq.write_table(pa.table({"text": rows}), path, compression=compression, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[200:2000] = b"\xff" * 1800
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet: row group 0 is damaged"):
        documents(kind="parquet", paths=[str(path)])


def test_a_missing_text_column_is_refused_and_the_columns_listed(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'text'; it has: body, n"):
        plan(config(kind="parquet", paths=[str(tmp_path)]))
    with pytest.raises(DataError, match="column 'n' is of type int64"):
        plan(config(kind="parquet", paths=[str(tmp_path)], text_column="n"))


def test_parquet_without_rows_is_an_empty_corpus(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="empty"):
        plan(config(kind="parquet", paths=[str(tmp_path)]))


# --- this Python's documentation --------------------------------------------------------------------------------


def test_pydocs_gives_topics_and_docstrings_without_importing() -> None:
    import sys

    source = config(kind="pydocs")
    parts = plan(source)
    found = [doc for part in parts if part.uri in ("pydoc_data/topics.py", "this.py", "textwrap.py") for doc in
             sources.read(source.source, part)]  # fmt: skip
    assert any(doc.startswith("textwrap.dedent(text)\n\nRemove any common leading whitespace") for doc in found)
    assert any('The "assert" statement' in doc for doc in found)
    assert "this" not in sys.modules
    assert not any("site-packages" in part.uri or "/test/" in part.uri for part in parts)
    assert plan(config(kind="pydocs", docstrings=False)) == parts[:1]


# --- images -----------------------------------------------------------------------------------------------------


def paint(path: Path, value: int, size: tuple[int, int] = (4, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)


def test_an_image_folder_gives_pixels_and_class_names(tmp_path: Path) -> None:
    paint(tmp_path / "dog" / "2.png", 200)
    paint(tmp_path / "cat" / "1.PNG", 100)
    (tmp_path / "dog" / "broken.jpg").write_bytes(b"not an image")
    prepared = config(kind="image_folder", path=str(tmp_path))
    found = [p for part in plan(prepared) for p in sources.read(prepared.source, part, images=ImageConfig(channels=3))]
    assert [picture.label for picture in found] == ["cat", "dog", "dog"]
    assert [None if p.pixels is None else p.pixels.shape for p in found] == [(3, 3, 4), (3, 3, 4), None]
    assert found[0].pixels[0].tolist() == [[100] * 4] * 3


def test_an_image_in_no_class_folder_is_refused(tmp_path: Path) -> None:
    paint(tmp_path / "cat" / "1.png", 100)
    paint(tmp_path / "loose.png", 100)
    with pytest.raises(DataError, match=r"loose\.png lies in no class folder"):
        plan(config(kind="image_folder", path=str(tmp_path)))


@pytest.mark.parametrize("nested", [True, False])
def test_parquet_of_pixel_arrays_is_read(tmp_path: Path, nested: bool) -> None:
    images = np.linspace(0, 16, 24).reshape(2, 3, 4)
    rows = [image.tolist() if nested else image.reshape(-1).tolist() for image in images]
    pq.write_table(pa.table({"image": rows, "label": [7, 3]}), tmp_path / "a.parquet")
    prepared = config(kind="image_parquet", paths=[str(tmp_path)], pixel_max=16)
    size = ImageConfig(height=3, width=4)
    found = [p for part in plan(prepared) for p in sources.read(prepared.source, part, images=size)]
    assert [p.label for p in found] == ["7", "3"]
    assert np.array_equal(found[1].pixels, np.rint(images[1:] * 255 / 16).astype(np.uint8))


def test_parquet_of_encoded_images_is_read_and_resized(tmp_path: Path) -> None:
    paint(tmp_path / "x.png", 90, size=(8, 8))
    data = (tmp_path / "x.png").read_bytes()
    table = pa.table({"image": [{"bytes": data}, {"bytes": b"no"}, None], "label": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    prepared = config(kind="image_parquet", paths=[str(tmp_path)])
    size = ImageConfig(height=2, width=5, channels=3)
    found = [p for part in plan(prepared) for p in sources.read(prepared.source, part, images=size)]
    assert found[0].pixels.shape == (3, 2, 5)
    assert found[1].pixels is None
    assert found[2].pixels is None


def test_the_digits_are_the_real_ones() -> None:
    found = documents(kind="sklearn_digits")
    assert len(found) == 1797
    assert found[0].label == "0"
    assert found[0].pixels.shape == (1, 8, 8)
    assert max(picture.pixels.max() for picture in found) == 255


# --- object stores ----------------------------------------------------------------------------------------------


def test_an_unreachable_store_is_a_storage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(StorageError, match="cannot reach"):
        plan(config(kind="text", paths=["s3://corpus/texts"]))


@pytest.mark.slow
def test_an_s3_folder_is_listed_like_a_local_one(s3_store_uri: str) -> None:
    from modelyard.artifacts import filesystem

    fs, root = filesystem.resolve(s3_store_uri)
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        filesystem.write_bytes(fs, f"{root}/{name}", f"text of {name}".encode())
    assert documents(kind="text", paths=[s3_store_uri]) == ["text of a.txt", "text of b.txt", "text of sub/c.txt"]
    assert documents(kind="text", paths=[f"{s3_store_uri}/*.txt"]) == ["text of a.txt", "text of b.txt"]
    assert documents(kind="text", paths=[f"{s3_store_uri}/a.txt"]) == ["text of a.txt"]
    with pytest.raises((DataError, NotFoundError), match="nowhere"):
        plan(config(kind="text", paths=[f"{s3_store_uri}/nowhere"]))
