"""One message for a gang's errors: what happened, and on which ranks."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from modelyard.errors import ConfigError, DivergedError, StorageError, TrainingError
from modelyard.training.interrupts import grouped, note_place, original_error

BROKEN = "Connection closed by peer [127.0.0.1]:4242"


class Wrapper(Exception):  # noqa: N818
    """As Ray wraps an exception: the original one hangs on an attribute."""

    def __init__(self, **attributes: BaseException) -> None:
        vars(self).update(attributes)


@pytest.mark.parametrize("attribute", ["_base_exc", "health_check_failure", "cause"])
def test_the_original_error_is_found_inside_every_wrapper(attribute: str) -> None:
    inner = KeyError("x")
    wrapped: dict[str, Any] = {attribute: Wrapper(cause=inner)}
    assert original_error(Wrapper(**wrapped)) is inner
    assert original_error(inner) is inner


def test_equal_failures_are_told_once_with_the_ranges_of_their_ranks() -> None:
    failures: dict[int, BaseException] = {rank: ValueError(f"row {rank * 7} is bad") for rank in (0, 1, 2, 5, 7, 8)}
    text = str(grouped({**failures, 3: KeyError("y")}))
    assert "ranks 0-2, 5, 7-8: ValueError: row 0 is bad" in text
    assert "rank 3: KeyError: 'y'" in text
    assert text.count("ValueError") == 1


def test_ranks_that_only_lost_their_peer_are_told_after_the_cause() -> None:
    text = str(grouped({0: RuntimeError(BROKEN), 1: MemoryError("no room"), 2: ConnectionResetError(BROKEN)}))
    assert text.splitlines()[1:] == [
        "rank 1: MemoryError: no room",
        "ranks 0, 2: lost the connection to the workers above",
    ]


def test_when_every_rank_lost_its_connection_that_is_the_cause() -> None:
    text = str(grouped({0: RuntimeError(BROKEN), 1: RuntimeError(BROKEN.replace("4242", "17"))}))
    assert f"ranks 0-1: RuntimeError: {BROKEN}" in text
    assert "above" not in text


def test_one_modelyard_error_comes_back_as_itself() -> None:
    diverged = DivergedError("the loss of step 3 is nan", "lower the rate")
    assert (
        grouped({0: Wrapper(cause=diverged), 1: DivergedError("the loss of step 3 is nan", "lower the rate")})
        is diverged
    )


def test_a_modelyard_error_of_one_rank_is_not_hidden_by_its_peers_broken_connections() -> None:
    refused = StorageError("the disk is full")
    assert grouped({0: refused, 1: RuntimeError(BROKEN)}) is refused


def test_two_different_modelyard_errors_are_both_told() -> None:
    both = grouped({0: ConfigError("bad field"), 1: StorageError("disk is full")})
    assert type(both) is TrainingError
    assert "rank 0: ConfigError: bad field" in str(both)
    assert "rank 1: StorageError: disk is full" in str(both)


def test_the_place_of_an_error_is_told_and_survives_the_way_between_processes() -> None:
    try:
        {}["step"]
    except KeyError as error:
        note_place(error)
        there = pickle.loads(pickle.dumps(error))
    text = str(grouped({4: there}))
    assert "rank 4: KeyError: 'step'" in text
    assert f"at {__file__}:" in text
    assert "in test_the_place_of_an_error" in text


def test_an_error_without_words_is_still_told() -> None:
    assert "rank 0: AssertionError: no message" in str(grouped({0: AssertionError()}))
