"""Which checkpoints to keep. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from modelyard.training.checkpoints import Checkpoint
from modelyard.training.config import Checkpoints


def kept(committed: Sequence[Checkpoint], newest: Checkpoint, settings: Checkpoints) -> list[str]:
    """Names of the checkpoints to keep now that `newest` is committed.

    The last `keep_last` steps stay, and the best so far. Of several checkpoints of one step (a step done again
    after a restart) only the newest attempt stays.
    """
    by_step = {checkpoint.state.step: checkpoint.name for checkpoint in committed}
    by_step[newest.state.step] = newest.name
    keep = sorted(by_step)[-settings.keep_last :]
    best = newest.state.best_step
    if settings.keep_best and best is not None and best in by_step:
        keep.append(best)
    return [by_step[step] for step in keep]
