"""The study while it runs: one table on a terminal, a line when a trial starts and ends elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.table import Table
from rich.text import Text

from modelyard.tuning.config import Objective
from modelyard.tuning.study import Trial, best, spent_steps
from modelyard.tuning.tables import columns, figure, line, rows, settings_of

_MOST_ROWS = 20


class Live:
    """Shows the trials it is called with on stderr; a context manager."""

    def __init__(
        self, name: str, num_trials: int, objectives: Sequence[Objective], console: Console | None = None
    ) -> None:
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._name, self._num_trials, self._objectives = name, num_trials, objectives
        self._trials: dict[str, Trial] = {}
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._live = RichLive(get_renderable=self._picture, console=self._console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._console.print(f"study {self._name}: {self._num_trials} trials")
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def __call__(self, trial: Trial) -> None:
        """Show one trial as it is now."""
        with self._lock:
            was = self._trials.get(trial.trial_id)
            self._trials[trial.trial_id] = trial
        if self._console.is_terminal:
            return
        if trial.is_over and (was is None or not was.is_over):
            self._console.print(line(trial, self._objectives), markup=False)
        elif was is None:
            self._console.print(f"trial {trial.number} starts ({settings_of(trial)})", markup=False)

    def _picture(self) -> Group:
        with self._lock:
            trials = sorted(self._trials.values(), key=lambda trial: trial.number)
        table = Table(box=None, pad_edge=False)
        for column in columns(trials, self._objectives):
            table.add_column(column)
        by_number = dict(zip((trial.number for trial in trials), rows(trials, self._objectives), strict=True))
        for trial in worth_showing(trials):
            table.add_row(*map(Text, by_number[trial.number]))
        return Group(table, Text(self._summary(trials), style="bold"))

    def _summary(self, trials: Sequence[Trial]) -> str:
        over = [trial for trial in trials if trial.is_over]
        found = best(over, self._objectives)
        shown = f", best {figure(found[0].value(self._objectives[0]))} (trial {found[0].number})" if found else ""
        elapsed = int(time.monotonic() - self._began)
        return f"{len(over)}/{self._num_trials} trials over, {spent_steps(trials):,} steps{shown}, {elapsed} s"


def worth_showing(trials: Sequence[Trial]) -> list[Trial]:
    """Those that fit on a screen: all that run, then the newest that are over."""
    running = [trial for trial in trials if not trial.is_over]
    over = [trial for trial in trials if trial.is_over]
    room = max(_MOST_ROWS - len(running), 1)
    return sorted([*running, *over[-room:]], key=lambda trial: trial.number)
