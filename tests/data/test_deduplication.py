from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.data import deduplication, splitting
from modelyard.data.deduplication import PIECE_BYTES, content_digests, first_of_alikes, first_of_equals, signatures

WORDS = ["".join(random.Random(i).choices("abcdefghijklmnop", k=3 + i % 7)) for i in range(2000)]


def text(seed: int, words: int = 200) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def edited(original: str, share: float, seed: int = 0) -> str:
    dice = random.Random(seed)
    return " ".join("changed" if dice.random() < share else word for word in original.split())


def jaccard(one: str, two: str) -> float:
    first, second = ({t[i : i + PIECE_BYTES] for i in range(len(t) - PIECE_BYTES + 1)} for t in (one, two))
    return len(first & second) / len(first | second)


def test_of_equal_contents_the_lowest_id_stays() -> None:
    digests = content_digests([b"a", b"b", b"a", b"c", b"b", b"a"])
    assert first_of_equals(digests).tolist() == [True, True, False, True, False, False]


@given(st.lists(st.binary(max_size=3), max_size=50))
def test_exact_duplicates_are_found_as_a_set_would(contents: list[bytes]) -> None:
    seen: set[bytes] = set()
    expected = [not (content in seen or seen.add(content)) for content in contents]  # type: ignore[func-returns-value]
    assert first_of_equals(content_digests(contents)).tolist() == expected


def test_of_alike_texts_the_lowest_id_stays() -> None:
    one, two, three = text(1), text(2), text(3)
    texts = [one, two, edited(one, 0.02), three, edited(two, 0.01), edited(one, 0.01, seed=5)]
    assert first_of_alikes(signatures(texts), 0.8).tolist() == [True, True, False, True, False, False]


def test_case_and_spacing_do_not_make_a_text_another() -> None:
    one = text(1)
    sketches = signatures([one, one.upper().replace(" ", "\n  ")])
    assert np.array_equal(sketches[0], sketches[1])


def test_near_duplicates_are_found_and_others_kept() -> None:
    # 100 pairs each. Bands find a pair at the threshold with probability 0.99; a pair this far above it is
    # missed, and one this far below taken, with a probability under 1e-4 each (binomial over 128 bins).
    originals = [text(seed) for seed in range(100)]
    near = first_of_alikes(signatures([*originals, *(edited(t, 0.02) for t in originals)]), 0.8)
    assert near[:100].all()
    assert not near[100:].any()
    far = [edited(t, 0.3) for t in originals]
    assert max(jaccard(a, b) for a, b in zip(originals, far, strict=True)) < 0.6
    assert first_of_alikes(signatures([*originals, *far]), 0.8).all()


def test_signatures_estimate_the_jaccard_similarity() -> None:
    # The estimate's standard deviation is sqrt(J (1 - J) / 128) <= 0.045: 5 of them.
    for seed in range(20):
        one = text(seed, 400)
        two = edited(one, 0.05 * (seed % 5), seed)
        sketches = signatures([one, two])
        assert abs((sketches[0] == sketches[1]).mean() - jaccard(one, two)) < 0.22


@given(st.lists(st.text(max_size=40), min_size=1, max_size=20), st.integers(0, 2**32))
@settings(deadline=None, max_examples=25)
def test_a_signature_does_not_depend_on_its_neighbours(texts: list[str], seed: int) -> None:
    together = signatures(texts)
    order = np.random.default_rng(seed).permutation(len(texts))
    assert np.array_equal(signatures([texts[i] for i in order]), together[order])
    assert np.array_equal(signatures([texts[0]])[0], together[0])


def test_many_small_batches_give_the_same_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text(seed, 50) for seed in range(40)]
    expected = signatures(texts)
    monkeypatch.setattr(deduplication, "_BATCH_BYTES", 100)
    assert np.array_equal(signatures(texts), expected)


def test_a_chain_of_alikes_is_one_group() -> None:
    # Each link is similar, the ends are not: the group still keeps one document, as pairs connect.
    sketches = np.tile(np.arange(128, dtype=np.uint32), (6, 1))
    for link in range(6):
        sketches[link, : link * 20] += np.uint32(1000)
    assert first_of_alikes(sketches, 0.8).tolist() == [True, *[False] * 5]


@pytest.mark.parametrize("count", [0, 1])
def test_few_texts_are_no_special_case(count: int) -> None:
    assert first_of_alikes(signatures(["only one"] * count), 0.8).tolist() == [True] * count


def test_a_document_stays_in_its_split_when_others_come_and_go() -> None:
    shares = {"train": 0.8, "validation": 0.15, "test": 0.05}
    digests = content_digests([str(i).encode() for i in range(20_000)])
    codes = splitting.assign(digests, shares)
    assert np.array_equal(splitting.assign(digests[::7], shares), codes[::7])
    measured = np.bincount(codes) / len(codes)  # standard deviation at most 0.003: 4 of them
    assert np.allclose(measured, list(shares.values()), atol=0.012)


def test_one_split_takes_all() -> None:
    digests = content_digests([str(i).encode() for i in range(100)])
    assert (splitting.assign(digests, {"train": 1.0}) == 0).all()
