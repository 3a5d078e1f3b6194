"""Labelled and tagged text become rows of tokens, on a real Ray cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard.config import parse
from modelyard.data.config import PrepareConfig, TaggedText
from modelyard.data.dataset import Dataset
from modelyard.data.prepare import plan, prepare_folder
from modelyard.data.sentences import first_token_tags
from modelyard.data.sources import Part, Sentence, read
from modelyard.errors import DataError

WORDS = ["river", "stone", "cloud", "paper", "metal", "grass", "light", "sound"]
SPLITS = {"train": 0.6, "validation": 0.2, "test": 0.2}


def config(source: dict[str, Any], **changes: Any) -> PrepareConfig:
    sentences = {"max_tokens": 16, "tokenizer": {"kind": "train", "vocab_size": 400}}
    return parse(
        PrepareConfig, {"name": "corpus", "source": source, "sentences": sentences, "splits": SPLITS, **changes}
    )


def labelled(tmp_path: Path) -> dict[str, Any]:
    lines = [
        {"text": f"the {WORDS[n % 8]} number {n} of {WORDS[n // 8 % 8]}", "label": "low" if n < 30 else "high"}
        for n in range(60)
    ]
    lines += [lines[0], {"text": None, "label": "low"}, {"text": " ".join(WORDS * 4), "label": "high"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"kind": "labelled_text", "paths": [str(tmp_path / "a.jsonl")]}


def decoded(dataset: Dataset, ids: np.ndarray) -> str:
    from tokenizers import Tokenizer

    assert dataset.tokenizer_folder is not None
    return str(Tokenizer.from_file(str(dataset.tokenizer_folder / "tokenizer.json")).decode(ids.tolist()))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_each_text_is_a_padded_row_with_its_label(tmp_path: Path) -> None:
    info = prepare_folder(config(labelled(tmp_path)), tmp_path / "out")
    dataset = Dataset.open(tmp_path / "out")
    assert info.classes == ("high", "low")
    assert {name: info.documents[name] for name in ("documents", "unreadable", "exact_duplicates", "cut_short")} == {
        "documents": 63,
        "unreadable": 1,
        "exact_duplicates": 1,
        "cut_short": 1,
    }
    seen = []
    for split, count in info.splits.items():
        found = dataset.split(split).read(np.arange(count))
        for ids, length, label in zip(found["input_ids"], found["length"], found["label"], strict=True):
            text = decoded(dataset, ids[:length])
            assert length <= 16
            if "number" in text:
                number = int(text.split()[3])
                assert info.classes[label] == ("low" if number < 30 else "high")
                seen.append(number)
    assert sorted(seen) == list(range(60))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_each_words_first_token_has_its_tag(tmp_path: Path) -> None:
    blocks = [f"{WORDS[n % 8]}{n}\tB-thing\nunbelievable\tI-thing\nis{n}\tO\n" for n in range(40)]
    (tmp_path / "a.conll").write_text("\n".join(blocks))
    source = {"kind": "tagged_text", "paths": [str(tmp_path / "a.conll")]}
    info = prepare_folder(config(source), tmp_path / "out")
    dataset = Dataset.open(tmp_path / "out")
    assert info.classes == ("O", "B-thing", "I-thing")
    found = dataset.split("train").read(np.arange(info.splits["train"]))
    for tags in found["tags"]:
        assert tags[tags >= 0].tolist() == [1, 2, 0]
    assert (found["tags"][:, 0] == 1).all()
    assert (found["length"] > 3).any(), "some word has several tokens"


def test_only_the_first_token_of_a_word_is_tagged() -> None:
    assert first_token_tags([None, 0, 0, 1, 2, 2, None, None], [7, 8, 9]) == [-100, 7, -100, 8, 9, -100, -100, -100]


def test_sentences_end_at_empty_lines_and_fields_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1 Rome NNP B-LOC\n\n\n1 in IN O\n2 May NNP B-TIME")
    source = TaggedText(paths=(str(tmp_path),), word_field=1)
    (part,) = plan(config({"kind": "tagged_text", "paths": [str(tmp_path)], "word_field": 1}))
    assert list(read(source, part)) == [
        Sentence(("Rome",), ("B-LOC",)),
        Sentence(("in", "May"), ("O", "B-TIME")),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [("Rome LOC\n", "line 1: 'LOC' is no tag"), ("a O\nRome\n", "line 2: 'Rome' is no tag"), ("\x00", "no UTF-8 text")],
)
def test_files_without_tags_are_refused_with_the_place(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        list(read(TaggedText(paths=(str(path),)), Part(str(path))))
