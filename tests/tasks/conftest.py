"""Tiny datasets and tokenizers for the tests of tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from modelyard.data.dataset import Column, DatasetInfo
from modelyard.data.shards import ShardWriter

TEXT = "the quick brown fox jumps over the lazy dog; modelyard trains models. naïve café 東京. " * 20


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads and lose much on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_dataset(folder: Path, info: DatasetInfo, splits: dict[str, dict[str, np.ndarray]]) -> Path:
    """Write `splits` as a dataset folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        writer = ShardWriter(folder, name, info.columns, rows_per_shard=1000)
        writer.write(rows)
        writer.close()
    counts = {name: len(next(iter(rows.values()))) for name, rows in splits.items()}
    filled = info.with_changes(splits=counts)
    (folder / "dataset.json").write_text(json.dumps(filled.model_dump(mode="json")), encoding="utf-8")
    return folder


def train_tokenizer(folder: Path, vocab_size: int = 300, text: str = TEXT) -> int:
    """A byte-level BPE tokenizer in `folder`; returns its number of ids."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocab_size=vocab_size, special_tokens=["<|end|>"], show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>")
    fast.save_pretrained(folder)
    return len(fast)


@pytest.fixture
def tokens_folder(tmp_path: Path) -> Path:
    """A dataset of 12-token rows with a real tokenizer, splits train and test."""
    return make_tokens(tmp_path / "tokens")


def make_tokens(folder: Path, block: int = 12, vocab_size: int = 300, text: str = TEXT) -> Path:
    """A token dataset in `folder` made of `text`."""
    from transformers import AutoTokenizer

    size = train_tokenizer(folder / "tokenizer", vocab_size, text)
    ids = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))(text).input_ids
    rows = np.array(ids[: len(ids) // block * block], dtype=np.uint16).reshape(-1, block)
    info = DatasetInfo(
        format="tokens",
        columns=(Column(name="input_ids", dtype="uint16", shape=(block,)),),
        splits={},
        vocab_size=size,
        block_tokens=block,
        end_of_text_id=0,
        tokenizer="tokenizer",
    )
    return write_dataset(folder, info, {"train": {"input_ids": rows}, "test": {"input_ids": rows[:20]}})


def images_info(classes: int = 10, shape: tuple[int, ...] = (1, 8, 8)) -> DatasetInfo:
    """The description of an image dataset."""
    columns = (Column(name="pixels", dtype="uint8", shape=shape), Column(name="label", dtype="int64"))
    return DatasetInfo(format="images", columns=columns, splits={}, classes=tuple(f"c{i}" for i in range(classes)))


@pytest.fixture
def images_folder(tmp_path: Path) -> Path:
    """A dataset of random 8x8 images."""
    generator = np.random.default_rng(0)
    rows = {
        "pixels": generator.integers(0, 17, (30, 1, 8, 8)).astype(np.uint8),
        "label": generator.integers(0, 10, 30).astype(np.int64),
    }
    return write_dataset(tmp_path / "images", images_info(), {"train": rows, "test": rows})


@pytest.fixture
def tokens_of(tmp_path: Path) -> Callable[..., Path]:
    """Makes further token datasets: `tokens_of("name", block=8, vocab_size=400, text="...")`."""
    return lambda name, **options: make_tokens(tmp_path / name, **options)
