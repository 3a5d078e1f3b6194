"""`modelyard simulate`: figures and a picture of policies on a workload; what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from modelyard.cli.main import modelyard
from modelyard.errors import ConfigError, DataError, NotFoundError

TRACE = """\
{"pools": {"a100": {"nodes": 1, "gpus": 4}}}
{"job": "long", "submit_s": 0, "work": 7200, "min": 4, "max": 4}
{"job": "short", "submit_s": 60, "work": 60, "min": 1, "max": 1}
"""


def simulate(*words: str) -> str:
    found = CliRunner().invoke(modelyard, ["simulate", *words])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.output


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text(TRACE)
    return path


def test_policies_are_compared_in_a_table_in_json_and_in_a_picture(trace: Path, tmp_path: Path) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    words = ["--trace", str(trace), "--policy", "fifo,fair_share", "--json", str(figures), "--png", str(picture)]
    shown = simulate(*words)
    assert "avg JCT h" in shown
    fifo, fair = json.loads(figures.read_text())["policies"]
    assert (fifo["policy"], fair["policy"], fifo["jobs"]) == ("fifo", "fair_share", 2)
    # 4 GPUs make 7,200 units in 1,800 s, after a restart of 30 s; the short job starts behind it
    assert fifo["makespan_h"] == pytest.approx((30 + 1800 + 30 + 60) / 3600, abs=0.05)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_synthetic_workload_needs_no_file() -> None:
    assert "goodput" in simulate("--format", "synthetic", "--jobs", "5", "--policy", "goodput", "--pools", "t4=2x4")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--trace", "{trace}", "--policy", "fife"], ConfigError, "did you mean 'fifo'"),
        (["--trace", "/no/such.jsonl"], NotFoundError, "no trace"),
        (["--trace", "{broken}"], DataError, "line 2"),
        (["--trace", "{trace}", "--pools", "a100:2"], ConfigError, "is not NAME=NODESxGPUS"),
        (["--format", "gavel", "--trace", "{trace}"], ConfigError, "needs the speeds"),
        (["--format", "gavel"], ConfigError, "reads a file"),
    ],
)
def test_bad_input_is_named(
    words: list[str], error: type[Exception], message: str, trace: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(TRACE.replace('"work": 7200', '"work": "much"'))
    given: dict[str, Any] = {"{trace}": str(trace), "{broken}": str(broken)}
    with pytest.raises(error) as caught:
        simulate(*[given.get(word, word) for word in words])
    assert message in str(caught.value)


@pytest.mark.parametrize("option", ["--json", "--png"])
def test_a_file_that_could_not_be_written_is_refused_before_the_simulation(
    trace: Path, tmp_path: Path, option: str
) -> None:
    for path in (tmp_path, tmp_path / "absent" / "file"):
        with pytest.raises(ConfigError, match=option):
            simulate("--trace", str(trace), option, str(path))


def test_speeds_that_are_no_object_are_refused(trace: Path, tmp_path: Path) -> None:
    tables = tmp_path / "tables.json"
    tables.write_text("[]")
    with pytest.raises(DataError, match="no object"):
        simulate("--format", "gavel", "--trace", str(trace), "--tables", str(tables))
