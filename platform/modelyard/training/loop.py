"""The training loop of one worker: step, measure, validate, checkpoint, and stop only at a step boundary."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from modelyard.data.dataset import Dataset
from modelyard.data.loader import LoaderState
from modelyard.errors import DivergedError
from modelyard.tasks.base import Task
from modelyard.tasks.slices import cut
from modelyard.training.agreement import Agreements, Verdict
from modelyard.training.batching import RankPlan
from modelyard.training.checkpoints import CheckpointWriter, TrainState
from modelyard.training.config import TrainConfig
from modelyard.training.engines import TrainEngine
from modelyard.training.gang import Gang
from modelyard.training.history import History
from modelyard.training.interrupts import Interrupted
from modelyard.training.monitor import Reporter
from modelyard.training.noise import Noise, Norms, estimate
from modelyard.training.pipeline import StagedModel
from modelyard.training.rows import PartRows, RowSource, row_source
from modelyard.training.validation import improves, validate


@dataclass(frozen=True)
class Parts:
    """What a loop works with, made by the worker."""

    config: TrainConfig
    gang: Gang
    plan: RankPlan
    task: Task
    dataset: Dataset
    engine: TrainEngine
    writer: CheckpointWriter
    history: History
    reporter: Reporter | None
    """Worker 0 only."""
    is_preempted: Callable[[], bool]
    """Whether this worker's node is about to be taken away."""
    peak_flops: float
    """Of the whole gang."""
    flops_per_row: float
    """Of the whole model: what `Task.flops_per_row` says before it is cut into parts."""


@dataclass(frozen=True)
class Note:
    """What a worker itself knows of the steps whose sums are on the way."""

    record: dict[str, Any]
    steps: int
    gradient_norm: float
    """Of the whole gradient of the measured step among them; 0 without one."""


class TrainLoop:
    """Runs optimizer steps from `state` on.

    All workers do the same things after the same steps, but need not come there at the same time: how far one may
    be ahead is the engine's `spread`.
    """

    def __init__(self, parts: Parts, state: TrainState) -> None:
        self._parts = parts
        self.state = state
        self.stopped_because = "all steps done"
        self._model = parts.engine.model
        self._loss_sum = torch.zeros((), device=parts.gang.device)  # read only when it is logged: reading waits
        self._agreements: Agreements[Note] = Agreements(parts.gang, parts.engine.spread)
        self._steps_since_log = 0
        self._samples: list[np.ndarray] = []
        self._sent = parts.engine.sent_bytes
        self._measured = (Norms(), 0.0)  # of the last measured step, and the norm of its whole gradient
        self._noise: Noise | None = None
        self._seconds: dict[str, float] = {}
        self._began = self._logged = self._saved = time.monotonic()
        self._elapsed_before = state.elapsed_s
        self._flops_per_row = parts.flops_per_row

    def run(self) -> None:
        """Train to the last step, an early stop, or an interruption.

        Raises:
            Interrupted: after a checkpoint, when the gang has to be started anew.
            DivergedError: the loss is not finite; the newest checkpoint is from before.
        """
        parts = self._parts
        training = parts.config.training
        if self.state.step == 0:
            self._first_validation()
        with row_source(
            parts.dataset.split("train"),
            self._place,
            parts.plan,
            global_batch_size=training.global_batch_size,
            is_claiming=parts.engine.is_claiming,
        ) as rows:
            self._began = self._logged = self._saved = time.monotonic()
            while self.state.step < training.max_steps:
                step = self.state.step
                self._one_step(rows, step)
                last = step + 1 == training.max_steps
                verdict = self._agree(last)
                improved_enough = self._validate_if_due(last)
                self._checkpoint_if_due(last, verdict)
                if parts.reporter is not None:
                    parts.reporter.at_boundary(self.state.step)
                if verdict.interrupt and not last:
                    self._leave(verdict.interrupt)
                if verdict.stop:
                    self.stopped_because = "a stop was asked for"
                elif not improved_enough:
                    patience = parts.config.validation.patience
                    self.stopped_because = f"no improvement in {patience} validations"
                else:
                    continue
                break
        self._finish()

    @property
    def _place(self) -> LoaderState:
        """Where the next global batch starts."""
        return LoaderState(self.state.seed, self.state.epoch, self.state.position)

    def _one_step(self, rows: RowSource, step: int) -> None:
        parts, training = self._parts, self._parts.config.training
        clock = self._clock()
        parts.task.begin_step(parts.engine.module, step, training.max_steps)
        is_measured = training.noise_every_steps > 0 and (step + 1) % training.noise_every_steps == 0
        own = np.zeros(training.global_batch_size if training.record_samples else 0)
        for part in parts.engine.parts(step):
            clock("optimizer_s")  # waiting for weights is part of the exchange
            loaded = rows.read(self._place, part)
            clock("data_s")
            # Dropout depends on (seed, step, part) alone, so a resumed run repeats it without stored RNG state.
            number = part.start if parts.engine.is_claiming else parts.gang.dropout_rank
            torch.manual_seed(_mixed(parts.config.seed, step, number))
            self._compute(part, loaded, is_measured, clock)
            if own.size and parts.gang.part == 0:
                own[part.start : part.stop] = loaded.sample_ids
        rate, norm = parts.engine.step(step)
        clock("optimizer_s")
        self._steps_since_log += 1
        self._samples.append(own)
        self._last = {"learning_rate": rate, "grad_norm": norm}
        if is_measured:
            self._measured = (parts.engine.take_norms(), norm)
        after = self._place.advance(training.global_batch_size, parts.dataset.split("train").num_rows)
        self.state = self.state.with_changes(
            step=step + 1,
            epoch=after.epoch,
            position=after.position,
            elapsed_s=self._elapsed_before + self._running_s(),
        )

    def _compute(self, part: RankPlan, loaded: PartRows, is_measured: bool, clock: Callable[[str], None]) -> None:
        """Forward and backward passes over the micro-batches of one part."""
        parts = self._parts
        if isinstance(self._model, StagedModel):
            self._compute_in_stages(self._model, part, loaded, clock)
            return
        for index, (start, stop) in enumerate(part.micro_batches):
            is_last = index + 1 == len(part.micro_batches)
            rows = {name: column[start:stop] if stop > start else column[:1] for name, column in loaded.columns.items()}
            batch = cut(parts.task.collate(rows, parts.gang.device), parts.gang.slice, parts.gang.parallel.sequence)
            losses_b = parts.task.loss(self._model, batch)
            if stop == start:
                losses_b = losses_b * 0.0
            self._loss_sum += losses_b.detach().sum()
            clock("forward_s")
            parts.engine.backward(losses_b, is_last=is_last, measure_rows=stop - start if is_measured else 0)
            clock("backward_s")

    def _compute_in_stages(
        self, model: StagedModel, part: RankPlan, loaded: PartRows, clock: Callable[[str], None]
    ) -> None:
        """All micro-batches at once: they overlap in the pipeline."""
        task, batches = self._parts.task, []
        for start, stop in part.micro_batches:
            rows = {name: column[start:stop] if stop > start else column[:1] for name, column in loaded.columns.items()}
            batches.append((task.collate(rows, self._parts.gang.device), stop > start))
        self._loss_sum += model.train_on(task, batches)
        clock("pipeline_s")

    def _agree(self, last: bool) -> Verdict:
        """What the gang has agreed on by now. Nothing is left open where all workers have to meet."""
        step = self.state.step
        if last or step % self._parts.config.training.log_every_steps == 0:
            self._tell()
        meets = last or self._is_validation_due(last) or self._is_checkpoint_due()
        verdict = self._settled(self._agreements.due(step, everything=meets))
        if verdict.asks_for_something:
            verdict |= self._settled(self._agreements.due(step, everything=True))
        return verdict

    def _tell(self) -> None:
        """Begin one small all-reduce: the loss, and whether anyone has a reason to stop, be interrupted or save."""
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
        measured = (norms.squares, norms.inverse_rows, norms.count, float(self._loss_sum))
        values = [*(figure * parts.gang.share for figure in measured), float(parts.is_preempted()), *main]
        note = Note(self._record(), self._steps_since_log, global_norm)
        self._agreements.begin(self.state.step, note, [*values, *np.concatenate(self._samples).tolist()])
        self._loss_sum.zero_()
        self._measured, self._steps_since_log, self._seconds = (Norms(), 0.0), 0, {}
        self._samples.clear()

    def _settled(self, sums: Iterable[tuple[Note, list[float]]]) -> Verdict:
        verdict = Verdict()
        for note, total in sums:
            verdict |= self._settle(note, total)
        return verdict

    def _settle(self, note: Note, total: list[float]) -> Verdict:
        """Log what all workers have measured and find out what they want."""
        batch = self._parts.config.training.global_batch_size
        squares, inverse_rows, count, loss_sum, preempted, resize, stop, save, *samples = total
        self._noise = estimate(Norms(squares, inverse_rows, count), note.gradient_norm, batch, self._noise)
        loss, record = loss_sum / (batch * note.steps), note.record
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss of step {record['step']} is {loss}",
                "lower optimizer.learning_rate, lengthen schedule.warmup_steps or set training.gradient_clipping; "
                "the newest checkpoint is from before",
            )
        if self._noise is not None:
            record |= {"gradient_signal": self._noise.signal, "gradient_variance": self._noise.variance}
            record["gradient_noise_scale"] = self._noise.scale
        if samples:
            record["samples"] = [int(sample) for sample in samples]
        self._report("step", {"step": record["step"], "loss": loss, **record})
        interrupt = "a node is about to be taken away" if preempted else "the gang changes its size" if resize else None
        return Verdict(interrupt, stop=stop > 0, save=save > 0)

    def _record(self) -> dict[str, Any]:
        """What this worker alone can say of the steps since it last did."""
        parts, steps = self._parts, self._steps_since_log
        now = time.monotonic()
        rows_per_s = parts.config.training.global_batch_size * steps / (now - self._logged)
        record: dict[str, Any] = {
            "step": self.state.step,
            **self._last,
            "epoch": self.state.epoch,
            "rows_per_s": rows_per_s,
            "mfu": rows_per_s * self._flops_per_row / parts.peak_flops,
            **{name: seconds / steps for name, seconds in self._seconds.items()},
            "elapsed_s": self.state.elapsed_s,
            "num_workers": parts.gang.num_workers,
        }
        if (block_tokens := parts.dataset.info.block_tokens) is not None:
            record["tokens_per_s"] = rows_per_s * block_tokens
        if (sent := parts.engine.sent_bytes) is not None and self._sent is not None:
            record["sent_bytes"], self._sent = (sent - self._sent) / steps, sent
        self._logged = now
        return record

    def _validate_if_due(self, last: bool) -> bool:
        """Validate when it is time. False when patience has run out."""
        if not self._is_validation_due(last):
            return True
        settings = self._parts.config.validation
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

    def _is_validation_due(self, last: bool) -> bool:
        every = self._parts.config.validation.every_steps
        return every > 0 and (last or self.state.step % every == 0)

    def _first_validation(self) -> None:
        split = self._parts.config.validation.final_of(self._parts.dataset.info.splits)
        if split is None:
            return
        metrics = self._metrics(split)
        self.state = self.state.with_changes(initial_metrics=metrics)
        self._report("initial", {"step": 0, **{f"{split}_{name}": value for name, value in metrics.items()}})

    def _metrics(self, split: str) -> dict[str, float]:
        config = self._parts.config
        with self._parts.engine.published() as model:  # waits for steps that are still on their way
            began = time.monotonic()
            metrics = validate(
                self._parts.task,
                model,
                self._parts.dataset.split(split),
                self._parts.gang,
                batch_size=config.training.micro_batch_size,
                max_rows=config.validation.max_rows,
            )
        self._logged += time.monotonic() - began  # speed is that of training
        return metrics

    def _checkpoint_if_due(self, last: bool, verdict: Verdict) -> None:
        if last or self._is_checkpoint_due() or verdict.asks_for_something:
            self._checkpoint()

    def _is_checkpoint_due(self) -> bool:
        every = self._parts.config.checkpoint.every_steps
        return every > 0 and self.state.step % every == 0

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
