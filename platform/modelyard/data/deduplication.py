"""Duplicates: signatures are computed in parallel, the decision which document stays is one pure function.

A signature is a one-permutation MinHash: every 9-byte piece of a text is hashed once, the hash picks one of
128 bins and each bin keeps its smallest value; empty bins borrow from others (optimal densification). The share
of equal bins of two signatures estimates the Jaccard similarity of the texts' pieces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

NUM_BINS = 128
PIECE_BYTES = 9
_EMPTY = np.uint32(0xFFFFFFFF)
_BATCH_BYTES = 1 << 21

UInt64Array = npt.NDArray[np.uint64]
UInt32Array = npt.NDArray[np.uint32]
BoolArray = npt.NDArray[np.bool_]
IndexArray = npt.NDArray[np.intp]


def content_digests(contents: Sequence[bytes]) -> UInt64Array:
    """The 128-bit digest of each content, as (n, 2)."""
    joined = b"".join(hashlib.blake2b(content, digest_size=16).digest() for content in contents)
    return np.frombuffer(joined, dtype="<u8").reshape(-1, 2).astype(np.uint64)


def signatures(texts: Sequence[str]) -> UInt32Array:
    """MinHash signatures (n, NUM_BINS) of texts; case and spacing do not count."""
    out = np.empty((len(texts), NUM_BINS), dtype=np.uint32)
    pending: list[bytes] = []
    first, size = 0, 0
    for index, text in enumerate(texts):
        pending.append(" ".join(text.lower().split()).encode().ljust(PIECE_BYTES, b"\0"))
        size += len(pending[-1])
        if size >= _BATCH_BYTES or index == len(texts) - 1:
            out[first : index + 1] = _batch_signatures(pending)
            pending, first, size = [], index + 1, 0
    return out


def first_of_equals(digests: UInt64Array) -> BoolArray:
    """For digests (n, 2) in the order of ids: whether each is the first with its content."""
    first = np.zeros(len(digests), dtype=np.bool_)
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal digests stay in the order of ids
    ranked = digests[order]
    starts = np.ones(len(digests), dtype=np.bool_)
    starts[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    first[order[starts]] = True
    return first


def first_of_alikes(sketches: UInt32Array, similarity: float) -> BoolArray:
    """For signatures (n, NUM_BINS) in the order of ids: whether each is the lowest id of its group.

    A group is what pairs of estimated similarity >= `similarity` connect. Candidate pairs share a band (LSH);
    in a bucket each member is compared with the first and with the one before it: the work stays linear.
    """
    count = len(sketches)
    labels: IndexArray = np.arange(count)
    if count < 2:
        return np.ones(count, dtype=np.bool_)
    pairs = [_similar_pairs(sketches, band, similarity) for band in _bands(similarity)]
    low = np.concatenate([pair[0] for pair in pairs])
    high = np.concatenate([pair[1] for pair in pairs])
    while True:  # the smallest label spreads along the pairs; jumping makes long chains short
        before = labels.copy()
        np.minimum.at(labels, high, labels[low])
        np.minimum.at(labels, low, labels[high])
        labels = labels[labels]
        if np.array_equal(before, labels):
            return np.asarray(labels == np.arange(count))


def _bands(similarity: float) -> list[slice]:
    """The widest bands with which a pair of that similarity shares one with probability >= 0.99."""
    for rows in range(NUM_BINS, 0, -1):
        bands = NUM_BINS // rows
        if 1 - (1 - similarity**rows) ** bands >= 0.99:
            return [slice(band * rows, (band + 1) * rows) for band in range(bands)]
    raise AssertionError("one row per band finds every similarity above 0.04")


def _similar_pairs(sketches: UInt32Array, band: slice, similarity: float) -> tuple[IndexArray, IndexArray]:
    """Pairs (low, high) of indices that share the band and are similar by their whole signatures."""
    keys = np.zeros(len(sketches), dtype=np.uint64)
    for column in range(band.start, band.stop):  # two bands with one key by chance only cost a comparison
        keys = _mix(keys * np.uint64(0x9E3779B97F4A7C15) + sketches[:, column])
    order = np.argsort(keys, kind="stable")  # equal keys stay in the order of ids
    ranked = keys[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    firsts = np.repeat(order[starts], np.diff(np.r_[starts, len(order)]))
    previous = np.r_[order[:1], order[:-1]]
    follows = np.r_[False, ranked[1:] == ranked[:-1]]
    low = np.concatenate([firsts[follows], previous[follows]])
    high = np.concatenate([order[follows], order[follows]])
    equal = np.empty(len(low), dtype=np.float64)
    for at in range(0, len(low), 1 << 16):  # bounded memory: 64 Ki pairs of signatures at a time
        here = slice(at, at + (1 << 16))
        equal[here] = (sketches[low[here]] == sketches[high[here]]).mean(axis=1)
    similar = equal >= similarity
    return low[similar], high[similar]


def _batch_signatures(contents: Sequence[bytes]) -> UInt32Array:
    lengths = np.array([len(content) for content in contents])
    data = np.frombuffer(b"".join(contents), dtype=np.uint8)
    pieces = len(data) - PIECE_BYTES + 1
    hashes = np.zeros(pieces, dtype=np.uint64)
    for offset in range(PIECE_BYTES):
        hashes *= np.uint64(0x100000001B3)
        hashes += data[offset : offset + pieces]
    hashes = _mix(hashes)
    owners = np.repeat(np.arange(len(contents)), lengths)
    inside = owners[:pieces] == owners[PIECE_BYTES - 1 :]  # a piece must not cross from one text into the next
    bins = owners[:pieces] * NUM_BINS + (hashes >> np.uint64(57)).astype(np.int64)
    out = np.full(len(contents) * NUM_BINS, _EMPTY, dtype=np.uint32)
    values = np.minimum(hashes & np.uint64(0xFFFFFFFF), np.uint64(_EMPTY - 1)).astype(np.uint32)
    np.minimum.at(out, bins[inside], values[inside])
    return _densify(out.reshape(-1, NUM_BINS))


def _densify(sketches: UInt32Array) -> UInt32Array:
    """Fill each empty bin from a non-empty one, chosen by the bin's number and the attempt alone."""
    filled = sketches.copy()
    documents, bins = np.nonzero(sketches == _EMPTY)
    attempt = 0
    while documents.size:
        attempt += 1
        probe = _mix(bins.astype(np.uint64) * np.uint64(1 << 32) + np.uint64(attempt)) % np.uint64(NUM_BINS)
        found = sketches[documents, probe.astype(np.int64)]
        here = found != _EMPTY
        filled[documents[here], bins[here]] = found[here]
        documents, bins = documents[~here], bins[~here]
    return filled


def _mix(values: npt.NDArray[Any]) -> UInt64Array:
    mixed = values ^ (values >> np.uint64(33))
    mixed *= np.uint64(0xFF51AFD7ED558CCD)
    mixed ^= mixed >> np.uint64(33)
    mixed *= np.uint64(0xC4CEB9FE1A85EC53)
    mixed ^= mixed >> np.uint64(33)
    return np.asarray(mixed, dtype=np.uint64)
