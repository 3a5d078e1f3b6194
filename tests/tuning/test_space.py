"""A space is checked against the training config's own types, and decodes to what its fields take."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelyard.config import load, parse
from modelyard.errors import ConfigError
from modelyard.training import TrainConfig
from modelyard.tuning.config import StudyConfig, resolve
from modelyard.tuning.space import Space, lay

RATE = {"low": 1e-4, "high": 0.1, "log": True}


@pytest.fixture
def study(token_config: Callable[..., TrainConfig]) -> Callable[..., Any]:
    """Resolves a study over the token dataset with the given space and settings."""

    def build(space: dict[str, Any], **settings: Any) -> tuple[StudyConfig, Space]:
        train = token_config(workers=1, validation={"every_steps": 4}).model_dump(mode="json", exclude_unset=True)
        return resolve(parse(StudyConfig, {"name": "s", "train": train, "space": space, **settings}))

    return build


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({"optimizer.learning_rat": RATE}, r"space\.optimizer\.learning_rat: unknown.*mean 'learning_rate'"),
        ({"optimiser.learning_rate": RATE}, r"space\.optimiser: unknown key; did you mean 'optimizer'"),
        ({"optimizer.learning_rate": ["fast"]}, r"space\.optimizer\.learning_rate: .*valid number.*'fast'"),
        ({"optimizer.learning_rate": [-1.0]}, r"space\.optimizer\.learning_rate: .*greater than 0.*-1"),
        ({"task.model.layers": {"low": 0.5, "high": 3}}, r"space\.task\.model\.layers: .*integer.*0\.5"),
        ({"training.zero_stage": {"low": 0, "high": 4}}, r"space\.training\.zero_stage: .*less than or equal to 3.*4"),
        ({"task.model.layers": []}, r"space\.task\.model\.layers\.values: an empty choice"),
        ({"task.model.layers": {"low": 4, "high": 2}}, r"space\.task\.model\.layers: low=4 must be below high=2"),
        ({"task.model.layers": {"low": 0, "high": 2, "log": True}}, r"log needs low above 0"),
        ({"task.model.layers": {"low": 1, "hihg": 2}}, r"unknown key; did you mean 'high'"),
        ({"run": ["a", "b"]}, r"space\.run: the study names its runs itself"),
        ({"workers": [1, 2], "workers.cpus": [1, 2]}, r"workers\.cpus lies inside workers"),
        ({"optimizer.learning_rate": {**RATE, "when": {"optimizer.kin": "sgd"}}}, r"when: 'optimizer\.kin' is neither"),
        ({}, r"space: names no parameter"),
    ],
)
def test_what_no_training_config_can_have_is_refused_by_its_field(
    study: Callable[..., Any], space: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        study(space)


def test_values_that_never_go_together_are_refused(study: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="warmup_steps=15 must be below"):
        study({"schedule.warmup_steps": [15]})
    with pytest.raises(ConfigError, match=r"space\.optimizer\.kind='muon': optimizer muon needs training\.zero_stage"):
        study({"optimizer.kind": ["adamw", "muon"], "training.zero_stage": [0], "training.gradient_clipping": [0]})


def test_a_value_that_goes_only_with_some_of_the_others_is_fine(study: Callable[..., Any]) -> None:
    study({"optimizer.kind": ["adamw", "muon"], "training.zero_stage": [0, 1], "training.gradient_clipping": [0]})
    study({"workers.min": [1, 2], "workers.max": [2, 4]})


def test_a_range_gives_what_its_field_takes(study: Callable[..., Any]) -> None:
    _, space = study(
        {
            "optimizer.weight_decay": {"low": 0, "high": 1},
            "task.model.layers": {"low": 1, "high": 4},
            "schedule.final_share": {"low": 0.0, "high": 0.3, "step": 0.1},
            "optimizer.learning_rate": RATE,
        }
    )
    drawn = [space.draw(random.Random(seed)) for seed in range(200)]
    assert {type(each["optimizer.weight_decay"]) for each in drawn} == {float}
    assert {each["task.model.layers"] for each in drawn} == {1, 2, 3, 4}
    assert {each["schedule.final_share"] for each in drawn} == {0.0, 0.1, 0.2, 0.3}
    below = sum(each["optimizer.learning_rate"] < 0.001 for each in drawn)
    assert 40 < below < 95  # a third of three decades


def test_a_choice_may_be_whole_sections_and_none(study: Callable[..., Any]) -> None:
    sections = [{"kind": "sgd", "learning_rate": 0.1}, {"kind": "adamw", "betas": [0.8, 0.9]}]
    _, space = study({"optimizer": sections, "checkpoint.every_s": [None, 5.0]})
    raw = {"optimizer": space.dimensions[0].labels[1], "checkpoint.every_s": None}
    config = space.config(space.decode(raw))
    assert config.optimizer.kind == "adamw"
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.checkpoint.every_s is None


def test_a_condition_leaves_a_parameter_out_where_it_does_not_hold(study: Callable[..., Any]) -> None:
    _, space = study(
        {
            "optimizer.kind": ["adamw", "sgd"],
            "optimizer.momentum": {"low": 0.5, "high": 0.9, "when": {"optimizer.kind": "sgd"}},
        }
    )
    assert space.decode({"optimizer.kind": "adamw", "optimizer.momentum": 0.7}) == {"optimizer.kind": "adamw"}
    config = space.config(space.decode({"optimizer.kind": "sgd", "optimizer.momentum": 0.7}))
    assert config.optimizer.kind == "sgd"
    assert config.optimizer.momentum == 0.7


def test_trials_may_differ_in_workers_and_pool(study: Callable[..., Any]) -> None:
    _, space = study({"workers": [1, 2], "lease.pools": [["a100"], ["l4"]]})
    config = space.config(space.decode({"workers": 2, "lease.pools": space.dimensions[1].labels[1]}))
    assert (config.workers.min, config.workers.max) == (2, 2)
    assert config.lease is not None
    assert config.lease.pools == ("l4",)


def test_a_grid_has_every_combination_and_needs_steps(study: Callable[..., Any]) -> None:
    grid = {"search": {"kind": "grid"}}
    _, space = study({"task.model.layers": [1, 2], "schedule.warmup_steps": {"low": 0, "high": 4, "step": 2}}, **grid)
    combinations = [tuple(space.decode(raw).values()) for raw in space.grid()]
    assert combinations == [(1, 0), (1, 2), (1, 4), (2, 0), (2, 2), (2, 4)]
    with pytest.raises(ConfigError, match=r"space\.optimizer\.learning_rate: a grid needs"):
        study({"optimizer.learning_rate": RATE}, **grid)


def test_a_field_is_laid_into_a_section_written_in_short() -> None:
    assert lay({"workers": 2, "a": {"b": 1}}, {"workers.cpus": 4, "a.c": 2}) == {
        "workers": {"min": 2, "max": 2, "cpus": 4},
        "a": {"b": 1, "c": 2},
    }


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"scheduler": {"kind": "pbt"}}, r"set search\.kind=random"),
        ({"scheduler": {"kind": "pbt"}, "search": {"kind": "random"}, "trials": 1}, "needs a population"),
        ({"scheduler": {"kind": "asha", "grace": 3}}, "did you mean 'grace_steps'"),
        ({"search": {"kind": "tpee"}}, "search.kind"),
        (
            {"scheduler": {"kind": "asha"}, "objectives": [{"metric": m, "mode": "min"} for m in ("loss", "cost")]},
            "compares trials by one objective",
        ),
        (
            {"objectives": [{"metric": "perplexty", "mode": "min"}]},
            r"objectives\.0\.metric: task causal_lm has no 'perplexty'; did you mean 'perplexity'",
        ),
    ],
)
def test_parts_of_a_study_that_do_not_fit_are_refused(
    study: Callable[..., Any], settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        study({"optimizer.learning_rate": RATE}, **settings)


def test_pbt_refuses_to_move_what_cannot_change_in_a_run(study: Callable[..., Any]) -> None:
    pbt = {"scheduler": {"kind": "pbt"}, "search": {"kind": "random"}}
    with pytest.raises(ConfigError, match=r"space\.task\.model\.layers: pbt changes values in the middle"):
        study({"task.model.layers": [1, 2]}, **pbt)
    study({"optimizer.learning_rate": RATE, "schedule.final_share": [0.0, 0.1]}, **pbt)


def test_a_scheduler_needs_validations(study: Callable[..., Any]) -> None:
    config, _ = study({"optimizer.learning_rate": RATE}, scheduler={"kind": "asha"})
    blind = config.with_changes(train={**config.train, "validation": {"every_steps": 0}})
    with pytest.raises(ConfigError, match=r"set train\.validation\.every_steps"):
        resolve(blind)


def test_the_objective_is_the_tasks_own_unless_given(study: Callable[..., Any]) -> None:
    config, _ = study({"optimizer.learning_rate": RATE})
    assert [(each.metric, each.mode) for each in config.objectives] == [("perplexity", "min")]


def test_a_search_or_a_scheduler_may_be_a_word(study: Callable[..., Any]) -> None:
    made, _ = study({"optimizer.learning_rate": [0.1]}, search="random", scheduler="none")
    assert (made.search.kind, made.scheduler.kind) == ("random", "none")


def test_a_parameter_may_come_from_the_command_line(study: Callable[..., Any], tmp_path: Path) -> None:
    config, _ = study({"optimizer.learning_rate": [0.1], "seed": [1, 2]})
    file = tmp_path / "study.yaml"
    file.write_text(config.to_yaml())
    overrides = ["--space.optimizer.learning_rate={low: 0.01, high: 0.2}", "--space.task.model.layers=[1, 2]"]
    _, made = resolve(load(StudyConfig, file, overrides))
    ranges = {each.name: (each.low, each.high) for each in made.dimensions}
    assert ranges["optimizer.learning_rate"] == (0.01, 0.2)
    assert sorted(ranges) == ["optimizer.learning_rate", "seed", "task.model.layers"]
