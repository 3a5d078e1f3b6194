"""Text with classes, and words with tags."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pyarrow as pa

from modelyard.data.cleaning import decode
from modelyard.data.config import LabelledText, TaggedText
from modelyard.data.sources import Part, Sentence, paths, plan, read, tables
from modelyard.errors import DataError

_TAG = re.compile(r"O|[BI]-.+")


@plan.register
def plan_labelled(source: LabelledText) -> list[Part]:
    """One part per file."""
    return tables.plan_files(source.paths)


@read.register
def read_labelled(source: LabelledText, part: Part) -> Iterator[Sentence]:
    """The rows of one file; a row without text or label is unreadable."""
    names = [source.text_column, source.label_column]
    table = tables.read_columns(part.uri, names, "source.text_column and source.label_column")
    texts, labels = (table[name].cast(pa.string()).to_pylist() for name in names)
    for text, label in zip(texts, labels, strict=True):
        yield Sentence(None if label is None else text, label or "")


@plan.register
def plan_tagged(source: TaggedText) -> list[Part]:
    """One part per file."""
    return [Part(file.uri) for file in paths.find_files(source.paths, ["*.txt", "*.conll", "*.bio"])]


@read.register
def read_tagged(source: TaggedText, part: Part) -> Iterator[Sentence]:
    """The sentences of one file.

    Raises:
        DataError: a line has too few fields, or a tag that is neither `O` nor `B-` or `I-` and a name.
    """
    with paths.open_stream(part.uri) as stream:
        text = decode(bytes(stream.read()))
    if text is None:
        raise DataError(f"{part.uri} is no UTF-8 text", "check `source` in the config")
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if fields:
            word, tag = _fields(fields, source, f"{part.uri}, line {number}")
            words.append(word)
            tags.append(tag)
        elif words:
            yield Sentence(tuple(words), tuple(tags))
            words, tags = [], []
    if words:
        yield Sentence(tuple(words), tuple(tags))


def _fields(fields: list[str], source: TaggedText, where: str) -> tuple[str, str]:
    try:
        word, tag = fields[source.word_field], fields[source.tag_field]
    except IndexError:
        raise DataError(
            f"{where}: {len(fields)} fields, but field {source.word_field} is the word and {source.tag_field} the tag",
            "set source.word_field and source.tag_field",
        ) from None
    if len(fields) < 2 or not _TAG.fullmatch(tag):
        raise DataError(f"{where}: {tag!r} is no tag; O, B-NAME or I-NAME is needed", "set source.tag_field")
    return word, tag
