"""Where documents and images come from. Each kind plans its parts on the driver and reads them on the workers.

Document numbers are (part, place in the part), so neither the order nor the numbers depend on who reads what.
A new source is a config class and these two functions, registered for it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Part(NamedTuple):
    """A piece of a source that one task reads."""

    uri: str
    """A file, or a name that means something to its source."""
    start: int = 0
    """Where in the file the part begins: bytes, a row group, a number; as its source says."""
    stop: int = 0
    """Where it ends (exclusive)."""


class Picture(NamedTuple):
    """One image as a source gives it."""

    pixels: npt.NDArray[np.uint8] | None
    """(channels, height, width), or None when it cannot be read."""
    label: str
    """Name of its class."""


class Sentence(NamedTuple):
    """A text with its class, or a sequence of words with their tags."""

    text: str | tuple[str, ...] | None
    """The text, or its words; None when it cannot be read."""
    label: str | tuple[str, ...]
    """Name of the class, or of each word's tag."""


class Numbers(NamedTuple):
    """One row of numbers."""

    features: tuple[float, ...]
    targets: tuple[float, ...]


class Example(NamedTuple):
    """What one row of a dataset is made of."""

    columns: dict[str, npt.NDArray[Any]] | None
    """Arrays by column, or None when a file cannot be decoded."""
    names: tuple[str, ...] = ()
    """Class of each box, or the characters of a transcript: numbered once all of them are known."""
    split: str = ""
    """The split that the source says it belongs to, if it says so."""


@functools.singledispatch
def plan(source: Any, **_: Any) -> list[Part]:
    """The parts of a source, in order; runs on the driver and finds what is wrong before work starts.

    Raises:
        DataError: nothing is there, a file is damaged, or a column is missing.
        StorageError: the store cannot be reached.
    """
    raise NotImplementedError(type(source).__name__)


@functools.singledispatch
def read(source: Any, part: Part, **_: Any) -> Iterator[Any]:
    """What one part holds, in order; runs on a worker.

    Documents (`str`, or None when unreadable), `Picture`s, `Sentence`s, `Numbers`, `Example`s, or Arrow tables.
    """
    raise NotImplementedError(type(source).__name__)


def load_all() -> None:
    """Register every source; call before `plan` and `read` (a worker starts with nothing imported)."""
    from modelyard.data.sources import annotated, chats, images, parquet, pydocs, recordings, sentences, tables, text  # noqa: F401
