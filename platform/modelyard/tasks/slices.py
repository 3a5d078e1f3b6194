"""Rows of tokens cut into slices, one for each worker of a sequence-parallel group.

Letters in shapes: B rows, T tokens of a row, S tokens of a slice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = "input_ids"
"""Column of a token dataset: (n, T) unsigned token ids."""
POSITIONS = "position_ids"
"""(B, S) place of each token in its row."""
TARGETS = "targets"
"""(B, S) the token after each, which may be the next slice's first."""
WEIGHTS = "weights"
"""(S,) share of each token in the mean loss of its row; 0 for the row's last, which predicts nothing."""


def cut(batch: Mapping[str, Tensor], part: int, parts: int) -> Mapping[str, Tensor]:
    """Slice `part` of `parts` equal ones of every row; the batch as it is when there is only one.

    Losses of slices add up to those of rows, and so do the statistics.
    """
    if parts == 1:
        return batch
    import torch

    tokens_BT = batch[TOKENS]
    length = tokens_BT.shape[1]
    if length % parts:
        raise ValueError(f"rows of {length} tokens cannot be cut into {parts} equal slices")
    mine = slice(part * (length // parts), (part + 1) * (length // parts))
    places_T = torch.arange(length, device=tokens_BT.device)
    return {
        TOKENS: tokens_BT[:, mine].contiguous(),
        POSITIONS: places_T[mine].expand(tokens_BT.shape[0], -1),
        TARGETS: torch.roll(tokens_BT, -1, dims=1)[:, mine].contiguous(),
        WEIGHTS: ((places_T < length - 1) / (length - 1)).float()[mine],
    }
