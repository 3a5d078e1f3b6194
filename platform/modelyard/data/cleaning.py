"""Cleaning of one document. Pure functions: the same bytes give the same text everywhere."""

from __future__ import annotations

import enum
import re
import unicodedata

from modelyard.data.config import Cleaning


class Verdict(enum.IntEnum):
    """What became of one document or image; the value travels as one byte."""

    KEPT = 0
    TOO_SHORT = 1
    TOO_LONG = 2
    UNREADABLE = 3
    """Not text (or not an image): binary garbage, a broken encoding."""
    FAILED = 4
    """The source itself is at fault, and the preparation must end; the text says why."""


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_LINE_ENDS = re.compile(r"\r\n?|[\x85\u2028\u2029]")
_BLANK_ENDS = re.compile(r"[ \t\u00a0]+\n")
_BLANK_LINES = re.compile(r"\n{4,}")
_GARBAGE_SHARE = 0.05
"""More control or replacement characters than this, and it is no text."""


def decode(data: bytes) -> str | None:
    """The text of UTF-8 bytes (with or without a byte order mark), or None when they are no text."""
    if b"\x00" in data:
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def clean(text: str | None, config: Cleaning) -> tuple[Verdict, str]:
    """Normalize one document: Unicode NFC, `\\n` line ends, no control characters, no trailing blanks.

    Returns:
        The verdict, and the clean text (empty unless it is kept).
    """
    if text is None:
        return Verdict.UNREADABLE, ""
    if len(text) > 4 * config.max_characters:  # spare the work: cleaning does not shorten text that much
        return Verdict.TOO_LONG, ""
    text = _LINE_ENDS.sub("\n", text)
    cleaned = _CONTROL.sub("", text)
    garbage = len(text) - len(cleaned) + text.count("\ufffd")
    if garbage > _GARBAGE_SHARE * len(text):
        return Verdict.UNREADABLE, ""
    cleaned = cleaned.encode("utf-8", "ignore").decode("utf-8")  # lone surrogates, which JSON can smuggle in
    cleaned = unicodedata.normalize("NFC", cleaned)
    cleaned = _BLANK_LINES.sub("\n\n\n", _BLANK_ENDS.sub("\n", cleaned)).strip()
    if len(cleaned) < config.min_characters:
        return Verdict.TOO_SHORT, ""
    if len(cleaned) > config.max_characters:
        return Verdict.TOO_LONG, ""
    return Verdict.KEPT, cleaned
