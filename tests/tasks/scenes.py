"""Real digits of scikit-learn on small canvases, with their boxes and masks; tones that spell letters."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from modelyard.data.dataset import Column, DatasetInfo

from .conftest import write_dataset

SIDE, MOST = 32, 3
RATE = 8000


def canvas(
    draw: np.random.Generator, most: int = 2, classes: int = 2
) -> tuple[np.ndarray, np.ndarray, list[list[int]], list[int]]:
    """Pixels (3, SIDE, SIDE), mask (SIDE, SIDE) of 0 and 1 + class, corners and classes of up to `most` digits."""
    from sklearn.datasets import load_digits

    data = load_digits(n_class=classes)
    pixels = draw.integers(0, 40, (3, SIDE, SIDE)).astype(np.uint8)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    boxes, labels = [], []
    for _ in range(draw.integers(1, most + 1)):
        which = draw.integers(len(data.images))
        ink = data.images[which].repeat(2, axis=0).repeat(2, axis=1)
        rows, columns = np.flatnonzero(ink.max(axis=1)), np.flatnonzero(ink.max(axis=0))
        ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        height, width = ink.shape
        y, x = draw.integers(0, SIDE - height + 1), draw.integers(0, SIDE - width + 1)
        if mask[y : y + height, x : x + width].any():
            continue
        pixels[:, y : y + height, x : x + width] = np.maximum(
            pixels[:, y : y + height, x : x + width], (ink * 15).astype(np.uint8)
        )
        mask[y : y + height, x : x + width][ink > 4] = 1 + data.target[which]
        boxes.append([int(x), int(y), int(x + width), int(y + height)])
        labels.append(int(data.target[which]))
    return pixels, mask, boxes, labels


def _pixels(side: int = SIDE) -> Column:
    return Column(name="pixels", dtype="uint8", shape=(3, side, side))


def boxes_info(most: int = MOST, side: int = SIDE) -> DatasetInfo:
    """The description of a dataset of boxes."""
    columns = (
        _pixels(side),
        Column(name="boxes", dtype="float32", shape=(most, 4)),
        Column(name="labels", dtype="int16", shape=(most,)),
    )
    return DatasetInfo(format="boxes", columns=columns, splits={}, classes=("zero", "one"))


def masks_info(side: int = SIDE) -> DatasetInfo:
    """The description of a dataset of masks."""
    columns = (_pixels(side), Column(name="mask", dtype="uint8", shape=(side, side)))
    return DatasetInfo(format="masks", columns=columns, splits={}, classes=("ground", "zero", "one"))


def scene_rows(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The columns of datasets of boxes and of masks, from the same canvases."""
    draw = np.random.default_rng(seed)
    found = [canvas(draw) for _ in range(count)]
    boxes, labels = np.zeros((count, MOST, 4), np.float32), np.full((count, MOST), -1, np.int16)
    for place, (_, _, corners, numbers) in enumerate(found):
        here = np.array(corners, np.float32) / SIDE
        boxes[place, : len(here)] = np.concatenate([(here[:, :2] + here[:, 2:]) / 2, here[:, 2:] - here[:, :2]], axis=1)
        labels[place, : len(numbers)] = numbers
    return {
        "pixels": np.stack([row[0] for row in found]),
        "mask": np.stack([row[1] for row in found]),
        "boxes": boxes,
        "labels": labels,
    }


def scenes_folder(folder: Path, info: DatasetInfo, train: int = 200, test: int = 40) -> Path:
    """A dataset of boxes or of masks, splits train and test."""
    names = [column.name for column in info.columns]
    splits = {"train": scene_rows(train, 1), "test": scene_rows(test, 2)}
    return write_dataset(folder, info, {split: {name: rows[name] for name in names} for split, rows in splits.items()})


TONES = {"a": 400.0, "b": 900.0, "c": 2000.0, " ": 0.0}


def tones(text: str, draw: np.random.Generator, rate: int = RATE) -> np.ndarray:
    """A tone of about 0.15 s for each letter, silence for a space, and a little noise; float32 between -1 and 1."""
    pieces = [np.zeros(rate // 20)]
    for letter in text:
        time = np.arange(int(rate * draw.uniform(0.12, 0.2))) / rate
        pieces += [0.5 * np.sin(2 * np.pi * TONES[letter] * time), np.zeros(rate // 25)]
    sound = np.concatenate(pieces)
    return (sound + draw.normal(0, 0.003, len(sound))).astype(np.float32)


def wav(samples: np.ndarray, rate: int = RATE) -> bytes:
    """A WAV file of 16-bit numbers."""
    from scipy.io import wavfile

    held = io.BytesIO()
    wavfile.write(held, rate, np.rint(samples * 32767).astype(np.int16))
    return held.getvalue()


def speech_info(seconds: float = 1.5, characters: int = 8, rate: int = RATE) -> DatasetInfo:
    """The description of a dataset of speech."""
    columns = (
        Column(name="samples", dtype="int16", shape=(round(seconds * rate),)),
        Column(name="length", dtype="int32"),
        Column(name="text", dtype="int16", shape=(characters,)),
    )
    return DatasetInfo(format="speech", columns=columns, splits={}, classes=(" ", "a", "b", "c"), sample_rate=rate)


def speech_rows(count: int, seed: int = 0, info: DatasetInfo | None = None) -> dict[str, np.ndarray]:
    """The columns of a dataset of speech: words of tones."""
    info = info or speech_info()
    draw, size, most = np.random.default_rng(seed), info.columns[0].shape[0], info.columns[2].shape[0]
    rows = {
        "samples": np.zeros((count, size), np.int16),
        "length": np.zeros(count, np.int32),
        "text": np.full((count, most), -1, np.int16),
    }
    for place in range(count):
        text = "".join(draw.choice(list("abc"), draw.integers(1, 5)))
        assert info.sample_rate is not None
        sound = tones(text, draw, info.sample_rate)[:size]
        rows["samples"][place, : len(sound)] = np.rint(sound * 32767)
        rows["length"][place] = len(sound)
        rows["text"][place, : len(text)] = [info.classes.index(letter) for letter in text]
    return rows


def speech_folder(folder: Path, train: int = 200, test: int = 40, info: DatasetInfo | None = None) -> Path:
    """A dataset of speech, splits train and test."""
    info = info or speech_info()
    return write_dataset(folder, info, {"train": speech_rows(train, 1, info), "test": speech_rows(test, 2, info)})
