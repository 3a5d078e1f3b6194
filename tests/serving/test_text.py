"""Tokens to text while they come."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tests.serving.models import tiny_llama

from modelyard.serving.protocol import TokenLogprob, Tokens
from modelyard.serving.text import AnswerText, Detokenizer, StopScanner, TokenBytes
from modelyard.tasks.generation import load_tokenizer

TEXTS = [
    "naïve café, 東京, 😀 🚀!",
    "  two  spaces\n\n\ttab ",
    "👩‍👩‍👧‍👦 family",
    "plain",
    "",
    "é" * 9,
    "日本語のテキスト",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(tiny_llama(tmp_path_factory.mktemp("m") / "tiny"))


@pytest.mark.parametrize("text", TEXTS)
def test_a_character_is_never_broken_and_the_pieces_are_the_text(tokenizer: Any, text: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer(text).input_ids
    pieces = [detokenizer.add([number]) for number in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + detokenizer.flush() == text
    if "東" in text or "😀" in text:
        assert "" in pieces  # some characters really are split over tokens


def test_pieces_are_given_as_soon_as_they_are_whole(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.add([number]) for number in tokenizer("ab").input_ids][-1] != ""


def test_an_unfinished_character_at_the_end_becomes_a_replacement(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer("a🚀").input_ids
    assert detokenizer.add(ids[:-1]) in ("", "a")
    assert detokenizer.flush().endswith("\ufffd")


def test_a_sentencepiece_tokenizer_keeps_its_spaces() -> None:
    """Decoding token by token would lose them: such a tokenizer strips the space of whatever comes first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3, "<0xC3>": 4, "<0xA9>": 5, "▁": 6}
    bpe = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.add([number]) for number in (1, 2, 3, 4, 5, 1)] == ["the", " cat", "s", "", "é", " the"]
    assert TokenBytes(tokenizer)(4) == ("\ufffd", b"\xc3")
    assert TokenBytes(tokenizer)(2) == (" cat", b" cat")


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["hello ", "wor", "ld"], ["wor"], "hello "),
        (["hel", "lo ST", "O", "P more"], ["STOP"], "hello "),
        (["S", "T", "O", "x"], ["STOP"], "STOx"),
        (["aaa", "b"], ["aab"], "a"),
        (["one two"], ["two", "one"], ""),
        (["xAB"], ["ABC", "B"], "xA"),
        (["ends with ST"], ["STOP"], "ends with ST"),
        (["any"], ["", "zzz"], "any"),
        (["a\n", "\nb"], ["\n\n"], "a"),
    ],
)
def test_text_ends_before_the_first_stop_string(pieces: list[str], stops: list[str], expected: str) -> None:
    scanner = StopScanner(stops)
    shown = ""
    for piece in pieces:
        shown += scanner.add(piece)
        assert expected.startswith(shown)  # nothing of a stop string is ever shown, not even for a moment
    assert shown + scanner.flush() == expected


def test_random_texts_end_at_the_same_place_in_whatever_pieces_they_come() -> None:
    generator = random.Random(0)
    for _ in range(500):
        text = "".join(generator.choices("ab", k=30))
        stops = ["".join(generator.choices("ab", k=generator.randint(2, 6))) for _ in range(2)]
        scanner, shown, place = StopScanner(stops), "", 0
        while place < len(text):
            step = generator.randint(1, 4)
            shown += scanner.add(text[place : place + step])
            place += step
        shown += "" if scanner.found else scanner.flush()
        found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]  # whole first, ends it
        assert scanner.found == bool(found)
        assert shown == (text[: min(found)[1]] if found else text)


def test_log_probabilities_come_with_their_text_and_not_after_a_stop_string(tokenizer: Any) -> None:
    ids = tokenizer("The fox 😀 answer: STOP it").input_ids
    answer = AnswerText(tokenizer, ["STOP"])
    text, shown = "", []
    for number in ids:
        new, logprobs = answer.add(Tokens((number,), (TokenLogprob(number, -1.0),)))
        text += new
        shown += [one.token_id for one in logprobs]
        assert tokenizer.decode(shown).replace("\ufffd", "").rstrip() in text or not shown
        if answer.stopped:
            break
    assert text == "The fox 😀 answer: "
    assert tokenizer.decode(shown).strip() == text.strip()


def test_all_log_probabilities_are_out_at_the_end(tokenizer: Any) -> None:
    ids = tokenizer("a 🚀")["input_ids"][:-1]
    answer = AnswerText(tokenizer, [])
    _, first = answer.add(Tokens(tuple(ids), tuple(TokenLogprob(number, -1.0) for number in ids)))
    text, rest = answer.finish()
    assert [one.token_id for one in (*first, *rest)] == ids
    assert text.endswith("\ufffd")


def test_bytes_of_tokens_join_to_the_bytes_of_the_text(tokenizer: Any) -> None:
    single = TokenBytes(tokenizer)
    for text in TEXTS:
        assert b"".join(single(number)[1] for number in tokenizer(text).input_ids) == text.encode()
    assert single(0) == ("<|end|>", b"")  # no part of the text
