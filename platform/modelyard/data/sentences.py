"""From labelled or tagged text to shards of tokens: read, deduplicate, split, tokenize, write."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from modelyard.data import deduplication, execution, selection, sources, tokenizer
from modelyard.data.cleaning import Verdict
from modelyard.data.config import PrepareConfig, SentenceConfig, TaggedText, TokenizerFolder
from modelyard.data.dataset import TOKENIZER_FOLDER, Column, DatasetInfo
from modelyard.data.progress import OnProgress, Progress, finished
from modelyard.data.selection import Chosen
from modelyard.data.shards import SplitWriters
from modelyard.data.sources import Part
from modelyard.data.text import train_tokenizer
from modelyard.data.tokenizer import Tokenizer
from modelyard.errors import DataError

TOKENS, LENGTH, LABEL, TAGS = "input_ids", "length", "label", "tags"
IGNORED = -100
"""Tag of a token that begins no word."""
OUTSIDE = "O"


class Encoding(NamedTuple):
    """How sentences become rows; travels to the workers."""

    tokenizer: Tokenizer
    max_tokens: int
    classes: tuple[str, ...]
    is_tagged: bool

    def columns(self) -> tuple[Column, ...]:
        """The columns of the dataset."""
        dtype = "uint16" if self.tokenizer.vocab_size <= 1 << 16 else "uint32"
        last = Column(name=TAGS, dtype="int16", shape=(self.max_tokens,))
        return (
            Column(name=TOKENS, dtype=dtype, shape=(self.max_tokens,)),
            Column(name=LENGTH, dtype="int32"),
            last if self.is_tagged else Column(name=LABEL, dtype="int64"),
        )


def prepare_sentences(
    config: PrepareConfig,
    sentences: SentenceConfig,
    parts: Sequence[Part],
    folder: Path,
    report: OnProgress,
    num_blocks: int | None,
) -> DatasetInfo:
    """Write the shards and the tokenizer of labelled or tagged text into `folder`; equal texts stay once.

    Raises:
        DataError: nothing is left, a split is empty, or there are fewer than two classes.
        ConfigError: the tokenizer folder cannot be used.
    """
    target = folder / TOKENIZER_FOLDER
    encoder = None
    if isinstance(sentences.tokenizer, TokenizerFolder):  # before any work: the folder may be wrong
        encoder = tokenizer.from_folder(sentences.tokenizer, target, ends_documents=False)
    with execution.ray_data() as data:
        to_tables = partial(_to_tables, source=config.source)
        found = execution.read_parts(data, parts, to_tables, num_blocks)
        chosen = selection.choose(found, config, None, report)
        is_tagged = isinstance(config.source, TaggedText)
        classes = _classes(found, chosen, is_tagged)
        if not isinstance(sentences.tokenizer, TokenizerFolder):
            encoder = train_tokenizer(found, chosen, sentences.tokenizer, target)
        assert encoder is not None, "it was either read from a folder or trained"
        report(finished("tokenizer", vocabulary=encoder.vocab_size))
        encoding = Encoding(encoder, sentences.max_tokens, classes, is_tagged)
        rows, cut = _write(found, chosen, encoding, config, folder, report)
    return DatasetInfo(
        format="tagged_text" if is_tagged else "labelled_text",
        columns=encoding.columns(),
        splits=rows,
        vocab_size=encoder.vocab_size,
        block_tokens=sentences.max_tokens,
        classes=classes,
        end_of_text_id=encoder.end_of_text_id,
        tokenizer=TOKENIZER_FOLDER,
        documents={**chosen.counts, "cut_short": cut},
    )


def bio_classes(tags: Iterable[str]) -> tuple[str, ...]:
    """`O`, then `B-NAME` and `I-NAME` of every name among the tags."""
    names = sorted({tag[2:] for tag in tags if tag != OUTSIDE})
    return (OUTSIDE, *(f"{mark}-{name}" for name in names for mark in "BI"))


def _to_tables(parts: Iterable[tuple[int, Part]], *, source: Any) -> Iterator[Any]:
    """Worker: sentences with their verdicts and digests; words and tags travel as JSON."""
    items = execution.number_items(parts, partial(sources.read, source))
    for batch in execution.in_batches(items, lambda content: len(getattr(content, "text", None) or "") + 64):
        texts = ["" if verdict is Verdict.FAILED else _content(item.text) for _, verdict, item in batch]
        labels = ["" if verdict is Verdict.FAILED else _content(item.label) for _, verdict, item in batch]
        verdicts = [
            Verdict.UNREADABLE if verdict is Verdict.KEPT and not text.strip() else verdict
            for (_, verdict, _), text in zip(batch, texts, strict=True)
        ]
        yield pa.table(
            {
                **execution.heads(batch, verdicts),
                "digest": execution.fixed_lists(deduplication.content_digests([text.encode() for text in texts])),
                "text": pa.array(texts, pa.large_string()),
                "label": pa.array(labels, pa.large_string()),
            }
        )


def _content(value: Any) -> str:
    return value or "" if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False)


def _classes(found: Any, chosen: Chosen, is_tagged: bool) -> tuple[str, ...]:
    labels: set[str] = set()
    for table in execution.tables(found, ["id", "label"]):
        stays, _ = chosen.split_codes(table["id"].to_numpy())
        kept = table["label"].filter(pa.array(stays)).unique().to_pylist()
        labels.update(tag for label in kept for tag in (json.loads(label) if is_tagged else [label]))
    classes = bio_classes(labels) if is_tagged else tuple(sorted(labels))
    if len(classes) < 2:
        raise DataError(f"the corpus knows {len(classes)} classes", "at least 2 are needed: check the label column")
    return classes


def _write(
    found: Any, chosen: Chosen, encoding: Encoding, config: PrepareConfig, folder: Path, report: OnProgress
) -> tuple[dict[str, int], int]:
    """Tokenize on the workers, write here in the order of ids. Rows of each split, and how many texts were cut."""
    columns = encoding.columns()
    writers = SplitWriters(folder, list(config.splits.shares()), columns, config.rows_per_shard)
    done = cut = 0
    encoded = found.map_batches(
        partial(_encode, chosen=chosen, encoding=encoding), batch_size=None, batch_format="pyarrow"
    )
    for table in execution.tables(encoded):
        rows = {column.name: _rows(table[column.name], column) for column in columns}
        writers.write(rows, table["split"].to_numpy())
        done, cut = done + table.num_rows, cut + int(table["cut"].to_numpy().sum())
        if done < len(chosen.ids):
            report(Progress("pack", done, len(chosen.ids), {}))
    counts = writers.close()
    shown = {f"{name}_rows": count for name, count in counts.items()}
    report(finished("pack", classes=len(encoding.classes), cut_short=cut, **shown))
    return counts, cut


def _rows(column: Any, described: Column) -> Any:
    values = execution.from_fixed_lists(column) if described.shape else column.to_numpy()
    return values.astype(described.dtype)


def _encode(block: Any, *, chosen: Chosen, encoding: Encoding) -> Any:
    """Worker: the rows of the sentences that stay."""
    if not block.num_rows:
        return pa.table({"split": pa.array([], pa.uint8())})
    stays, codes = chosen.split_codes(block["id"].to_numpy())
    kept = block.filter(pa.array(stays))
    if not kept.num_rows:
        return pa.table({"split": pa.array([], pa.uint8())})
    texts, labels = kept["text"].to_pylist(), kept["label"].to_pylist()
    if encoding.is_tagged:
        texts, labels = [json.loads(text) for text in texts], [json.loads(label) for label in labels]
    bpe = padding_encoder(encoding.tokenizer.definition, encoding.max_tokens)
    found = bpe.encode_batch(texts, is_pretokenized=encoding.is_tagged)
    numbers = {name: number for number, name in enumerate(encoding.classes)}
    columns = {
        "split": pa.array(codes),
        "cut": pa.array([bool(one.overflowing) for one in found]),
        TOKENS: execution.fixed_lists(np.array([one.ids for one in found], dtype=np.uint32)),
        LENGTH: pa.array([sum(one.attention_mask) for one in found], pa.int32()),
    }
    if encoding.is_tagged:
        tags = [
            first_token_tags(one.word_ids, [numbers[t] for t in tag]) for one, tag in zip(found, labels, strict=True)
        ]
        columns[TAGS] = execution.fixed_lists(np.array(tags, dtype=np.int16))
    else:
        columns[LABEL] = pa.array([numbers[label] for label in labels], pa.int64())
    return pa.table(columns)


def first_token_tags(word_ids: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """The tag of each word at its first token, `IGNORED` at all other tokens."""
    out, before = [], None
    for word in word_ids:
        out.append(IGNORED if word is None or word == before else tags[word])
        before = word
    return out


@functools.lru_cache(maxsize=4)
def padding_encoder(definition: str, max_tokens: int) -> Any:
    """The encoder of a definition with rows of exactly `max_tokens`. Text that looks special stays text."""
    import tokenizers

    bpe = tokenizers.Tokenizer.from_str(definition)
    bpe.encode_special_tokens = True
    bpe.enable_truncation(max_tokens)
    pad = next((name for name in ("[PAD]", "<pad>", tokenizer.END_OF_TEXT) if bpe.token_to_id(name) is not None), None)
    bpe.enable_padding(length=max_tokens, pad_id=bpe.token_to_id(pad) if pad else 0, pad_token=pad or "[PAD]")
    return bpe
