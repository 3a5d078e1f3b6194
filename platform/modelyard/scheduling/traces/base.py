"""What every reader of a trace gives: jobs, the cluster they ran on, and each job's hidden truth.

A `Run` is one job as it really behaves. The simulator moves it forward; a policy sees of it only `speed`, `done` and
what its `Request` says. A `Trace` can be simulated any number of times: `TraceJob.begin` makes a fresh `Run`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from modelyard.cluster import Node
from modelyard.errors import DataError, NotFoundError
from modelyard.scheduling.model import POOL_LABEL, Request, Speed


class Run(Protocol):
    """One job as it really runs. Only the simulator holds it."""

    @property
    def done(self) -> float:
        """Progress so far, in the units of the visible `speed`."""
        ...

    @property
    def speed(self) -> Speed:
        """What a policy may know of its speed now; learned from what it has run so far where the rules say so."""
        ...

    def place(self, accelerator: str, counts: Sequence[int]) -> None:
        """Its workers now run as `counts` per node of one accelerator."""
        ...

    def advance(self, seconds: float) -> float:
        """Runs for `seconds` or until it is finished; gives the seconds it took."""
        ...

    @property
    def is_finished(self) -> bool:
        """Whether all its work is done."""
        ...


@dataclass(frozen=True)
class SteadyRun:
    """Recipe of a job whose speed depends on nothing but where it runs; `begin` starts it."""

    work: float
    truth: Speed
    seen: Speed | None = None
    """What a policy sees; the truth itself when None (an oracle, as in Gavel)."""

    def begin(self) -> Run:
        """A fresh run of the job."""
        return _Steady(self)


class _Steady:
    def __init__(self, recipe: SteadyRun) -> None:
        self._recipe = recipe
        self._rate = 0.0
        self.done = 0.0
        self.speed = recipe.seen or recipe.truth

    @property
    def is_finished(self) -> bool:
        return self.done >= self._recipe.work

    def place(self, accelerator: str, counts: Sequence[int]) -> None:
        self._rate = self._recipe.truth.goodput(accelerator, sum(counts), len(counts))

    def advance(self, seconds: float) -> float:
        if self._rate <= 0:
            return seconds
        needed = (self._recipe.work - self.done) / self._rate
        if needed <= seconds:
            self.done = self._recipe.work
            return needed
        self.done += self._rate * seconds
        return seconds


@dataclass(frozen=True)
class TableSpeed:
    """Measured speeds: (accelerator, workers) to progress per second; 0 where nothing was measured."""

    rates: Mapping[tuple[str, int], float]
    spread: Mapping[tuple[str, int], float] = field(default_factory=dict)
    """The same when the workers are on more than one node; `rates` where it is silent."""

    def goodput(self, accelerator: str, workers: int, nodes: int) -> float:
        """The measured rate."""
        key = (accelerator, workers)
        if nodes > 1 and key in self.spread:
            return self.spread[key]
        return self.rates.get(key, 0.0)


@dataclass(frozen=True, kw_only=True)
class TraceJob:
    """One job of a trace."""

    request: Request
    submitted_s: float
    begin: Callable[[], Run]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A workload and the cluster it is meant for."""

    name: str
    jobs: tuple[TraceJob, ...]
    """By time of submission."""
    nodes: tuple[Node, ...] = ()
    """The cluster of the publication; empty when the format describes none."""
    accelerators: Mapping[str, str] = field(default_factory=dict)


def cluster_of(pools: Mapping[str, tuple[int, int]], *, cpus_per_gpu: float = 8.0) -> tuple[Node, ...]:
    """Nodes of pools given as name to (number of nodes, GPUs of each)."""
    return tuple(
        Node(
            node_id=f"{pool}-{index:04d}",
            total={"GPU": float(gpus), "CPU": gpus * cpus_per_gpu},
            free={"GPU": float(gpus), "CPU": gpus * cpus_per_gpu},
            labels={POOL_LABEL: pool},
        )
        for pool, (count, gpus) in pools.items()
        for index in range(count)
    )


@dataclass(frozen=True)
class Row:
    """One line of a text trace; its fields refuse what they cannot be, by file, line and name."""

    path: Path
    line: int
    values: Mapping[str, str]

    def text(self, name: str) -> str:
        """A field that must be there."""
        value = self.values.get(name)
        if value is None or value == "":
            raise self.error(name, "is missing")
        return value

    def number(self, name: str, *, least: float = float("-inf")) -> float:
        """A field that is a finite number of at least `least`."""
        value = self.text(name)
        try:
            found = float(value)
        except ValueError:
            raise self.error(name, f"is {value!r}, not a number") from None
        if not least <= found < float("inf"):
            raise self.error(name, f"is {value}, below {least:g} or not finite")
        return found

    def whole(self, name: str, *, least: int = 0) -> int:
        """A field that is a whole number of at least `least`."""
        found = self.number(name, least=least)
        if found != int(found):
            raise self.error(name, f"is {found:g}, not a whole number")
        return int(found)

    def error(self, name: str, problem: str) -> DataError:
        """The error for one field of this line."""
        return DataError(f"{self.path}, line {self.line}: field {name!r} {problem}", "repair or remove the line")


def read_text(path: Path) -> str:
    """The text of a trace file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"there is no trace {path}", "give the path of an existing file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}", "give a UTF-8 file") from error


def read_table(path: Path, columns: Sequence[str], *, separator: str = ",", header: bool = True) -> Iterator[Row]:
    """Lines of a delimited file. `columns` must be in its header, or name the fields when it has none."""
    lines = csv.reader(io.StringIO(read_text(path)), delimiter=separator)
    names: Sequence[str] = columns
    for number, values in enumerate(lines, start=1):
        if header and number == 1:
            names = values
            for column in columns:
                if column not in names:
                    raise DataError(f"{path}, line 1: field {column!r} is missing", "the header must name it")
        elif values:
            if len(values) < len(names):
                raise DataError(
                    f"{path}, line {number}: field {names[len(values)]!r} is missing ({len(values)} of {len(names)})",
                    "repair or remove the line",
                )
            yield Row(path, number, dict(zip(names, values, strict=False)))


def in_order(jobs: list[TraceJob], path: Path) -> tuple[TraceJob, ...]:
    """Jobs by time of submission; two of one name are an error."""
    if not jobs:
        raise DataError(f"{path}: holds no jobs", "give a trace with at least one job")
    seen: set[str] = set()
    for job in jobs:
        if job.request.job_id in seen:
            raise DataError(f"{path}: two jobs are named {job.request.job_id!r}", "rename one")
        seen.add(job.request.job_id)
    return tuple(sorted(jobs, key=lambda job: job.submitted_s))
