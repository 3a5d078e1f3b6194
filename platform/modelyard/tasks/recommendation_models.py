"""Networks that score items. Letters in shapes: B histories, L steps, D width, V items plus one for "no item"."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Sequence(nn.Module):
    """A causal transformer over the history whose states are compared with the items' own vectors."""

    def __init__(self, items: int, length: int, hidden: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.table = nn.Embedding(items + 1, hidden, padding_idx=0)
        self.positions = nn.Embedding(length, hidden)
        for embedding in (self.table, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden, heads, 2 * hidden, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.heads = heads

    def forward(self, history: Tensor) -> Tensor:
        """(B, L) item numbers, 0 in front of the oldest -> (B, L, V) scores of what follows each step."""
        length = history.shape[1]
        states_BLD = self.table(history) + self.positions.weight[-length:]
        states_BLD = self.dropout(states_BLD)
        later_LL = torch.ones(length, length, dtype=torch.bool, device=history.device).triu(1)
        padded_BL = history == 0
        # A padded step sees itself, or its row of attention would be empty and give NaN.
        blocked_BLL = (later_LL | padded_BL[:, None, :]) & ~torch.eye(length, dtype=torch.bool, device=later_LL.device)
        mask = blocked_BLL.repeat_interleave(self.heads, dim=0)
        for block in self.blocks:
            states_BLD = block(states_BLD, src_mask=mask)
        return functional.linear(self.norm(states_BLD), self.table.weight)


class TwoTower(nn.Module):
    """The mean of the items so far through one dense network, each item through another; their product is the score."""

    def __init__(self, items: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.table = nn.Embedding(items + 1, hidden, padding_idx=0)
        nn.init.normal_(self.table.weight, std=0.02)
        self.user = _tower(hidden, dropout)
        self.item = _tower(hidden, dropout)

    def forward(self, history: Tensor) -> Tensor:
        """(B, L) item numbers, 0 in front of the oldest -> (B, L, V) scores of what follows each step."""
        known_BL1 = (history > 0)[:, :, None].to(self.table.weight.dtype)
        sums_BLD = (self.table(history) * known_BL1).cumsum(dim=1)
        means_BLD = sums_BLD / known_BL1.cumsum(dim=1).clamp(min=1)
        return functional.linear(self.user(means_BLD), self.item(self.table.weight))


def _tower(hidden: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(hidden),
        nn.Linear(hidden, 2 * hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(2 * hidden, hidden),
    )
