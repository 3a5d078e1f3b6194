"""Tokens to text while they come: whole characters only, and never a part of a stop string."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from modelyard.serving.protocol import TokenLogprob, Tokens

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer:
    """The text of one answer, piece by piece.

    A token's text depends on its neighbours (a character may be split over several, spaces may be merged), so the text
    of the newest tokens is decoded together with those just before them, and what ends inside a character waits.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._read = 0
        """Tokens before this are given out."""
        self._context = 0
        """Tokens from here to `_read` give the newest ones their neighbours."""

    def add(self, ids: Sequence[int]) -> str:
        """The text that is certain now, beyond what was given out before."""
        self._ids.extend(ids)
        before, after = self._decode(self._ids[self._context : self._read]), self._decode(self._ids[self._context :])
        if after.endswith(_REPLACEMENT) or len(after) <= len(before):
            return ""  # inside a character
        self._context, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        """What is left at the end of the answer; an unfinished character becomes U+FFFD."""
        before, after = self._decode(self._ids[self._context : self._read]), self._decode(self._ids[self._context :])
        self._context = self._read = len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopScanner:
    """Looks for stop strings in a text that comes in pieces; holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False
        """Whether a stop string came; the text ended before it."""

    def add(self, text: str) -> str:
        """The text that is certain to stand before any stop string."""
        if self.found:
            return ""
        self._held += text
        found = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.found = True
            _, place = min(found)  # what is whole first counts, in whatever pieces the text came
            passed, self._held = self._held[:place], ""
            return passed
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        passed, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return passed

    def flush(self) -> str:
        """What was held back, when the answer ends without a stop string."""
        passed, self._held = self._held, ""
        return passed


class AnswerText:
    """The text of one answer with its log probabilities, which come out with the text that they belong to."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._scanner = StopScanner(stops)
        self._came = 0
        self._passed = 0
        self._held: list[tuple[int, TokenLogprob]] = []
        """Each with the length of text that must be out before it."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string came."""
        return self._scanner.found

    def add(self, tokens: Tokens) -> tuple[str, tuple[TokenLogprob, ...]]:
        """What may be shown now."""
        if len(tokens.ids) > 1 and tokens.logprobs:
            parts = [
                self.add(Tokens((number,), (logprob,)))
                for number, logprob in zip(tokens.ids, tokens.logprobs, strict=True)
            ]
            return "".join(text for text, _ in parts), tuple(item for _, items in parts for item in items)
        new = self._detokenizer.add(tokens.ids)
        self._came += len(new)
        self._held += [(self._came + (not new), logprob) for logprob in tokens.logprobs]
        return self._release(self._scanner.add(new))

    def finish(self) -> tuple[str, tuple[TokenLogprob, ...]]:
        """The rest, at the end of the answer; nothing after a stop string."""
        text, shown = self._release(self._scanner.add(self._detokenizer.flush()))
        if self.stopped:
            return text, shown
        return text + self._scanner.flush(), shown + tuple(logprob for _, logprob in self._held)

    def _release(self, text: str) -> tuple[str, tuple[TokenLogprob, ...]]:
        self._passed += len(text)
        shown = tuple(logprob for end, logprob in self._held if end <= self._passed)
        self._held = [pair for pair in self._held if pair[0] > self._passed]
        return text, shown


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a beginning of `stop`, in characters."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class TokenBytes:
    """The text and the bytes of single tokens, for log probabilities."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.dumps(json.loads(backend.to_str())["decoder"]) if backend is not None else ""
        self._byte_level = '"ByteLevel"' in decoder
        self._special = frozenset(tokenizer.all_special_ids)

    def __call__(self, token_id: int) -> tuple[str, bytes]:
        """A token by itself. Its bytes may be a part of a character, its text then holds U+FFFD.

        A special token has no bytes, because it is not part of the text.
        """
        token = self._tokenizer.convert_ids_to_tokens(token_id) or ""
        if token_id in self._special:
            return token, b""
        if self._byte_level:
            data = bytes(_BYTES[character] for character in token if character in _BYTES)
            if len(data) == len(token):
                return data.decode("utf-8", errors="replace"), data
        if match := _BYTE_TOKEN.fullmatch(token):
            data = bytes([int(match[1], 16)])
            return data.decode("utf-8", errors="replace"), data
        text = token.replace("\u2581", " ")  # how SentencePiece writes a space
        return text, text.encode()


def _byte_alphabet() -> dict[str, int]:
    """Character to byte, as byte-level tokenizers write bytes since GPT-2: visible ones as themselves."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()
