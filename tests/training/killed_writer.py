"""Writes checkpoints until it is killed: python killed_writer.py FOLDER_OR_URI STAGING

Each line on stdin is a number of seconds; for each, a fresh process goes on from the newest checkpoint, writes one
checkpoint after another as two workers, and is killed with SIGKILL after that time. Answers `killed` each time, or
`failed` when it had ended by itself before.
"""

import itertools
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path

from modelyard.training.checkpoints import CheckpointStore, CheckpointWriter, TrainState
from modelyard.training.config import Checkpoints
from modelyard.training.retention import kept
from modelyard.training.run_folder import RunFolder

NUM_WORKERS = 2


def content(step: int, rank: int) -> bytes:
    """What the file of a rank holds at a step."""
    return f"{step}/{rank}|".encode() * 30_000


def save_local(folder: Path, tag: str, step: int, rank: int) -> None:
    """As DeepSpeed: a file per rank."""
    (folder / tag).mkdir(parents=True, exist_ok=True)
    (folder / tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(content(step, rank))


def write_for_ever(uri: str, staging: Path) -> None:
    """One worker per thread; worker 0 commits, and prunes after each commit as a run does."""
    store = CheckpointStore(RunFolder(uri))
    newest = store.newest_usable(staging / "look")
    first, attempt = (newest.state.step if newest else 0) + 1, uuid.uuid4().hex[:8]

    def work(rank: int) -> None:
        writer = CheckpointWriter(
            RunFolder(uri),
            rank=rank,
            num_workers=NUM_WORKERS,
            attempt=attempt,
            staging=staging / attempt,
            commit_timeout_s=60,
            on_commit=lambda checkpoint: store.prune(kept(store.committed(), checkpoint, Checkpoints(keep_last=2))),
        )
        for step in itertools.count(first):
            state = TrainState(step=step, seed=0, epoch=0, position=step, num_workers=NUM_WORKERS, zero_stage=1)
            writer.save(state, lambda folder, tag, step=step: save_local(folder, tag, step, rank), b"history")

    def work_or_fail(rank: int) -> None:
        try:
            work(rank)
        finally:
            traceback.print_exc()
            os._exit(1)

    for rank in range(NUM_WORKERS):
        threading.Thread(target=work_or_fail, args=(rank,), daemon=True).start()
    signal.pause()


def main() -> None:
    """Fork, wait, kill, answer. Forking spares every process the imports."""
    uri, staging = sys.argv[1], Path(sys.argv[2])
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            write_for_ever(uri, staging)
        time.sleep(float(line))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else "failed", flush=True)


if __name__ == "__main__":
    main()
