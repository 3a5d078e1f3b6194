from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.data.cleaning import Verdict, clean, decode
from modelyard.data.config import Cleaning

ANY = Cleaning(min_characters=1)


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        ("cafe\u0301", "café"),
        ("one\r\ntwo\rthree", "one\ntwo\nthree"),
        ("tab\tstays, bell\x07 goes" + "x" * 30, "tab\tstays, bell goes" + "x" * 30),
        ("blank ends  \t\nhere", "blank ends\nhere"),
        ("a\n\n\n\n\n\nb", "a\n\n\nb"),
        ("  indent of the first line goes", "indent of the first line goes"),
        ("def f():\n    return 1", "def f():\n    return 1"),
        ("e\ufeff\u0301" + "x" * 30, "é" + "x" * 30),
        ("one\u2028two\x85three", "one\ntwo\nthree"),
        ("a lone \ud800 surrogate" + "x" * 30, "a lone  surrogate" + "x" * 30),
    ],
)
def test_text_is_put_right(dirty: str, expected: str) -> None:
    assert clean(dirty, ANY) == (Verdict.KEPT, expected)


@pytest.mark.parametrize("blank", ["", " ", "\n\t \n", "\x00\x01"[:0]])
def test_blank_text_is_too_short(blank: str) -> None:
    assert clean(blank, ANY) == (Verdict.TOO_SHORT, "")


def test_length_limits_are_inclusive() -> None:
    limits = Cleaning(min_characters=3, max_characters=5)
    verdicts = [clean("x" * count, limits)[0] for count in (2, 3, 5, 6, 100)]
    short, kept, long = Verdict.TOO_SHORT, Verdict.KEPT, Verdict.TOO_LONG
    assert verdicts == [short, kept, kept, long, long]


def test_random_bytes_are_not_text() -> None:
    garbage = np.random.default_rng(0).bytes(4096)
    assert decode(garbage) is None
    assert decode(garbage.replace(b"\0", b"")) is None
    assert clean(None, ANY)[0] is Verdict.UNREADABLE
    assert clean(garbage.decode("latin-1"), ANY)[0] is Verdict.UNREADABLE
    assert clean(garbage.decode("utf-8", "replace"), ANY)[0] is Verdict.UNREADABLE


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    assert decode("\ufeffgrüße".encode()) == "grüße"


@given(st.text(st.characters(), max_size=300))
@settings(deadline=None)
def test_cleaning_twice_changes_nothing_more(text: str) -> None:
    verdict, cleaned = clean(text, ANY)
    if verdict is Verdict.KEPT:
        assert clean(cleaned, ANY) == (verdict, cleaned)
        cleaned.encode("utf-8")
