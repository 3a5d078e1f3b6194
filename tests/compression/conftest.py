"""Small real models: a language model that was trained on English, and a classifier of real digits."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from modelyard.artifacts import Registry
from modelyard.data.dataset import INFO_FILE, Column, DatasetInfo
from modelyard.data.shards import ShardWriter
from modelyard.tasks import CausalLM, ImageClassification
from modelyard.tasks.language_models import LlamaModel, quiet_progress

BLOCK_TOKENS = 64


class Folders(NamedTuple):
    """A trained model and the dataset that it was trained on."""

    model: Path
    dataset: Path


@pytest.fixture(scope="session")
def language(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A Llama of two layers, trained for some seconds on Python's documentation."""
    root = tmp_path_factory.mktemp("language")
    dataset, info = _text_dataset(root / "dataset")
    task = CausalLM(
        model=LlamaModel(layers=2, hidden_size=64, heads=4, kv_heads=2, intermediate_size=192, tied_embeddings=True)
    )
    torch.manual_seed(0)
    model = task.build(info, dataset)
    _train(task, model, dataset, steps=120, batch=16, rate=3e-3)
    task.save(model, root / "model", dataset)
    return Folders(root / "model", dataset)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A convolutional classifier of scikit-learn's digits, trained for some seconds."""
    root = tmp_path_factory.mktemp("digits")
    dataset, info = _digits_dataset(root / "dataset")
    task = ImageClassification()
    torch.manual_seed(0)
    model = task.build(info, dataset)
    _train(task, model, dataset, steps=150, batch=64, rate=2e-3)
    task.save(model, root / "model", dataset)
    return Folders(root / "model", dataset)


@pytest.fixture
def registry(isolated_environment: None) -> Registry:
    """The registry of the test's own environment."""
    return Registry.from_settings()


@pytest.fixture
def registered(registry: Registry) -> Any:
    """Registers a model and its dataset; returns both references."""

    def register(folders: Folders, name: str) -> tuple[str, str]:
        model = registry.register(registry.store.put(folders.model, kind="model", name=name))
        dataset = registry.register(registry.store.put(folders.dataset, kind="dataset", name=name))
        return model.reference, dataset.reference

    return register


def _train(task: Any, model: Any, dataset: Path, *, steps: int, batch: int, rate: float) -> None:
    from modelyard.data.dataset import Dataset

    split = Dataset.open(dataset).split("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    rng = np.random.default_rng(0)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        rows = task.collate(split.read(rng.integers(split.num_rows, size=batch)), "cpu")
        task.loss(model, rows).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _text_dataset(folder: Path) -> tuple[Path, DatasetInfo]:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    texts = list(_texts())
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=512, special_tokens=["<|end|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>")
    with quiet_progress():
        tokenizer.save_pretrained(folder / "tokenizer")
    ids = np.concatenate([np.array([*bpe.encode(text).ids, 0]) for text in texts])
    rows = ids[: len(ids) // BLOCK_TOKENS * BLOCK_TOKENS].reshape(-1, BLOCK_TOKENS).astype(np.uint16)[:1200]
    columns = (Column(name="input_ids", dtype="uint16", shape=(BLOCK_TOKENS,)),)
    info = DatasetInfo(
        format="tokens",
        columns=columns,
        splits={"train": len(rows) - 48, "validation": 16, "test": 32},
        vocab_size=512,
        block_tokens=BLOCK_TOKENS,
        end_of_text_id=0,
        tokenizer="tokenizer",
    )
    _write(folder, info, {"input_ids": rows})
    return folder, info


def _texts() -> Iterator[str]:
    from pydoc_data.topics import topics

    names = sorted(topics)
    random.Random(0).shuffle(names)
    for name in names[:40]:
        yield inspect.cleandoc(topics[name])


def _digits_dataset(folder: Path) -> tuple[Path, DatasetInfo]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    pixels = (digits.images[order, None] * 15.9375).astype(np.uint8)
    labels = digits.target[order].astype(np.int64)
    columns = (Column(name="pixels", dtype="uint8", shape=(1, 8, 8)), Column(name="label", dtype="int64"))
    info = DatasetInfo(
        format="images",
        columns=columns,
        splits={"train": len(labels) - 597, "validation": 197, "test": 400},
        classes=tuple(map(str, range(10))),
    )
    _write(folder, info, {"pixels": pixels, "label": labels})
    return folder, info


def _write(folder: Path, info: DatasetInfo, columns: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for split, count in info.splits.items():
        writer = ShardWriter(folder, split, info.columns, rows_per_shard=10_000)
        writer.write({name: values[start : start + count] for name, values in columns.items()})
        writer.close()
        start += count
    (folder / INFO_FILE).write_text(info.model_dump_json())
