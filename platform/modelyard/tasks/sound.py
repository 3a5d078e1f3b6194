"""What a recogniser hears: samples to what its network takes. Letters: B rows, N samples, F frames, M mel bands."""

from __future__ import annotations

import base64
import binascii
import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modelyard.data import audio
from modelyard.errors import DataError, InputError

_WINDOW_S, _HOP_S = 0.025, 0.010
_LOWEST_HZ = 20.0
_PREEMPHASIS = 0.97
_FLOOR = 1.1920929e-07
STACKED = 2
"""Frames that become one step of the network."""


class Heard(NamedTuple):
    """What the network takes."""

    values: Tensor
    """(B, steps, STACKED * M) log-mel energies, or (B, N) samples."""
    mask: Tensor
    """(B, steps) or (B, N), 1 where there is sound, int64."""


def log_mel(samples: Tensor, lengths: Tensor, rate: int, bands: int) -> Heard:
    """Log energies of mel bands every 10 ms as Kaldi has them, each band with mean 0 and deviation 1 over a row.

    Equal to the `SeamlessM4TFeatureExtractor` of transformers, for any rate and all rows at once.

    Args:
        samples: (B, N) between -1 and 1.
        lengths: (B,) samples that count.
    """
    window, hop, size = frame_sizes(rate)
    if samples.shape[1] < window + hop:
        samples = torch.nn.functional.pad(samples, (0, window + hop - samples.shape[1]))
    frames = samples.unfold(1, window, hop) * 2.0**15  # (B, F, window)
    frames = frames - frames.mean(dim=2, keepdim=True)
    first = frames[..., :1] * (1 - _PREEMPHASIS)
    frames = torch.cat([first, frames[..., 1:] - _PREEMPHASIS * frames[..., :-1]], dim=2)
    shape, filters = _filters(rate, bands)
    power = torch.fft.rfft(frames * shape.to(frames.device), size).abs().square()
    energies = (power @ filters.to(frames.device)).clamp_min(_FLOOR).log()  # (B, F, M)
    counts = num_frames(lengths, rate)
    valid = torch.arange(energies.shape[1], device=samples.device) < counts[:, None]
    scaled = _standardised(energies, valid, counts)
    steps = energies.shape[1] // STACKED
    values = scaled[:, : steps * STACKED].reshape(len(scaled), steps, STACKED * bands)
    mask = torch.arange(steps, device=samples.device) < (counts // STACKED)[:, None]
    return Heard(values * mask[..., None], mask.long())  # an odd frame at the end is no step


def plain_samples(samples: Tensor, lengths: Tensor) -> Heard:
    """Samples with mean 0 and deviation 1 over a row, 0 behind its end."""
    valid = torch.arange(samples.shape[1], device=samples.device) < lengths[:, None]
    count = lengths.clamp_min(1)[:, None]
    mean = (samples * valid).sum(dim=1, keepdim=True) / count
    spread = (((samples - mean) * valid).square().sum(dim=1, keepdim=True) / count + 1e-7).sqrt()
    return Heard((samples - mean) / spread * valid, valid.long())


def frame_sizes(rate: int) -> tuple[int, int, int]:
    """Samples of a window, from one to the next, and of its Fourier transform."""
    window = round(rate * _WINDOW_S)
    return window, round(rate * _HOP_S), 1 << (window - 1).bit_length()


def num_frames(lengths: Tensor, rate: int) -> Tensor:
    """Frames of so many samples, 2 at least."""
    window, hop, _ = frame_sizes(rate)
    return (1 + (lengths - window).div(hop, rounding_mode="floor")).clamp_min(STACKED)


def masked(heard: Heard, bands: int, times: int) -> Heard:
    """SpecAugment (Park et al. 2019): `times` stretches of time and of frequency are blanked in each row."""
    values, (rows, steps, _) = heard.values, heard.values.shape
    lengths = heard.mask.sum(dim=1)
    at = torch.arange(steps, device=values.device)
    band = torch.arange(bands, device=values.device).repeat(STACKED)
    for _ in range(times):
        draws = torch.rand(4, rows, 1, device=values.device)
        width = draws[0] * (lengths[:, None] / 8).clamp_max(25)
        start = draws[1] * (lengths[:, None] - width)
        height = draws[2] * bands / 4
        low = draws[3] * (bands - height)
        values = values.masked_fill(((at >= start) & (at < start + width))[..., None], 0.0)
        values = values.masked_fill(((band >= low) & (band < low + height))[:, None], 0.0)
    return Heard(values, heard.mask)


def sound(value: Any, rate: int, most: int) -> np.ndarray:
    """An input as samples at `rate`, float32 (n,), n at most `most`.

    It may be a WAV file as bytes or in base64, a list of numbers between -1 and 1 at this rate, or
    `{"samples": [...], "sample_rate": n}`.

    Raises:
        InputError: it is none of these, holds nothing or no finite numbers, or lasts too long.
    """
    value = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
    try:
        samples, given = _samples(value, rate)
        # A list of an hour must not be resampled before it is refused.
        if len(samples) > most / rate * given + 1:
            raise InputError(
                f"a recording lasts {len(samples) / given:.1f} s, the model takes {most / rate:g} s at most",
                "cut it into shorter pieces",
            )
        return audio.resample(samples, given, rate)[:most]
    except DataError as error:
        raise InputError(error.problem, error.todo) from error


def _samples(value: Any, rate: int) -> tuple[audio.Samples, int]:
    if isinstance(value, str):
        try:
            value = base64.b64decode(value.rpartition(",")[2], validate=True)
        except (binascii.Error, ValueError):
            raise InputError("an input is no WAV file in base64", "encode the file's bytes") from None
    if isinstance(value, bytes):
        return audio.read_wav(value, "an input")
    if isinstance(value, dict):
        if set(value) != {"samples", "sample_rate"} or type(value["sample_rate"]) is not int:
            raise InputError("an input has other keys", 'give {"samples": [...], "sample_rate": 16000}')
        value, rate = value["samples"], audio.check_rate(value["sample_rate"], "an input")
    try:
        numbers = np.asarray(value, dtype=None if isinstance(value, np.ndarray) else np.float64)
    except (TypeError, ValueError):
        numbers = np.zeros((0, 0))
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.number):
        raise InputError("an input is no sound", "give a WAV file in base64, or a list of numbers between -1 and 1")
    if np.issubdtype(numbers.dtype, np.floating) and np.isfinite(numbers).all() and np.abs(numbers).max(initial=0) > 1:
        raise InputError(f"a sample is {np.abs(numbers).max():g}", "give numbers between -1 and 1")
    return audio.mono(numbers, "an input"), rate


def _standardised(energies: Tensor, valid: Tensor, counts: Tensor) -> Tensor:
    count = counts[:, None, None]
    mean = (energies * valid[..., None]).sum(dim=1, keepdim=True) / count
    squares = ((energies - mean) * valid[..., None]).square().sum(dim=1, keepdim=True)
    scaled = (energies - mean) / (squares / (count - 1).clamp_min(1) + 1e-7).sqrt()
    return scaled * valid[..., None]


@functools.lru_cache(maxsize=8)
def _filters(rate: int, bands: int) -> tuple[Tensor, Tensor]:
    """The window of a frame, (window,), and the mel bands, (frequencies, M)."""
    from transformers.audio_utils import mel_filter_bank, window_function

    window, _, size = frame_sizes(rate)
    filters = mel_filter_bank(
        num_frequency_bins=size // 2 + 1,
        num_mel_filters=bands,
        min_frequency=_LOWEST_HZ,
        max_frequency=rate // 2,
        sampling_rate=rate,
        norm=None,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )
    shape = window_function(window, "povey", periodic=False)
    return torch.from_numpy(shape.astype(np.float32)), torch.from_numpy(filters.astype(np.float32))
