"""Tiny datasets and tokenizers for the tests of tasks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from modelyard.data.dataset import Column, Dataset, DatasetInfo
from modelyard.data.shards import ShardWriter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from modelyard.tasks import Task

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


def texts_folder(
    folder: Path, texts: list[str] | list[list[str]], answers: list[str] | list[list[str]], tokens: int = 16
) -> Path:
    """Texts with classes, or words with tags, as a dataset with splits train and test, the same rows in both."""
    from modelyard.data.sentences import bio_classes, first_token_tags, padding_encoder

    is_tagged = not isinstance(answers[0], str)
    words = texts if is_tagged else [text.split() for text in texts if isinstance(text, str)]
    size = train_tokenizer(folder / "tokenizer", 500, " ".join(word for row in words for word in row))
    bpe = padding_encoder((folder / "tokenizer" / "tokenizer.json").read_text(), tokens)
    found = bpe.encode_batch(texts, is_pretokenized=is_tagged)
    flat = [tag for row in answers for tag in row] if is_tagged else [str(answer) for answer in answers]
    classes = bio_classes(flat) if is_tagged else tuple(sorted(set(flat)))
    rows: dict[str, np.ndarray] = {
        "input_ids": np.array([one.ids for one in found], np.uint16),
        "length": np.array([sum(one.attention_mask) for one in found], np.int32),
    }
    last = Column(name="tags", dtype="int16", shape=(tokens,)) if is_tagged else Column(name="label", dtype="int64")
    if is_tagged:
        numbers = [[classes.index(tag) for tag in row] for row in answers]
        tags = [first_token_tags(one.word_ids, row) for one, row in zip(found, numbers, strict=True)]
        rows["tags"] = np.array(tags, np.int16)
    else:
        rows["label"] = np.array([classes.index(answer) for answer in flat], np.int64)
    columns = (
        Column(name="input_ids", dtype="uint16", shape=(tokens,)),
        Column(name="length", dtype="int32"),
        last,
    )
    info = DatasetInfo(
        format="tagged_text" if is_tagged else "labelled_text",
        columns=columns,
        splits={},
        vocab_size=size,
        block_tokens=tokens,
        classes=classes,
        end_of_text_id=0,
        tokenizer="tokenizer",
    )
    return write_dataset(folder, info, {"train": rows, "test": rows})


def train(task: Task, folder: Path, steps: int, *, batch: int = 16, rate: float = 3e-3) -> nn.Module:
    """A model of the task, trained on a dataset for a few steps in this process."""
    import torch

    dataset = Dataset.open(folder)
    torch.manual_seed(0)
    model = task.build(dataset.info, folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    rows, generator = dataset.split("train"), np.random.default_rng(0)
    for _ in range(steps):
        chosen = generator.integers(0, rows.num_rows, batch)
        optimizer.zero_grad()
        task.loss(model, task.collate(rows.read(chosen), "cpu")).mean().backward()
        optimizer.step()
    return model.eval()


def measure(task: Task, model: nn.Module, folder: Path, split: str = "test") -> dict[str, np.ndarray]:
    """The statistics (n,) of a split."""
    import torch

    rows = Dataset.open(folder).split(split)
    with torch.inference_mode():
        found = task.statistics(model, task.collate(rows.read(np.arange(rows.num_rows)), "cpu"))
    return {name: values.numpy() for name, values in found.items()}


def row_losses(task: Task, model: nn.Module, rows: Mapping[str, np.ndarray]) -> Tensor:
    """The loss of each row, (B,), without gradients."""
    import torch

    with torch.inference_mode():
        return task.loss(model, task.collate(rows, "cpu"))


def share_one_buffer(model: nn.Module) -> None:
    """Make the weights views of one vector, as DeepSpeed's ZeRO leaves them."""
    import torch

    weights = list(model.parameters())
    buffer = torch.cat([weight.detach().reshape(-1) for weight in weights])
    for weight, part in zip(weights, buffer.split([weight.numel() for weight in weights]), strict=True):
        weight.data = part.view(weight.shape)


def assert_saved_whole(task: Task, model: nn.Module, folder: Path, target: Path) -> None:
    """A saved model loads by itself, pickle-free, equal in its task and in the loss of every row.

    Whether its weights are plain, gathered by name, or views of one buffer.
    """
    import torch

    from modelyard.tasks import load_model

    rows = Dataset.open(folder).split("test").read(np.arange(5))
    expected = row_losses(task, model.eval(), rows)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flat = copy.deepcopy(model)
    share_one_buffer(flat)
    ways = (("own", model, None), ("gathered", model, state), ("flat", flat, None))
    for name, saved, given in ways:
        place = target / name
        task.save(saved, place, folder, given)
        loaded_task, loaded = load_model(place)
        assert loaded_task == task
        torch.testing.assert_close(row_losses(loaded_task, loaded, rows), expected)
        assert {path.suffix for path in place.iterdir()} <= {".safetensors", ".json"}
