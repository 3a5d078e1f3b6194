"""Recordings with what is spoken in them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np

from modelyard.artifacts import filesystem
from modelyard.data import audio
from modelyard.data.config import Recordings, SpeechConfig
from modelyard.data.sources import Example, Part, manifests, plan, read
from modelyard.errors import DataError

_CHARACTERS_PER_SECOND = 30
"""More than anybody can say: the text belongs to another recording."""


@plan.register
def plan_recordings(source: Recordings) -> list[Part]:
    """Some lines of a file a part."""
    return manifests.plan_lines(source.paths)


@read.register
def read_recordings(source: Recordings, part: Part, section: SpeechConfig) -> Iterator[Example]:
    """The recordings of some lines.

    Raises:
        DataError: a recording is missing, too long or no WAV file, or its text is empty or too long.
    """
    for row in manifests.read_lines(part):
        uri = row.file(source.audio_column)
        fs, path = filesystem.resolve(uri)
        found, rate = audio.read_wav(filesystem.read_bytes(fs, path), f"{row.where}: {uri!r}")
        samples = audio.to_int16(audio.resample(found, rate, section.sample_rate))
        characters = transcript(row.text(source.text_column), section)
        _check(samples, characters, section, f"{row.where}: {uri!r}")
        padded = np.zeros(round(section.max_seconds * section.sample_rate), np.int16)
        padded[: len(samples)] = samples
        columns: dict[str, Any] = {"samples": padded, "length": np.array(len(samples), np.int32)}
        yield Example(columns, tuple(characters), row.split(source.split_column))


def transcript(text: str, section: SpeechConfig) -> str:
    """A text as a model learns it: composed characters, single spaces, small letters."""
    plain = " ".join(unicodedata.normalize("NFC", text).split())
    return plain.lower() if section.lower_case else plain


def _check(samples: Any, characters: str, section: SpeechConfig, where: str) -> None:
    seconds = len(samples) / section.sample_rate
    if len(samples) > round(section.max_seconds * section.sample_rate):
        raise DataError(
            f"{where} lasts {seconds:.1f} s, longer than speech.max_seconds={section.max_seconds:g}",
            "raise speech.max_seconds, or cut the recording",
        )
    if not characters:
        raise DataError(f"{where} has an empty text", "leave the row out")
    if len(characters) > section.max_characters:
        raise DataError(
            f"{where} has {len(characters)} characters, more than speech.max_characters={section.max_characters}",
            "raise speech.max_characters, or cut the recording",
        )
    if len(characters) > _CHARACTERS_PER_SECOND * seconds:
        raise DataError(
            f"{where} has {len(characters)} characters in {seconds:.2f} s, more than can be spoken",
            "check that the text belongs to this recording",
        )
