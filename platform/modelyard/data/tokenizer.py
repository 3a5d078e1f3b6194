"""Tokenizers: a byte-level BPE trained here, or an existing folder; both end as a folder transformers reads."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from modelyard.data.config import TokenizerFolder
from modelyard.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(NamedTuple):
    """A tokenizer as it travels to the workers."""

    definition: str
    """The content of `tokenizer.json`."""
    end_of_text: str
    """The token that ends each document."""
    end_of_text_id: int
    vocab_size: int
    """One more than the highest id."""


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE. The same texts give the same tokenizer, in any order and on any number of threads."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return _describe(bpe, END_OF_TEXT)


def from_folder(config: TokenizerFolder, target: Path, *, ends_documents: bool = True) -> Tokenizer:
    """Use an existing tokenizer, and save it to `target`.

    With `ends_documents=False` an encoder's tokenizer will do, which marks the end by its separator.

    Raises:
        ConfigError: the folder is missing, holds no tokenizer, or the tokenizer has no end-of-text token.
    """
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"text.tokenizer.path: the folder {config.path!r} does not exist",
            "name a local folder with tokenizer.json and tokenizer_config.json, or use kind: train",
        )
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        bpe = loaded.backend_tokenizer
    except Exception as error:  # transformers raises anything for a folder it cannot read
        raise ConfigError(
            f"text.tokenizer.path: {config.path!r} holds no tokenizer transformers can load: {error}",
            "it needs tokenizer.json and tokenizer_config.json",
        ) from error
    end = loaded.eos_token if ends_documents else loaded.eos_token or loaded.sep_token or loaded.pad_token
    if end is None:
        raise ConfigError(
            f"text.tokenizer.path: the tokenizer in {config.path!r} has no eos_token to end documents with",
            "set eos_token in its tokenizer_config.json",
        )
    loaded.save_pretrained(target)
    return _describe(bpe, end)


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a trained tokenizer so that `transformers.AutoTokenizer.from_pretrained(folder)` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.definition, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": tokenizer.end_of_text,
        "pad_token": tokenizer.end_of_text,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 30,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@functools.lru_cache(maxsize=1)
def encoder(definition: str, marks: bool = False) -> Any:
    """The encoder of a definition; kept per process, for the next block.

    Text that looks special stays text, unless `marks` says that the text is a template's.
    """
    import tokenizers

    bpe = tokenizers.Tokenizer.from_str(definition)
    bpe.encode_special_tokens = not marks
    bpe.no_truncation()
    bpe.no_padding()
    return bpe


def _describe(bpe: Any, end_of_text: str) -> Tokenizer:
    vocabulary = bpe.get_vocab(with_added_tokens=True)
    return Tokenizer(
        definition=bpe.to_str(),
        end_of_text=end_of_text,
        end_of_text_id=vocabulary[end_of_text],
        vocab_size=max(vocabulary.values()) + 1,
    )
