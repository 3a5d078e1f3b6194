"""Documents, joined and cut into rows of equal length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from modelyard.data.shards import Column, ShardWriter

_FLUSH_TOKENS = 1 << 20


class Packer:
    """Packs one split's stream of tokens into rows of `block_tokens`, written as shards; the rest is left out."""

    def __init__(self, folder: Path, split: str, column: Column, rows_per_shard: int) -> None:
        self._column = column
        self._block_tokens = column.shape[0]
        self._writer = ShardWriter(folder, split, [column], rows_per_shard)
        self._pending: list[npt.NDArray[np.uint32]] = []
        self._num_pending = 0
        self.num_tokens = 0

    @property
    def num_rows(self) -> int:
        """Rows the tokens so far fill."""
        return self.num_tokens // self._block_tokens

    def add(self, tokens: npt.NDArray[np.uint32]) -> None:
        """Append whole documents (n tokens, each document ended by its end-of-text)."""
        self._pending.append(tokens)
        self._num_pending += len(tokens)
        self.num_tokens += len(tokens)
        if self._num_pending >= max(_FLUSH_TOKENS, self._block_tokens):
            self._flush()

    def close(self) -> None:
        """Write the last whole rows and name the shards."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if not self._pending:
            return
        joined = np.concatenate(self._pending)
        cut = len(joined) // self._block_tokens * self._block_tokens
        if cut:
            rows = joined[:cut].reshape(-1, self._block_tokens).astype(self._column.dtype)
            self._writer.write({self._column.name: rows})
        self._pending = [joined[cut:]]
        self._num_pending = len(joined) - cut
