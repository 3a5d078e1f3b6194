"""Which checkpoints stay."""

from __future__ import annotations

from modelyard.training.checkpoints import Checkpoint, CheckpointManifest, TrainState
from modelyard.training.config import Checkpoints
from modelyard.training.retention import kept


def checkpoint(step: int, attempt: str = "a", best: int | None = None) -> Checkpoint:
    state = TrainState(step=step, seed=0, epoch=0, position=0, num_workers=1, zero_stage=1, best_step=best)
    return Checkpoint(f"{step}-{attempt}", CheckpointManifest(state=state, files={}))


def names(steps: list[int], newest: Checkpoint, **settings: object) -> set[str]:
    return set(kept([*map(checkpoint, steps), newest], newest, Checkpoints.model_validate(settings)))


def test_the_newest_ones_stay() -> None:
    assert names([1, 2, 3], checkpoint(4), keep_last=2) == {"3-a", "4-a"}
    assert names([], checkpoint(4), keep_last=2) == {"4-a"}


def test_the_best_one_stays_beside_them() -> None:
    assert names([1, 2, 3], checkpoint(4, best=1), keep_last=1) == {"1-a", "4-a"}
    assert names([1, 2, 3], checkpoint(4, best=4), keep_last=1) == {"4-a"}


def test_the_best_one_goes_when_it_is_not_to_be_kept() -> None:
    assert names([1, 2, 3], checkpoint(4, best=1), keep_last=1, keep_best=False) == {"4-a"}


def test_a_best_step_without_a_checkpoint_keeps_nothing_more() -> None:
    assert names([2, 3], checkpoint(4, best=1), keep_last=1) == {"4-a"}


def test_of_a_step_done_twice_only_the_newest_attempt_stays() -> None:
    assert names([3, 4], checkpoint(4, attempt="b"), keep_last=2) == {"3-a", "4-b"}


def test_a_listing_that_lags_behind_does_not_lose_the_newest() -> None:
    newest = checkpoint(5)
    assert "5-a" in kept([checkpoint(4)], newest, Checkpoints(keep_last=1))
