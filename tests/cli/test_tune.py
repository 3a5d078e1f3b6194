"""`modelyard tune`: a file runs, words are commands, and records are shown without a cluster."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from modelyard.cli import main
from modelyard.config import parse
from modelyard.config_file import apply_override
from modelyard.tuning.config import StudyConfig, resolve
from modelyard.tuning.study import Outcome, Rung, StudyFolder, StudyRecord, Trial, TrialStatus

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str) -> tuple[int, str]:
    """Exit code, and what was printed."""
    result = CliRunner().invoke(main.modelyard, ["tune", *words])
    text = result.output + (str(result.exception) if result.exception else "")
    return result.exit_code, text


@pytest.fixture
def study(token_config: Callable[..., Any]) -> str:
    """The records of a finished study of two trials."""
    train = token_config(workers=1).model_dump(mode="json", exclude_unset=True)
    space = {"optimizer.learning_rate": [0.01, 0.02], "optimizer.betas": [[0.9, 0.99], [0.8, 0.9]]}
    config, _ = resolve(parse(StudyConfig, {"name": "counting", "train": train, "space": space}))
    folder = StudyFolder("counting")
    folder.write_record(StudyRecord(config=config, dataset=None, started_s=0.0))
    params = {"optimizer.learning_rate": 0.02, "optimizer.betas": [0.8, 0.9]}
    rung = Rung(step=12, metrics={"perplexity": 3.5})
    folder.write_trial(Trial(trial_id="a", number=1, params=params, status=TrialStatus.DONE, rungs=(rung,)))
    failed = Trial(trial_id="b", number=2, params=params, status=TrialStatus.FAILED, reason="the loss is nan")
    folder.write_trial(failed)
    folder.write_outcome(Outcome(best=("a",), model="models:/counter/1", ended_s=1.0, elapsed_s=1.0))
    return "counting"


def test_show_prints_trials_failures_and_the_model(study: str) -> None:
    code, text = run("show", study)
    assert code == 0
    assert "1*" in text
    assert "trial 2: the loss is nan" in text
    assert "study counting: 2 trials, 12 steps, over" in text
    assert "models:/counter/1" in text


def test_best_prints_overrides_that_train_takes(study: str) -> None:
    code, text = run("best", study)
    assert code == 0
    (line,) = [line for line in text.splitlines() if line.startswith("--")]
    fields: dict[str, Any] = {}
    for word in shlex.split(line):
        apply_override(fields, word)
    assert fields == {"optimizer": {"learning_rate": 0.02, "betas": [0.8, 0.9]}}


def test_plot_draws_where_it_is_told(study: str, tmp_path: Path) -> None:
    code, text = run("plot", study, "--out", str(tmp_path / "png"))
    assert code == 0
    assert (tmp_path / "png" / "parallel.png").is_file()
    assert "parallel.png" in text


def test_an_unknown_study_is_told_with_the_nearest(study: str) -> None:
    for command in ("show", "best", "plot", "resume"):
        code, text = run(command, "countin")
        assert code != 0
        assert "did you mean 'counting'" in text


@pytest.mark.parametrize("words", [["{file}"], ["--config", "{file}"]])
def test_a_file_is_run_with_or_without_its_option(words: list[str]) -> None:
    file = str(ROOT / "jobs" / "configs" / "tune_digits.yaml")
    code, text = run(*(word.format(file=file) for word in words), "--trials=3", "--print-config")
    assert code == 0
    assert "trials: 3" in text
    assert "name: digits-study" in text


def test_a_misspelt_command_is_no_file() -> None:
    code, text = run("shwo", "counting")
    assert code == 2
    assert "shwo" in text


@pytest.mark.parametrize("name", ["tune_digits", "tune_tiny_gpt"])
def test_the_shipped_studies_are_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelyard.config import load

    monkeypatch.chdir(ROOT)
    config, space = resolve(load(StudyConfig, f"jobs/configs/{name}.yaml"))
    assert config.scheduler.kind == "asha"
    assert len(space.dimensions) >= 5
