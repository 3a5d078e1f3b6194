"""Sound as numbers: WAV files to one channel of floats, and from one sample rate to another."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from modelyard.errors import DataError

Samples = npt.NDArray[np.float32]
"""One channel, (n,), between -1 and 1."""
RATES = (4000, 192_000)
"""Samples per second: fewer do not carry speech, more are no recording."""


def read_wav(data: bytes, what: str) -> tuple[Samples, int]:
    """The sound in a WAV file, its channels mixed, and its samples per second; `what` names it in errors.

    Raises:
        DataError: it is no WAV file, holds no sound, or a number that is not finite.
    """
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of chunks that are no sound
            rate, values = wavfile.read(io.BytesIO(data))
    except Exception as error:  # whatever a broken file makes the parser raise
        raise DataError(f"{what} is no WAV file: {error}", "convert it, e.g. `sox in.flac out.wav`") from error
    return mono(values, what), check_rate(rate, what)


def mono(values: npt.NDArray[Any], what: str) -> Samples:
    """Samples (n,) or (n, channels) of any WAV type as one channel between -1 and 1.

    Raises:
        DataError: there are none, or one is not finite.
    """
    if values.size == 0:
        raise DataError(f"{what} holds no sound", "leave it out")
    floats: npt.NDArray[Any] = values.astype(np.float32)
    if values.dtype == np.uint8:
        floats = (floats - 128) / 128
    elif np.issubdtype(values.dtype, np.integer):
        floats = floats / -float(np.iinfo(values.dtype).min)
    if not np.isfinite(floats).all():
        raise DataError(f"{what} holds a number that is not finite", "record or convert it again")
    found: Samples = floats.mean(axis=1, dtype=np.float32) if floats.ndim == 2 else floats
    return np.clip(found, -1, 1)


def check_rate(rate: int, what: str) -> int:
    """The sample rate, if it is one.

    Raises:
        DataError: it is not.
    """
    if not RATES[0] <= rate <= RATES[1]:
        raise DataError(f"{what} has {rate} samples per second; {RATES[0]} to {RATES[1]} are understood")
    return int(rate)


def resample(samples: Samples, rate: int, wanted: int) -> Samples:
    """The same sound at `wanted` samples per second, by a polyphase filter."""
    if rate == wanted:
        return samples
    from scipy.signal import resample_poly

    shared = math.gcd(rate, wanted)
    found: Samples = np.clip(resample_poly(samples, wanted // shared, rate // shared), -1, 1).astype(np.float32)
    return found


def to_int16(samples: Samples) -> npt.NDArray[np.int16]:
    """Floats between -1 and 1 as 16-bit numbers."""
    return np.rint(np.clip(samples, -1, 1) * 32767).astype(np.int16)
