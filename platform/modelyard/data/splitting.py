"""Which split a document belongs to: a function of its content alone, so it never moves to another one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from modelyard.data.deduplication import UInt64Array


def assign(digests: UInt64Array, shares: Mapping[str, float]) -> npt.NDArray[np.uint8]:
    """The split of each content digest (n, 2), as its place in `shares`; shares sum to 1."""
    ends = np.cumsum(list(shares.values()))[:-1]
    point = (digests[:, 0] >> np.uint64(11)).astype(np.float64) / float(1 << 53)  # 53 bits: exact in float64
    return np.searchsorted(ends, point, side="right").astype(np.uint8)
