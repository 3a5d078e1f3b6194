"""One worker of a gang without Ray that runs engines one after another, for test_engine_modes.py.

    python -m tests.training.engine_gang JOB.json RANK

JOB.json holds `workers`, `port`, `dataset`, `out` and `runs`: each run a `name`, a TrainConfig and what to do with
it. Worker 0 writes OUT/<name>.json: what the run measured, or the error it ended with.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.training.gangs import Job, Run, main

from modelyard.config import parse
from modelyard.data.dataset import Dataset
from modelyard.training import TrainConfig
from modelyard.training.batching import plan
from modelyard.training.checkpoints import TAG
from modelyard.training.engine import Engine
from modelyard.training.gang import Gang


class Runner:
    """One config's engine, stepped as the training loop does."""

    def __init__(self, config: TrainConfig, gang: Gang, dataset: Dataset, *, universal: bool = False) -> None:
        training = config.training
        self._config, self._gang, self._split = config, gang, dataset.split("train")
        self._plan = plan(training.global_batch_size, training.micro_batch_size, gang.num_workers, gang.rank)
        torch.manual_seed(config.seed)
        model = config.task.build(dataset.info, None)
        if training.activation_checkpointing:
            config.task.enable_activation_checkpointing(model)
        self.engine = Engine(model.train(), config, self._plan, num_workers=gang.num_workers, from_universal=universal)

    def step(self, step: int) -> float:
        """One optimizer step on the first rows of the dataset; the global batch's mean loss."""
        size = self._config.training.global_batch_size
        ids = (step % 4 * size + np.arange(self._plan.start, self._plan.stop)).astype(np.int64)
        total = 0.0
        for index, (start, stop) in enumerate(self._plan.micro_batches):
            part = ids[start:stop] if stop > start else ids[:1]
            batch = self._config.task.collate(self._split.read(part), "cpu")
            losses_b = self._config.task.loss(self.engine.model, batch)
            if stop == start:
                losses_b = losses_b * 0.0
            total += float(losses_b.detach().sum())
            self.engine.backward(
                losses_b, is_last=index + 1 == len(self._plan.micro_batches), measure_rows=stop - start
            )
        _, self.norm = self.engine.step(step)
        self.squares = self._gang.sum([self.engine.take_norms().squares])[0]
        return self._gang.sum([total])[0] / size


def perform(run: dict[str, Any], gang: Gang, dataset: Dataset, out: Path) -> dict[str, Any]:
    """Train `steps` steps; save after half of them into OUT/<name>-saved, load that, and go on from there too.

    A run with `load` (a folder) starts from its universal checkpoint at half of the steps instead.
    """
    config, steps = parse(TrainConfig, run["config"]), run["steps"]
    half = steps // 2
    runner = Runner(config, gang, dataset, universal="load" in run)
    if "load" in run:
        runner.engine.load(Path(run["load"]), TAG)
        return {"losses": [runner.step(step) for step in range(half, steps)]}
    before = runner.engine.full_state()
    losses, norms, squares = [], [], []
    for step in range(steps):
        if step == half and run.get("save", True):
            runner.engine.save(out / f"{run['name']}-saved", TAG)
        losses.append(runner.step(step))
        norms.append(runner.norm)
        squares.append(runner.squares)
    found = facts(runner, before)
    del runner
    again = None
    if run.get("save", True):
        second = Runner(config, gang, dataset)
        second.engine.load(out / f"{run['name']}-saved", TAG)
        again = [second.step(step) for step in range(half, steps)]
    return {"losses": losses, "norms": norms, "squares": squares, "again": again, **found}


def facts(runner: Runner, before: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What tells one way of training from another."""
    engine = runner.engine
    inner = getattr(engine._optimizer, "optimizer", engine._optimizer)
    tensors = [t for state in inner.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    now = engine.full_state()
    frozen = [n for n, p in engine.module.named_parameters() if not p.requires_grad]
    moved = [name for name, old in before.items() if not torch.equal(old, now[name])]
    return {
        "dtypes": sorted({str(p.dtype) for p in engine.module.parameters()}),
        "state_dtypes": sorted({str(t.dtype) for t in tensors if t.numel() > 1}),
        "state_elements": sum(t.numel() for t in tensors if t.numel() > 1),
        "optimizer": type(inner).__name__,
        "offload": [str(engine._engine.zero_cpu_offload()), str(engine._engine.zero_offload_param() is not None)],
        "frozen": len(frozen),
        "frozen_moved": sorted(set(frozen) & set(moved)),
        "moved": len(moved),
    }


def prepare(job: Job, rank: int) -> Callable[[Run], Any]:
    """What does a run of this gang."""
    gang = Gang(rank=rank, num_workers=job["workers"], device=torch.device("cpu"))
    return partial(perform, gang=gang, dataset=Dataset.open(Path(job["dataset"])), out=Path(job["out"]))


if __name__ == "__main__":
    main(prepare, needs_deepspeed=lambda job: True)
