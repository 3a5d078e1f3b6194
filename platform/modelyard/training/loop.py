"""The training loop of one worker: step, measure, validate, checkpoint, and stop only at a step boundary."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from modelyard.data.dataset import Dataset
from modelyard.data.loader import LoadedBatch, Loader, LoaderState
from modelyard.errors import DivergedError
from modelyard.tasks.base import Task
from modelyard.training.batching import RankPlan
from modelyard.training.checkpoints import CheckpointWriter, TrainState
from modelyard.training.config import TrainConfig
from modelyard.training.engine import Engine
from modelyard.training.gang import Gang
from modelyard.training.history import History
from modelyard.training.interrupts import Interrupted
from modelyard.training.monitor import Reporter
from modelyard.training.noise import Noise, Norms, estimate
from modelyard.training.validation import improves, validate


@dataclass(frozen=True)
class Parts:
    """What a loop works with, made by the worker."""

    config: TrainConfig
    gang: Gang
    plan: RankPlan
    task: Task
    dataset: Dataset
    engine: Engine
    writer: CheckpointWriter
    history: History
    reporter: Reporter | None
    """Worker 0 only."""
    is_preempted: Callable[[], bool]
    """Whether this worker's node is about to be taken away."""
    peak_flops: float
    """Of the whole gang."""


@dataclass(frozen=True)
class Verdict:
    """What the gang agreed on after a step; the same on every worker."""

    loss: float
    interrupt: str | None
    stop: bool
    save: bool


class TrainLoop:
    """Runs optimizer steps from `state` on. All workers run it in lockstep."""

    def __init__(self, parts: Parts, state: TrainState) -> None:
        self._parts = parts
        self.state = state
        self.stopped_because = "all steps done"
        self._model = parts.engine.model
        self._loss_sum = torch.zeros((), device=parts.gang.device)  # read only when it is logged: reading waits
        self._steps_since_log = 0
        self._measured = (Norms(), 0.0)  # of the last measured step, and the norm of its whole gradient
        self._noise: Noise | None = None
        self._seconds: dict[str, float] = {}
        self._began = self._logged = self._saved = time.monotonic()
        self._elapsed_before = state.elapsed_s
        self._flops_per_row = parts.task.flops_per_row(parts.engine.module)

    def run(self) -> None:
        """Train to the last step, an early stop, or an interruption.

        Raises:
            Interrupted: after a checkpoint, when the gang has to be started anew.
            DivergedError: the loss is not finite; the newest checkpoint is from before.
        """
        parts = self._parts
        training = parts.config.training
        split = parts.dataset.split("train")
        start = LoaderState(self.state.seed, self.state.epoch, self.state.position)
        if self.state.step == 0:
            self._first_validation()
        with Loader(
            split,
            global_batch_size=training.global_batch_size,
            start=parts.plan.start,
            stop=parts.plan.stop,
            state=start,
        ) as loader:
            self._began = self._logged = self._saved = time.monotonic()
            while self.state.step < training.max_steps:
                step = self.state.step
                self._one_step(loader, step)
                last = step + 1 == training.max_steps
                verdict = self._agree() if last or (step + 1) % training.log_every_steps == 0 else None
                improved_enough = self._validate_if_due(last)
                self._checkpoint_if_due(last, verdict)
                if parts.reporter is not None:
                    parts.reporter.at_boundary(self.state.step)
                if verdict is not None and verdict.interrupt and not last:
                    self._leave(verdict.interrupt)
                if verdict is not None and verdict.stop:
                    self.stopped_because = "a stop was asked for"
                elif not improved_enough:
                    patience = parts.config.validation.patience
                    self.stopped_because = f"no improvement in {patience} validations"
                else:
                    continue
                break
        self._finish()

    def _one_step(self, loader: Loader, step: int) -> None:
        parts = self._parts
        clock = self._clock()
        loaded = next(loader)
        clock("data_s")
        # Dropout depends on (seed, step, worker) alone, so a resumed run repeats it without stored RNG state.
        torch.manual_seed(_mixed(parts.config.seed, step, parts.gang.rank))
        every = parts.config.training.noise_every_steps
        is_measured = every > 0 and (step + 1) % every == 0
        for index, (start, stop) in enumerate(parts.plan.micro_batches):
            is_last = index + 1 == len(parts.plan.micro_batches)
            rows = {name: column[start:stop] if stop > start else column[:1] for name, column in loaded.rows.items()}
            losses_b = parts.task.loss(self._model, parts.task.collate(rows, parts.gang.device))
            if stop == start:
                losses_b = losses_b * 0.0
            self._loss_sum += losses_b.detach().sum()
            clock("forward_s")
            parts.engine.backward(losses_b, is_last=is_last, measure_rows=stop - start if is_measured else 0)
            clock("backward_s")
        rate, norm = parts.engine.step(step)
        clock("optimizer_s")
        self._steps_since_log += 1
        if is_measured:
            self._measured = (parts.engine.take_norms(), norm)
        self._note(loaded, rate, norm)
        epoch, position = loaded.state.epoch, loaded.state.position
        self.state = self.state.with_changes(
            step=step + 1, epoch=epoch, position=position, elapsed_s=self._elapsed_before + self._running_s()
        )

    def _note(self, loaded: LoadedBatch, rate: float, norm: float) -> None:
        self._last = {"learning_rate": rate, "grad_norm": norm}
        if self._parts.config.training.record_samples:
            parts = self._parts.gang.gather(loaded.sample_ids)
            self._last["samples"] = np.concatenate(parts).tolist()

    def _agree(self) -> Verdict:
        """One small all-reduce: the loss, and whether anyone has a reason to stop, be interrupted or save."""
        parts, training = self._parts, self._parts.config.training
        wish = parts.reporter.wish if parts.reporter is not None else None
        over_time = training.stop_after_s is not None and self._running_s() > training.stop_after_s
        every_s = parts.config.checkpoint.every_s
        save_due = every_s is not None and time.monotonic() - self._saved > every_s
        wishes = [
            wish is not None and wish[0] == "resize",
            (wish is not None and wish[0] == "stop") or over_time,
        ]
        main = [float(flag and parts.gang.is_main) for flag in (*wishes, save_due)]
        norms, global_norm = self._measured
        self._measured = (Norms(), 0.0)
        loss_sum, preempted, resize, stop, save, squares, inverse_rows, count = parts.gang.sum(
            [float(self._loss_sum), float(parts.is_preempted()), *main, norms.squares, norms.inverse_rows, norms.count]
        )
        summed = Norms(squares, inverse_rows, count)
        self._noise = estimate(summed, global_norm, training.global_batch_size, self._noise)
        loss = loss_sum / (training.global_batch_size * self._steps_since_log)
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss of step {self.state.step} is {loss}",
                "lower optimizer.learning_rate, lengthen schedule.warmup_steps or set training.gradient_clipping; "
                "the newest checkpoint is from before",
            )
        self._log(loss)
        interrupt = "a node is about to be taken away" if preempted else "the gang changes its size" if resize else None
        return Verdict(loss, interrupt, stop=stop > 0, save=save > 0)

    def _log(self, loss: float) -> None:
        parts = self._parts
        now = time.monotonic()
        rows = parts.config.training.global_batch_size * self._steps_since_log
        rows_per_s = rows / (now - self._logged)
        per_step = {name: seconds / self._steps_since_log for name, seconds in self._seconds.items()}
        record: dict[str, Any] = {
            "step": self.state.step,
            "loss": loss,
            **self._last,
            "epoch": self.state.epoch,
            "rows_per_s": rows_per_s,
            "mfu": rows_per_s * self._flops_per_row / parts.peak_flops,
            **per_step,
            "elapsed_s": self.state.elapsed_s,
            "num_workers": parts.gang.num_workers,
        }
        if self._noise is not None:
            record |= {"gradient_signal": self._noise.signal, "gradient_variance": self._noise.variance}
            record["gradient_noise_scale"] = self._noise.scale
        if (block_tokens := parts.dataset.info.block_tokens) is not None:
            record["tokens_per_s"] = rows_per_s * block_tokens
        self._report("step", record)
        self._loss_sum.zero_()
        self._steps_since_log, self._seconds, self._logged = 0, {}, now

    def _validate_if_due(self, last: bool) -> bool:
        """Validate when it is time. False when patience has run out."""
        settings = self._parts.config.validation
        if settings.every_steps == 0 or not (last or self.state.step % settings.every_steps == 0):
            return True
        name, direction = self._parts.task.objective
        metrics = self._metrics(settings.split)
        better = improves(metrics[name], self.state.best_metric, direction)
        if better:
            self.state = self.state.with_changes(
                best_metric=metrics[name], best_step=self.state.step, stale_validations=0
            )
        else:
            self.state = self.state.with_changes(stale_validations=self.state.stale_validations + 1)
        self._report(
            "validation",
            {"step": self.state.step, **{f"{settings.split}_{k}": v for k, v in metrics.items()}},
        )
        if better and self._parts.config.checkpoint.keep_best and not last:
            self._checkpoint()
        return settings.patience is None or self.state.stale_validations < settings.patience

    def _first_validation(self) -> None:
        split = self._parts.config.validation.final_of(self._parts.dataset.info.splits)
        if split is None:
            return
        metrics = self._metrics(split)
        self.state = self.state.with_changes(initial_metrics=metrics)
        self._report("initial", {"step": 0, **{f"{split}_{name}": value for name, value in metrics.items()}})

    def _metrics(self, split: str) -> dict[str, float]:
        config = self._parts.config
        began = time.monotonic()
        metrics = validate(
            self._parts.task,
            self._model,
            self._parts.dataset.split(split),
            self._parts.gang,
            batch_size=config.training.micro_batch_size,
            max_rows=config.validation.max_rows,
        )
        self._logged += time.monotonic() - began  # speed is that of training
        return metrics

    def _checkpoint_if_due(self, last: bool, verdict: Verdict | None) -> None:
        every = self._parts.config.checkpoint.every_steps
        due = every > 0 and self.state.step % every == 0
        if last or due or (verdict is not None and (verdict.save or verdict.interrupt or verdict.stop)):
            self._checkpoint()

    def _checkpoint(self) -> None:
        parts = self._parts
        if self._saved_step == self.state.step:
            return
        began = time.monotonic()
        history = parts.history.to_parquet() if parts.gang.is_main else None
        parts.writer.save(self.state, parts.engine.save, history)
        self._saved, self._saved_step = time.monotonic(), self.state.step
        self._logged += self._saved - began

    def _leave(self, reason: str) -> None:
        self._finish()
        raise Interrupted(reason, self.state.step)

    def _finish(self) -> None:
        """Everything saved and committed, on every worker."""
        self._checkpoint()
        self._parts.writer.wait()
        self._parts.gang.barrier()

    def _report(self, kind: str, record: dict[str, Any]) -> None:
        if self._parts.reporter is not None:
            self._parts.history.add(record)
            self._parts.reporter.record(kind, {key: value for key, value in record.items() if key != "samples"})

    def _running_s(self) -> float:
        return time.monotonic() - self._began

    def _clock(self) -> Callable[[str], None]:
        """A function that books the time since its last call under a name."""
        last = time.perf_counter()

        def book(name: str) -> None:
            nonlocal last
            now = time.perf_counter()
            self._seconds[name] = self._seconds.get(name, 0.0) + now - last
            last = now

        return book

    _last: dict[str, Any] = {}
    _saved_step: int = -1


def _mixed(*numbers: int) -> int:
    """A 63-bit seed from whole numbers, equal for equal numbers on every machine."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
