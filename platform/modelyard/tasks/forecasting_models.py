"""Networks for series. Letters in shapes: B windows, L points of the past, H of the future, D width, P patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def seasonal_naive(past: Tensor, future: int, season: int) -> Tensor:
    """The last season of (B, L) repeated over the future, (B, H)."""
    last = past[:, -season:]
    return last.repeat(1, -(-future // season))[:, :future]


class Forecaster(nn.Module):
    """Brings each window to one scale, foretells, and turns the scale back (Kim et al. 2022).

    Seasonal: the network sees how each point differs from the one a season before, and foretells such differences.
    A linear layer beside it, zero at first, sees the same (Zeng et al. 2023: alone it is hard to beat).
    """

    def __init__(self, body: nn.Module, past: int, future: int, season: int, seasonal: bool) -> None:
        super().__init__()
        self.body = body
        self.past, self.future, self.season, self.seasonal = past, future, season, seasonal
        self.linear = nn.Linear(past - season if seasonal else past, future)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, past: Tensor) -> Tensor:
        """(B, L) -> (B, H), in the units of the series."""
        if self.seasonal:
            seen, base = past[:, self.season :] - past[:, : -self.season], torch.zeros_like(past[:, :1])
            scale = seen.square().mean(dim=1, keepdim=True).sqrt() + 1e-5
        else:
            seen, base = past, past.mean(dim=1, keepdim=True)
            scale = past.std(dim=1, keepdim=True, unbiased=False) + 1e-5
        dtype = next(self.body.parameters()).dtype
        scaled = ((seen - base) / scale).to(dtype)
        scaled_BH: Tensor = (self.body(scaled) + self.linear(scaled)).float()
        if self.seasonal:
            base = seasonal_naive(past, self.future, self.season)
        return base + scaled_BH * scale


class Recurrent(nn.Module):
    """An LSTM over steps of several points, then a dense layer for all of the future at once."""

    def __init__(self, past: int, future: int, step: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.step, self.steps = step, past // step
        self.lstm = nn.LSTM(step, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.head = nn.Linear(hidden, future)

    def forward(self, past: Tensor) -> Tensor:
        """(B, L) -> (B, H); of points that fill no whole step the oldest are left out."""
        used = past[:, past.shape[1] - self.steps * self.step :]
        states_BPD, _ = self.lstm(used.reshape(len(used), self.steps, self.step))
        out: Tensor = self.head(states_BPD[:, -1])
        return out


class Patched(nn.Module):
    """PatchTST (Nie et al. 2023) of transformers, with layer normalisation: its batch statistics would depend on how
    many workers share a batch.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import PatchTSTForPrediction

        self.net = PatchTSTForPrediction(config)
        self.steps = (config.context_length - config.patch_length) // config.patch_stride + 1

    def forward(self, past: Tensor) -> Tensor:
        """(B, L) -> (B, H)."""
        mask = torch.ones_like(past, dtype=torch.bool)[:, :, None]
        out: Tensor = self.net(past_values=past[:, :, None], past_observed_mask=mask).prediction_outputs[:, :, 0]
        return out


def lstm(past: int, future: int, step: int, hidden: int, layers: int, dropout: float) -> Recurrent:
    """See `Recurrent`."""
    return Recurrent(past, future, step, hidden, layers, dropout)


def patchtst(
    past: int, future: int, patch: int, stride: int, hidden: int, layers: int, heads: int, dropout: float
) -> Patched:
    """See `Patched`."""
    from transformers import PatchTSTConfig

    config = PatchTSTConfig(
        num_input_channels=1,
        context_length=past,
        prediction_length=future,
        patch_length=patch,
        patch_stride=stride,
        d_model=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=2 * hidden,
        attention_dropout=dropout,
        ff_dropout=dropout,
        head_dropout=dropout,
        norm_type="layernorm",
        scaling=None,
        loss="mse",
    )
    return Patched(config)
