from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.data import packing, tokenizer
from modelyard.data.config import TokenizerFolder
from modelyard.data.dataset import Column
from modelyard.data.packing import Packer
from modelyard.data.shards import find, open_columns
from modelyard.errors import ConfigError

TEXTS = ["the quick brown fox jumps over the lazy dog", "Grüße aus Köln, 東京, 🙂", "def f(x):\n    return x"] * 5


def test_the_order_of_texts_and_the_number_of_threads_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokenizer.train(TEXTS, 400)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    for seed in range(3):
        shuffled = random.Random(seed).sample(TEXTS, len(TEXTS))
        assert tokenizer.train(shuffled, 400) == first


def test_every_text_survives_a_round_trip(tmp_path: Path) -> None:
    trained = tokenizer.train(TEXTS, 300)
    encoder = tokenizer.encoder(trained.definition)
    for text in [*TEXTS, "ünseen ☃ \t\n  spaces", tokenizer.END_OF_TEXT]:
        assert encoder.decode(encoder.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_text_that_spells_end_of_text_does_not_end_it() -> None:
    trained = tokenizer.train(TEXTS, 300)
    ids = tokenizer.encoder(trained.definition).encode(f"a{tokenizer.END_OF_TEXT}b").ids
    assert trained.end_of_text_id not in ids


def test_transformers_loads_the_saved_folder(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    trained = tokenizer.train(TEXTS, 300)
    tokenizer.save(trained, tmp_path / "tok")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert loaded.is_fast
    assert len(loaded) == trained.vocab_size <= 300
    assert loaded.eos_token_id == trained.end_of_text_id
    assert loaded.encode("the lazy dog") == tokenizer.encoder(trained.definition).encode("the lazy dog").ids
    assert loaded.decode(loaded.encode("the lazy dog")) == "the lazy dog"


def test_an_existing_folder_is_used_as_it_is(tmp_path: Path) -> None:
    trained = tokenizer.train(TEXTS, 300)
    tokenizer.save(trained, tmp_path / "old")
    found = tokenizer.from_folder(TokenizerFolder(path=str(tmp_path / "old")), tmp_path / "new")
    assert found[1:] == trained[1:]
    assert (tmp_path / "new" / "tokenizer.json").is_file()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"text\.tokenizer\.path: the folder .* does not exist"):
        tokenizer.from_folder(TokenizerFolder(path=str(tmp_path / "no")), tmp_path / "new")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        tokenizer.from_folder(TokenizerFolder(path=str(tmp_path)), tmp_path / "new")


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    tokenizer.save(tokenizer.train(TEXTS, 300), tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ConfigError, match="no eos_token"):
        tokenizer.from_folder(TokenizerFolder(path=str(tmp_path)), tmp_path / "new")


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(2, 9), st.sampled_from([1, 20, 1 << 20]))
@settings(deadline=None)
def test_packing_keeps_every_token_in_order_but_the_last_incomplete_row(
    lengths: list[int], block: int, flush_tokens: int
) -> None:
    with tempfile.TemporaryDirectory() as name, mock.patch.object(packing, "_FLUSH_TOKENS", flush_tokens):
        folder, column = Path(name), Column(name="input_ids", dtype="uint16", shape=(block,))
        packer = Packer(folder, "train", column, rows_per_shard=3)
        stream = np.arange(sum(lengths), dtype=np.uint32)
        for piece in np.split(stream, np.cumsum(lengths)):
            packer.add(piece)
        packer.close()
        rows = [open_columns(path, [column])["input_ids"] for path in find(folder).get("train", [])]
        packed = np.concatenate([row.reshape(-1) for row in rows]) if rows else np.array([])
        assert packer.num_rows * block == len(packed) == len(stream) // block * block
        assert np.array_equal(packed, stream[: len(packed)])
