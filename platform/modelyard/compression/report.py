"""Before and after: a table, a picture, and whether the limits hold."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from modelyard.compression.measuring import Figures
from modelyard.compression.recipe import Limits

_MIB = 1 << 20


@dataclass(frozen=True)
class Report:
    """A source and what became of it, on the recipe's target."""

    objective: tuple[str, Literal["min", "max"]]
    """The deciding metric and its better direction."""
    before: Figures
    """The source in eager PyTorch, which computes in fp32."""
    after: Figures
    """The result on the recipe's target."""
    unit: Literal["token", "image", "text"]
    """What is timed."""
    remarks: tuple[str, ...] = ()
    """What a reader of the figures must know."""
    source_codes: str = ""
    """How the source's weights are stored, where it was compressed before: e.g. `int4`."""
    stored_bytes: tuple[int, int] | None = None
    """All files of the two registered versions: an export lies beside the weights that it was made from."""

    @property
    def source(self) -> str:
        """What was measured before, e.g. `torch`, or `torch, int4 weights`."""
        return f"{self.before.engine}, {self.source_codes} weights" if self.source_codes else self.before.engine

    @property
    def size_ratio(self) -> float:
        """How many times smaller."""
        return self.before.size_bytes / self.after.size_bytes

    @property
    def quality_drop(self) -> float:
        """What the deciding metric lost: a share of the source's where lower is better, else the difference."""
        name, direction = self.objective
        before, after = self.before.quality[name], self.after.quality[name]
        return after / before - 1 if direction == "min" else before - after

    @property
    def latency_ratio(self) -> float:
        """How many times faster one token (or image) is, by the median."""
        return self.before.latency_p50_ms / self.after.latency_p50_ms

    @property
    def speedup(self) -> float:
        """Tokens (or images) per CPU-second over the source's."""
        return self.after.per_cpu_s / self.before.per_cpu_s

    def metrics(self) -> dict[str, float]:
        """For the registered version."""
        after = {f"after_{name}": value for name, value in _flat(self.after).items()}
        before = {f"before_{name}": value for name, value in _flat(self.before).items()}
        ratios = {
            "size_ratio": self.size_ratio,
            "quality_drop": self.quality_drop,
            "latency_ratio": self.latency_ratio,
            "speedup": self.speedup,
        }
        return {f"compression/{name}": value for name, value in {**ratios, **before, **after}.items()}

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        figures = {"before": asdict(self.before), "after": asdict(self.after)}
        stored = {"stored_bytes": list(self.stored_bytes)} if self.stored_bytes is not None else {}
        return {**figures, **stored, "objective": self.objective[0], "remarks": list(self.remarks)}

    def lines(self) -> list[str]:
        """The table."""
        name, direction = self.objective
        b, a = self.before, self.after
        percent = round(100 * self.quality_drop * (1 if direction == "min" else -1), 2) + 0.0  # -0.0 + 0.0 is 0.0
        sizes = {"size": (b.size_bytes, a.size_bytes)}
        if self.stored_bytes is not None:
            sizes["all files"] = self.stored_bytes
        rows = [
            *(
                (label, f"{x / _MIB:.4g} MiB", f"{y / _MIB:.4g} MiB", times(x / y, "less", "more"))
                for label, (x, y) in sizes.items()
            ),
            (
                name,
                f"{b.quality[name]:.5g}",
                f"{a.quality[name]:.5g}",
                f"{percent:+.2f}%" if direction == "min" else f"{percent:+.2f} points",
            ),
            *self._speed_rows(),
            (
                "peak memory",
                f"{b.peak_memory_mib:.0f} MiB",
                f"{a.peak_memory_mib:.0f} MiB",
                times(b.peak_memory_mib / a.peak_memory_mib, "less", "more"),
            ),
        ]
        head = ("", f"before ({self.source})", f"after ({a.engine})", "")
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(4)]
        table = [
            f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}".rstrip()
            for row in [head, *rows]
        ]
        return [*table, *(f"note       {remark}" for remark in self.remarks)]

    def _speed_rows(self) -> list[tuple[str, str, str, str]]:
        b, a = self.before, self.after
        latency = [(f"{self.unit} p50", "latency_p50_ms"), (f"{self.unit} p99", "latency_p99_ms")]
        if b.first_token_ms is not None and a.first_token_ms is not None:
            latency.append(("first token", "first_token_ms"))
        rates = [(f"{self.unit}s/s", "per_s"), (f"{self.unit}s/CPU-s", "per_cpu_s")]
        found = []
        for label, field in latency:
            x, y = getattr(b, field), getattr(a, field)
            found.append((label, f"{x:.4g} ms", f"{y:.4g} ms", times(x / y, "faster", "slower")))
        if b.scored_per_cpu_s is not None and a.scored_per_cpu_s is not None:
            rates.append((f"read {self.unit}s/CPU-s", "scored_per_cpu_s"))
        for label, field in rates:
            x, y = getattr(b, field), getattr(a, field)
            found.append((label, f"{x:.4g}", f"{y:.4g}", times(y / x, "faster", "slower")))
        return found


def times(ratio: float, better: str, worse: str) -> str:
    """`1.61x slower` for a ratio of 0.62. Pure."""
    if f"{max(ratio, 1 / ratio):.2f}" == "1.00":
        return "the same"
    return f"{ratio:.2f}x {better}" if ratio > 1 else f"{1 / ratio:.2f}x {worse}"


def broken_limits(report: Report, limits: Limits) -> list[str]:
    """Each limit that does not hold, as a sentence with both numbers. Pure."""
    name, direction = report.objective
    before, after = report.before, report.after
    broken = []
    if (most := limits.max_perplexity_increase) is not None and direction == "min" and report.quality_drop > most:
        broken.append(f"max_perplexity_increase={most:g}: {name} rose by {report.quality_drop:.4g}")
    if (most := limits.max_accuracy_drop) is not None and direction == "max" and report.quality_drop > most:
        broken.append(f"max_accuracy_drop={most:g}: {name} fell by {report.quality_drop:.4g}")
    if (least := limits.min_size_ratio) is not None and report.size_ratio < least:
        broken.append(f"min_size_ratio={least:g}: it is {times(report.size_ratio, 'smaller', 'larger')}")
    if (least := limits.min_speedup) is not None and report.speedup < least:
        broken.append(
            f"min_speedup={least:g}: {after.per_cpu_s:.4g} {report.unit}s per CPU-second "
            f"after {before.per_cpu_s:.4g} before, {times(report.speedup, 'faster', 'slower')}"
        )
    if (most := limits.max_p99_ms) is not None and after.latency_p99_ms > most:
        broken.append(f"max_p99_ms={most:g}: one {report.unit} takes {after.latency_p99_ms:.4g} ms")
    if (most := limits.max_peak_memory_mib) is not None and after.peak_memory_mib > most:
        broken.append(f"max_peak_memory_mib={most:g}: it peaks at {after.peak_memory_mib:.0f} MiB")
    return broken


def draw(report: Report, path: Path, title: str) -> Path:
    """The report as a PNG: what the result has of each figure of the source."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    name = report.objective[0]
    b, a = report.before, report.after
    parts: dict[str, tuple[float, str]] = {
        "size": (a.size_bytes / b.size_bytes, f"{b.size_bytes / _MIB:.4g} -> {a.size_bytes / _MIB:.4g} MiB"),
        f"{report.unit} p50": (
            a.latency_p50_ms / b.latency_p50_ms,
            f"{b.latency_p50_ms:.3g} -> {a.latency_p50_ms:.3g} ms",
        ),
        f"{report.unit} p99": (
            a.latency_p99_ms / b.latency_p99_ms,
            f"{b.latency_p99_ms:.3g} -> {a.latency_p99_ms:.3g} ms",
        ),
        "CPU time": (b.per_cpu_s / a.per_cpu_s, f"{1000 / b.per_cpu_s:.3g} -> {1000 / a.per_cpu_s:.3g} ms"),
        "peak memory": (
            a.peak_memory_mib / b.peak_memory_mib,
            f"{b.peak_memory_mib:.0f} -> {a.peak_memory_mib:.0f} MiB",
        ),
        name: (a.quality[name] / (b.quality[name] or 1.0), f"{b.quality[name]:.4g} -> {a.quality[name]:.4g}"),
    }
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels = list(parts)[::-1]
    shares = [parts[label][0] for label in labels]
    axes.barh(labels, shares, color=["tab:orange" if label == name else "tab:blue" for label in labels])
    for index, label in enumerate(labels):
        axes.text(shares[index], index, f"  {parts[label][1]}", va="center", fontsize=9)
    axes.axvline(1.0, color="black", linewidth=0.8)
    below = [f"share of the source ({report.source}); after on {a.engine}", *report.remarks]
    axes.set(xlabel="\n".join(textwrap.fill(line, 90) for line in below), title=title)
    axes.set_xlim(0, 1.45 * max(1.0, *shares))
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _flat(figures: Figures) -> Mapping[str, float]:
    plain = asdict(figures)
    numbers = {name: float(value) for name, value in plain.items() if isinstance(value, int | float)}
    return numbers | {name: float(value) for name, value in figures.quality.items()}
