"""What a study's records say: the best trial, the front, tables, pictures, and the commands that print them."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from modelyard.config import parse
from modelyard.errors import ConfigError, IntegrityError, NotFoundError
from modelyard.tuning import tables, tune
from modelyard.tuning.config import Objective, StudyConfig, resolve
from modelyard.tuning.live import Live
from modelyard.tuning.recorder import Recorder
from modelyard.tuning.report import importance, pictures
from modelyard.tuning.space import known_space
from modelyard.tuning.study import Rung, StudyFolder, StudyRecord, Trial, TrialStatus, best, spent_steps

PERPLEXITY = Objective(metric="perplexity", mode="min")
SPACE = {
    "optimizer.learning_rate": {"low": 1e-4, "high": 0.1, "log": True},
    "optimizer.weight_decay": {"low": 0.0, "high": 0.5},
    "task.model.layers": [1, 2],
}


def trial(number: int, *values: float, status: TrialStatus = TrialStatus.DONE, **fields: Any) -> Trial:
    """A trial that measured `values` as perplexity, every 10 steps."""
    figures = fields.pop("figures", {})
    rungs = [
        Rung(step=10 * index, metrics={"perplexity": value, **figures}) for index, value in enumerate(values, start=1)
    ]
    plain = {"params": {"optimizer.learning_rate": 0.01}, **fields}
    return Trial(trial_id=f"t{number}", number=number, status=status, rungs=tuple(rungs), **plain)


@pytest.fixture
def config(token_config: Callable[..., Any]) -> StudyConfig:
    train = token_config(workers=1, validation={"every_steps": 4}).model_dump(mode="json", exclude_unset=True)
    return resolve(parse(StudyConfig, {"name": "counting", "train": train, "space": SPACE}))[0]


@pytest.fixture
def many() -> list[Trial]:
    """Thirty trials whose perplexity follows the learning rate and little else."""
    dice = random.Random(0)
    made = []
    for number in range(1, 31):
        rate = 10 ** dice.uniform(-4, -1)
        params = {
            "optimizer.learning_rate": rate,
            "optimizer.weight_decay": dice.uniform(0, 0.5),
            "task.model.layers": dice.choice([1, 2]),
        }
        value = 10 + 5 * abs(2.5 + math.log10(rate)) + dice.uniform(0, 0.1)
        status = TrialStatus.STOPPED if value > 15 else TrialStatus.DONE
        made.append(trial(number, 30.0, value, status=status, params=params))
    return made


def test_the_best_is_the_one_with_the_best_model() -> None:
    trials = [trial(1, 9.0, 7.0), trial(2, 6.0, 8.0), trial(3, 5.0, status=TrialStatus.STOPPED), trial(4)]
    assert [each.number for each in best(trials, [PERPLEXITY])] == [2]  # its best validation made its model
    assert [each.number for each in best(trials[2:3], [PERPLEXITY])] == [3]  # nothing finished
    assert best([trial(1)], [PERPLEXITY]) == []
    assert spent_steps(trials) == 50


def test_several_objectives_make_a_front() -> None:
    cost = Objective(metric="parameters", mode="min")
    sizes = [(1, 9.0, 100.0), (2, 7.0, 300.0), (3, 8.0, 300.0), (4, 5.0, 900.0), (5, 9.5, 100.0)]
    trials = [trial(number, value, figures={"parameters": size}) for number, value, size in sizes]
    assert [each.number for each in best(trials, [PERPLEXITY, cost])] == [4, 2, 1]


def test_a_trial_that_took_over_weights_is_judged_from_there_on() -> None:
    taken = trial(2, 3.0, 8.0, 7.0, parent="t1", parent_step=20)
    assert taken.value(PERPLEXITY) == 7.0


def test_records_come_back_as_they_were_written(config: StudyConfig) -> None:
    folder = StudyFolder("counting")
    with pytest.raises(NotFoundError, match="no study 'counting'"):
        folder.record()
    folder.write_record(StudyRecord(config=config, dataset=("datasets:/x/1", "sha256:0"), started_s=1.0))
    first, second = trial(1, 9.0), trial(2, status=TrialStatus.FAILED, reason="no room")
    folder.write_trial(second)
    folder.write_trial(first)
    assert folder.record().config == config
    assert folder.trials() == [first, second]
    with pytest.raises(NotFoundError, match="did you mean 'counting'"):
        StudyFolder("countng").record()
    folder.folder.write("trials/t2.json", b"{")
    with pytest.raises(IntegrityError, match=r"t2\.json is damaged"):
        folder.trials()


def test_a_table_marks_the_best_and_tells_failures() -> None:
    failed = trial(3, status=TrialStatus.FAILED, reason="no room", params={"optimizer.kind": "sgd"})
    trials = [trial(1, 9.0), trial(2, 7.25), failed]
    assert tables.columns(trials, [PERPLEXITY]) == [
        "trial", "status", "steps", "perplexity", "learning_rate", "optimizer.kind",
    ]  # fmt: skip
    assert tables.rows(trials, [PERPLEXITY]) == [
        ["1", "done", "10", "9", "0.01", "-"],
        ["2*", "done", "10", "7.25", "0.01", "-"],
        ["3", "failed", "0", "-", "-", "sgd"],
    ]
    assert tables.failures(trials) == ["trial 3: no room"]


def test_a_study_without_a_terminal_is_told_in_lines() -> None:
    told = io.StringIO()
    with Live("counting", 2, [PERPLEXITY], Console(file=told, soft_wrap=True)) as live:
        running = trial(1, status=TrialStatus.RUNNING)
        for each in (running, running, trial(1, 9.0), trial(1, 9.0), trial(2, status=TrialStatus.FAILED, reason="no")):
            live(each)
    assert told.getvalue().splitlines() == [
        "study counting: 2 trials",
        "trial 1 starts (learning_rate 0.01)",
        "trial 1 done at step 10: perplexity 9 (learning_rate 0.01)",
        "trial 2 failed: no (learning_rate 0.01)",
    ]


def test_a_study_of_that_name_with_other_settings_is_refused_with_what_differs(config: StudyConfig) -> None:
    StudyFolder("counting").write_record(StudyRecord(config=config, dataset=("datasets:/x/1", "sha256:0"), started_s=1))
    with pytest.raises(ConfigError, match=r"other settings: seed was 0, now 3; trials was 20, now 5\n"):
        tune(config.with_changes(seed=3, trials=5, parallel=2))


def test_what_mattered_is_found(config: StudyConfig, many: list[Trial]) -> None:
    pytest.importorskip("optuna")
    _, space = resolve(config)
    shares = importance(space.dimensions, many, PERPLEXITY)
    assert max(shares, key=lambda name: shares[name]) == "optimizer.learning_rate"
    assert shares["optimizer.learning_rate"] > 0.5
    assert importance(space.dimensions, many[:3], PERPLEXITY) == {}


def test_pictures_are_drawn(config: StudyConfig, many: list[Trial], tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    drawn = pictures("counting", config, many, tmp_path)
    for path in (drawn.parallel, drawn.importance, drawn.curves):
        assert path is not None
        assert path.read_bytes().startswith(b"\x89PNG")
    nothing = pictures("counting", config, [trial(1)], tmp_path)
    assert (nothing.parallel, nothing.importance, nothing.curves) == (None, None, None)


def test_a_trial_that_is_done_stays_as_it_is_when_it_is_told_again(config: StudyConfig) -> None:
    space = known_space(config.train, config.space)
    recorder = Recorder(StudyFolder("counting"), space)
    raw = {"optimizer.learning_rate": 0.01, "optimizer.weight_decay": 0.1, "task.model.layers": 1}
    result = {"run_id": "r", "step": 10, "figures": {"perplexity": 9.0}, "model_digest": "sha256:a"}

    def told() -> Trial:
        recorder.started("t1", raw)
        recorder.reported("t1", raw, result)
        recorder.ended("t1")
        return recorder.trials()[0]

    first = told()
    assert first.status is TrialStatus.DONE
    assert told() == first
    assert Recorder(StudyFolder("counting"), space).trials() == [first]
