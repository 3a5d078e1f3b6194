"""`modelyard models compare`: what it prints for each outcome."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from modelyard.artifacts import VersionInfo
from modelyard.cli import compare as command
from modelyard.training.bootstrap import Interval
from modelyard.training.comparison import Comparison
from modelyard.training.evaluation import EvaluationResult


def version(kind: str, name: str) -> VersionInfo:
    return VersionInfo(kind, name, 1, "sha256:" + "0" * 64, (), {}, "2026-01-01T00:00:00+00:00", None)  # type: ignore[arg-type]


def comparison(low: float, high: float, direction: str = "min") -> Comparison:
    metric = "perplexity" if direction == "min" else "accuracy"

    def result(name: str, value: float) -> EvaluationResult:
        return EvaluationResult(
            model=version("model", name),
            dataset=version("dataset", "pydocs"),
            split="test",
            num_rows=40,
            objective=(metric, direction),  # type: ignore[arg-type]
            metrics={metric: Interval(value, value - 1, value + 1)},
            classes=(),
            confidence=0.95,
        )

    middle = (low + high) / 2
    return Comparison(result("a", 10 + middle), result("b", 10.0), {metric: Interval(middle, low, high)})


@pytest.mark.parametrize(
    ("low", "high", "direction", "sentence"),
    [
        (-2.0, -1.0, "min", "models:/a/1 is better than models:/b/1 by perplexity (95% confidence)."),
        (1.0, 2.0, "min", "models:/b/1 is better than models:/a/1 by perplexity (95% confidence)."),
        (1.0, 2.0, "max", "models:/a/1 is better than models:/b/1 by accuracy (95% confidence)."),
        (-1.0, 2.0, "max", "cannot be told apart by accuracy on these rows"),
        (0.0, 2.0, "max", "cannot be told apart"),
        (float("nan"), float("nan"), "min", "cannot be told apart"),
        (-2.0, -2.0, "min", "cannot be told apart"),
    ],
)
def test_the_verdict_is_one_plain_sentence(low: float, high: float, direction: str, sentence: str) -> None:
    assert sentence in command.verdict(comparison(low, high, direction))


def test_the_report_shows_both_models_and_the_interval() -> None:
    lines = command.report(comparison(-2.0, -1.0))
    row = next(line for line in lines if line.startswith("perplexity"))
    assert row.split() == ["perplexity", "8.5000", "10.0000", "-1.5000", "-2.0000", "..", "-1.0000"]


def test_options_reach_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def fake(*args: object, **options: object) -> Comparison:
        seen.update(options, args=args)
        return comparison(-2.0, -1.0)

    monkeypatch.setattr("modelyard.training.comparison.compare", fake)
    words = ["a/1", "b/1", "--dataset", "pydocs", "--split", "val", "--samples", "9", "--confidence", "0.9"]
    result = CliRunner().invoke(command.compare, [*words, "--batch-size", "3", "--seed", "5"])
    assert result.exit_code == 0, result.output
    del seen["on_progress"]
    assert seen == {
        "args": ("a/1", "b/1", "pydocs"),
        "split": "val",
        "batch_size": 3,
        "bootstrap_samples": 9,
        "confidence": 0.9,
        "seed": 5,
    }


def test_options_out_of_range_are_refused() -> None:
    for words in (["--samples", "0"], ["--confidence", "1"], ["--batch-size", "0"]):
        assert CliRunner().invoke(command.compare, ["a", "b", *words]).exit_code == 2
