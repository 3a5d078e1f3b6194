"""The table of a report: what a reader sees of sizes, quality and speed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from modelyard.compression.measuring import Figures
from modelyard.compression.recipe import Limits
from modelyard.compression.report import Report, broken_limits, times

MIB = 1 << 20
SOURCE = Figures(
    engine="torch",
    size_bytes=4 * MIB,
    quality={"perplexity": 10.0, "accuracy": 0.9},
    latency_p50_ms=10.0,
    latency_p99_ms=20.0,
    first_token_ms=30.0,
    per_s=100.0,
    per_cpu_s=100.0,
    scored_per_cpu_s=1000.0,
    peak_memory_mib=300.0,
)


def report(metric: str = "perplexity", *, more: dict[str, Any] | None = None, **changes: Any) -> Report:
    direction: Any = "max" if metric == "accuracy" else "min"
    return Report((metric, direction), SOURCE, replace(SOURCE, **changes), "token", **(more or {}))


def row(of: Report, label: str) -> str:
    """What the table says behind a label, with one space between the words."""
    return next(" ".join(line[len(label) :].split()) for line in of.lines() if line.startswith(label))


@pytest.mark.parametrize(
    ("ratio", "said"), [(0.62, "1.61x slower"), (0.15, "6.67x slower"), (1.0, "the same"), (0.997, "the same")]
)
def test_a_ratio_below_one_is_told_by_its_own_word(ratio: float, said: str) -> None:
    assert times(ratio, "faster", "slower") == said
    assert times(2.5, "faster", "slower") == "2.50x faster"


def test_a_result_that_is_larger_and_slower_is_said_to_be() -> None:
    worse = report(size_bytes=8 * MIB, latency_p50_ms=16.1, per_cpu_s=50.0, peak_memory_mib=600.0)
    assert row(worse, "size") == "4 MiB 8 MiB 2.00x more"
    assert row(worse, "token p50").endswith("1.61x slower")
    assert row(worse, "tokens/CPU-s").endswith("2.00x slower")
    assert row(worse, "peak memory").endswith("2.00x more")
    assert broken_limits(worse, Limits(min_size_ratio=2, min_speedup=1)) == [
        "min_size_ratio=2: it is 2.00x larger",
        "min_speedup=1: 50 tokens per CPU-second after 100 before, 2.00x slower",
    ]


@pytest.mark.parametrize(("metric", "said"), [("perplexity", "10 10 +0.00%"), ("accuracy", "0.9 0.9 +0.00 points")])
def test_no_change_of_quality_has_no_minus(metric: str, said: str) -> None:
    almost = {"perplexity": 9.99999999, "accuracy": 0.89999999}
    assert row(report(metric), metric) == said
    assert row(report(metric, quality=almost), metric) == said


def test_a_lower_accuracy_is_told_in_points() -> None:
    assert row(report("accuracy", quality={"accuracy": 0.88}), "accuracy") == "0.9 0.88 -2.00 points"


def test_the_whole_version_has_a_row_beside_the_file_that_was_measured() -> None:
    export = report(size_bytes=MIB, more={"stored_bytes": (5 * MIB, 6 * MIB)})
    assert row(export, "size") == "4 MiB 1 MiB 4.00x less"
    assert row(export, "all files") == "5 MiB 6 MiB 1.20x more"
    assert export.as_dict()["stored_bytes"] == [5 * MIB, 6 * MIB]


def test_the_head_says_what_the_source_was() -> None:
    assert "before (torch)" in report().lines()[0]
    assert "before (torch, int4 weights)" in report(more={"source_codes": "int4"}).lines()[0]
