"""The progress bar of a run: loss, speed and utilisation on a terminal, one line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from modelyard.training.config import TrainConfig
from modelyard.training.monitor import Record

_LINE_INTERVAL_S = 10.0


class Progress:
    """Shows the records it is called with on stderr; a context manager."""

    def __init__(self, config: TrainConfig, run_id: str, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._max_steps = config.training.max_steps
        self._run_id = run_id
        self._said = 0.0
        self._lock = threading.Lock()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=self._max_steps, figures="")

    def __enter__(self) -> Self:
        self._console.print(f"run {self._run_id}: starting workers")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, record: Record) -> None:
        """Show one record. Called on the follower's thread."""
        with self._lock:
            match record["kind"]:
                case "step":
                    self._step(record)
                case "start":
                    self._bar.update(self._task, description="training", completed=record["step"])
                    self._console.print(_started(record))
                case "validation" | "initial":
                    self._console.print(f"step {record['step']}: {_measured(record)}")

    def _step(self, record: Record) -> None:
        figures = step_figures(record)
        self._bar.update(self._task, completed=record["step"], figures=figures)
        now = time.monotonic()
        is_last = record["step"] >= self._max_steps
        if not self._console.is_terminal and (is_last or now - self._said > _LINE_INTERVAL_S):
            self._said = now
            self._console.print(f"step {record['step']}/{self._max_steps}  {figures}")


def step_figures(record: Record) -> str:
    """`loss 4.213  2,614 tokens/s  MFU 58%` for a step's record."""
    if "tokens_per_s" in record:
        speed = f"{record['tokens_per_s']:,.0f} tokens/s"
    else:
        speed = f"{record['rows_per_s']:,.0f} rows/s"
    return f"loss {record['loss']:.3f}  {speed}  MFU {record['mfu']:.0%}"


def _started(record: Record) -> str:
    workers = f"{record['num_workers']} worker{'s' if record['num_workers'] > 1 else ''}"
    if record["step"] == 0:
        return f"training starts with {workers}"
    converted = ", checkpoint converted for this number" if record["universal"] else ""
    return f"training continues at step {record['step']} with {workers}{converted}"


def _measured(record: Record) -> str:
    metrics = {name: value for name, value in record.items() if name not in ("kind", "step", "time_s")}
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
