"""The order of samples: a permutation of the rows per epoch, computed, never stored.

A Feistel network over the smallest power of two that holds every row is a bijection; walking along its cycles
until an index is a row again keeps it one. So the row at a position of an epoch is a pure function of
(seed, epoch, position): any worker can compute any part of the order, at once, without memory.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from modelyard.errors import DataError

Int64Array = npt.NDArray[np.int64]
_UInt64Array = npt.NDArray[np.uint64]

_ROUNDS = 6
_WORD = (1 << 64) - 1


class SampleOrder:
    """The order in which `num_rows` rows are visited, epoch after epoch, for one seed. Immutable.

    The stream of samples is endless: stream index `i` is position `i % num_rows` of epoch `i // num_rows`.

    Raises:
        DataError: there are no rows to order.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        if num_rows < 1:
            raise DataError(f"a split with {num_rows} rows cannot be ordered", "choose a split that has rows")
        self.num_rows = num_rows
        self.seed = seed
        bits = max(2, (num_rows - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << (bits // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)

    def rows(self, epoch: int, positions: Int64Array) -> Int64Array:
        """The rows (n,) at `positions` (n,) of one epoch; over 0..num_rows-1 this is a bijection."""
        keys = _round_keys(self.seed, epoch)
        walking = self._permute(np.asarray(positions, dtype=np.int64).astype(np.uint64), keys)
        outside = np.flatnonzero(walking >= self.num_rows)
        while outside.size:  # the domain is less than twice the rows (or 4), so few steps are needed
            walked = self._permute(walking[outside], keys)
            walking[outside] = walked
            outside = outside[walked >= self.num_rows]
        return walking.astype(np.int64)

    def sample_ids(self, indices: Int64Array) -> Int64Array:
        """The samples (n,) at `indices` (n,) of the endless stream, as `epoch * num_rows + row`.

        A sample id therefore occurs exactly once in a whole run; `sample_id % num_rows` is the row.
        """
        indices = np.asarray(indices, dtype=np.int64)
        epochs, positions = np.divmod(indices, self.num_rows)
        if indices.size and epochs.min() == epochs.max():  # nearly always, so the copies below are spared
            epoch = int(epochs[0])
            return self.rows(epoch, positions) + np.int64(epoch * self.num_rows)
        ids = np.empty_like(indices)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self.rows(int(epoch), positions[here]) + epoch * self.num_rows
        return ids

    def _permute(self, values: _UInt64Array, keys: list[np.uint64]) -> _UInt64Array:
        low, high = values & self._low_mask, values >> self._low_bits
        for index in range(0, _ROUNDS, 2):
            high ^= _mix(low, keys[index]) & self._high_mask
            low ^= _mix(high, keys[index + 1]) & self._low_mask
        return (high << self._low_bits) | low


def _mix(values: _UInt64Array, key: np.uint64) -> _UInt64Array:
    """The finalizer of SplitMix64 over `values + key`, wrapping at 64 bits."""
    mixed = values + key
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _round_keys(seed: int, epoch: int) -> list[np.uint64]:
    """One key per round from seed and epoch, by SplitMix64 in Python's integers (no overflow to think of)."""
    state = _splitmix(_splitmix(seed & _WORD) ^ (epoch & _WORD))
    keys = []
    for _ in range(_ROUNDS):
        state = (state + 0x9E3779B97F4A7C15) & _WORD
        keys.append(np.uint64(_splitmix(state)))
    return keys


def _splitmix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)
