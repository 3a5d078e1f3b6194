"""From a text source to packed token shards: read, clean, deduplicate, split, tokenize, pack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from modelyard.data import deduplication, execution, selection, sources, tokenizer
from modelyard.data.cleaning import Verdict, clean
from modelyard.data.config import Chats, PrepareConfig, TextConfig, TokenizerFolder, TrainTokenizer
from modelyard.data.dataset import TOKENIZER_FOLDER, Column, DatasetInfo
from modelyard.data.packing import Packer
from modelyard.data.progress import OnProgress, Progress, finished
from modelyard.data.selection import Chosen
from modelyard.data.sources import Part
from modelyard.data.tokenizer import Tokenizer
from modelyard.errors import DataError

TOKENS = "input_ids"
_TRAIN = 0  # the train split comes first in Splits.shares()


def prepare_text(
    config: PrepareConfig,
    text: TextConfig,
    parts: Sequence[Part],
    folder: Path,
    report: OnProgress,
    num_blocks: int | None,
) -> DatasetInfo:
    """Write the shards and the tokenizer of a text source into `folder`.

    Raises:
        DataError: nothing is left, or a split has less than one block of tokens.
        ConfigError: the tokenizer folder cannot be used.
    """
    encoder = None
    if isinstance(text.tokenizer, TokenizerFolder):  # before any work: the folder may be wrong
        encoder = tokenizer.from_folder(text.tokenizer, folder / TOKENIZER_FOLDER)
    with execution.ray_data() as data:
        to_tables = partial(_to_tables, source=config.source, text=text)
        documents = execution.read_parts(data, parts, to_tables, num_blocks)
        similarity = text.deduplicate.similarity if text.deduplicate.near else None
        chosen = selection.choose(documents, config, similarity, report)
        if isinstance(text.tokenizer, TrainTokenizer):
            encoder = train_tokenizer(documents, chosen, text.tokenizer, folder / TOKENIZER_FOLDER)
        assert encoder is not None, "it was either read from a folder or trained"
        report(finished("tokenizer", vocabulary=encoder.vocab_size))
        packers = _pack(documents, chosen, encoder, config, text, folder, report)
    return DatasetInfo(
        format="tokens",
        columns=(_column(encoder, text),),
        splits={name: packer.num_rows for name, packer in packers.items()},
        vocab_size=encoder.vocab_size,
        block_tokens=text.block_tokens,
        end_of_text_id=encoder.end_of_text_id,
        tokenizer=TOKENIZER_FOLDER,
        documents=chosen.counts,
    )


def _to_tables(parts: Iterable[tuple[int, Part]], *, source: Any, text: TextConfig) -> Iterator[Any]:
    """Worker: documents with their verdicts, digests and signatures."""
    items = execution.number_items(parts, partial(sources.read, source))
    for batch in execution.in_batches(items, lambda content: len(content or "")):
        judged = [
            (verdict, "") if verdict is Verdict.FAILED else clean(content, text.clean) for _, verdict, content in batch
        ]
        texts = [content for _, content in judged]
        digests = deduplication.content_digests([content.encode() for content in texts])
        columns = {
            **execution.heads(batch, [verdict for verdict, _ in judged]),
            "digest": execution.fixed_lists(digests),
            "text": pa.array(texts, pa.large_string()),
        }
        if text.deduplicate.near:
            columns["signature"] = execution.fixed_lists(deduplication.signatures(texts))
        yield pa.table(columns)


def train_tokenizer(documents: Any, chosen: Chosen, config: TrainTokenizer, target: Path) -> Tokenizer:
    """Train on the train split in one task, next to the texts: only the tokenizer travels."""
    import ray

    train_ids = chosen.ids[chosen.splits == _TRAIN]
    task = ray.remote(_train_on_tables).options(num_cpus=1)
    trained: Tokenizer = ray.get(task.remote(documents.to_arrow_refs(), train_ids, config))
    tokenizer.save(trained, target)
    return trained


def _train_on_tables(refs: Sequence[Any], train_ids: npt.NDArray[np.int64], config: TrainTokenizer) -> Tokenizer:
    """Worker: train on the texts of `train_ids`; of too many, on every k-th."""
    import os

    import ray

    os.environ["TOKENIZERS_PARALLELISM"] = "true"

    def texts(ids: npt.NDArray[np.int64]) -> Iterator[str]:
        for ref in refs:
            table = ray.get(ref)
            if table.num_rows:
                wanted = np.isin(table["id"].to_numpy(), ids, assume_unique=True)
                yield from table["text"].filter(pa.array(wanted)).to_pylist()

    characters = sum(len(text) for text in texts(train_ids))
    every = -(-characters // (config.max_training_mib << 20))
    return tokenizer.train(texts(train_ids[:: max(1, every)]), config.vocab_size)


def _pack(
    documents: Any,
    chosen: Chosen,
    encoder: Tokenizer,
    config: PrepareConfig,
    text: TextConfig,
    folder: Path,
    report: OnProgress,
) -> dict[str, Packer]:
    """Tokenize on the workers, pack here in the order of ids: tokens travel, texts do not."""
    names = list(config.splits.shares())
    column = _column(encoder, text)
    packers = {name: Packer(folder, name, column, config.rows_per_shard) for name in names}
    marks = isinstance(config.source, Chats)
    task = partial(_tokenize, chosen=chosen, encoder=encoder, marks=marks)
    done = 0
    tokenized = documents.map_batches(task, batch_size=None, batch_format="pyarrow")
    for table in execution.tables(tokenized):
        lists = table["tokens"].combine_chunks()
        tokens, lengths = lists.flatten().to_numpy(), lists.value_lengths().to_numpy()
        owners = np.repeat(table["split"].to_numpy(), lengths)
        for code, name in enumerate(names):
            packers[name].add(tokens[owners == code])
        done += table.num_rows
        if done < len(chosen.ids):
            report(Progress("pack", done, len(chosen.ids), {}))
    counts = {"tokens": sum(packer.num_tokens for packer in packers.values())}
    _check_blocks({name: packer.num_tokens for name, packer in packers.items()}, text.block_tokens)
    for packer in packers.values():
        packer.close()
    report(finished("pack", **counts, **{f"{name}_rows": packer.num_rows for name, packer in packers.items()}))
    return packers


def _tokenize(block: Any, *, chosen: Chosen, encoder: Tokenizer, marks: bool) -> Any:
    """Worker: the tokens of the documents that stay, each ended by end-of-text; `marks` tells special tokens apart."""
    empty = {"split": pa.array([], pa.uint8()), "tokens": pa.array([], pa.large_list(pa.uint32()))}
    if not block.num_rows:
        return pa.table(empty)
    stays, codes = chosen.split_codes(block["id"].to_numpy())
    texts = block["text"].filter(pa.array(stays)).to_pylist()
    bpe = tokenizer.encoder(encoder.definition, marks)
    encoded = [
        np.array([*bpe.encode(t, add_special_tokens=False).ids, encoder.end_of_text_id], np.uint32) for t in texts
    ]
    if not encoded:
        return pa.table(empty)
    offsets = np.concatenate([[0], np.cumsum([len(tokens) for tokens in encoded])])
    tokens = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(np.concatenate(encoded)))
    return pa.table({"split": pa.array(codes), "tokens": tokens})


def _check_blocks(tokens: dict[str, int], block_tokens: int) -> None:
    if sum(tokens.values()) < block_tokens:
        raise DataError(
            f"the corpus has {sum(tokens.values())} tokens, less than one block of {block_tokens}",
            f"set text.block_tokens to at most {min(tokens.values())}, or give a longer corpus",
        )
    for name, count in tokens.items():
        if count < block_tokens:
            raise DataError(
                f"split {name!r} has {count} tokens, less than one block of {block_tokens}",
                f"set text.block_tokens to at most {count}, raise splits.{name}, or set it to 0",
            )


def _column(encoder: Tokenizer, text: TextConfig) -> Column:
    dtype = "uint16" if encoder.vocab_size <= 1 << 16 else "uint32"
    return Column(name=TOKENS, dtype=dtype, shape=(text.block_tokens,))
