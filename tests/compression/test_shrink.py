"""Structured pruning: smaller tensors that load by plain means, the least worth gone first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.compression.conftest import Folders
from tests.compression.workspaces import parameters, quality, workspace
from transformers import AutoModelForCausalLM

from modelyard.compression.recipe import Shrink
from modelyard.compression.shrink import shrink
from modelyard.errors import ConfigError
from modelyard.tasks import ImageClassification, load_model, read_task


def test_half_of_the_feed_forward_parameters_are_gone_and_transformers_loads_the_rest(
    language: Folders, tmp_path: Path
) -> None:
    result = shrink(workspace(language, tmp_path / "s"), Shrink(mlp=0.5)).folder
    plain = AutoModelForCausalLM.from_pretrained(result, local_files_only=True)
    whole = load_model(language.model)[1]
    counts = [sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name) for model in (whole, plain)]
    assert counts[1] * 2 == counts[0]
    assert plain.config.intermediate_size == 96


def test_heads_go_in_key_value_groups(language: Folders, tmp_path: Path) -> None:
    result = shrink(workspace(language, tmp_path / "s"), Shrink(heads=0.5)).folder
    config = json.loads((result / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 16)
    model = load_model(result)[1]
    assert model.get_submodule("model.layers.0.self_attn.q_proj").weight.shape == (32, 64)
    assert quality(result, language.dataset)["perplexity"] < 512


def test_the_layer_that_changes_least_is_removed(language: Folders, tmp_path: Path) -> None:
    idle = tmp_path / "idle"
    task, model = load_model(language.model)
    with torch.no_grad():  # layer 0 passes everything on unchanged
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_submodule(f"model.layers.0.{name}").weight.zero_()
    task.save(model, idle, language.dataset)
    result = shrink(workspace(Folders(idle, language.dataset), tmp_path / "s"), Shrink(layers=1)).folder
    assert json.loads((result / "config.json").read_text())["num_hidden_layers"] == 1
    assert quality(result, language.dataset)["loss"] == pytest.approx(quality(idle, language.dataset)["loss"], abs=1e-4)


def test_channels_that_do_nothing_go_first(language: Folders, tmp_path: Path) -> None:
    lazy = tmp_path / "lazy"
    task, model = load_model(language.model)
    with torch.no_grad():
        for layer in range(2):
            model.get_submodule(f"model.layers.{layer}.mlp.down_proj").weight[:, 1::2] = 0
    task.save(model, lazy, language.dataset)
    for criterion in ("l1", "l2", "activation"):
        step = Shrink(mlp=0.5, criterion=criterion)  # type: ignore[arg-type]
        result = shrink(workspace(Folders(lazy, language.dataset), tmp_path / criterion), step).folder
        assert quality(result, language.dataset)["loss"] == pytest.approx(
            quality(lazy, language.dataset)["loss"], abs=1e-4
        )


def test_a_classifier_loses_channels_and_its_task_says_so(digits: Folders, tmp_path: Path) -> None:
    result = shrink(workspace(digits, tmp_path / "s"), Shrink(mlp=0.5)).folder
    task, _ = read_task(result)
    assert isinstance(task, ImageClassification)
    assert (task.channels, task.hidden) == ((16, 32), 64)
    assert parameters(digits.model) > 3.5 * parameters(result)
    assert quality(result, digits.dataset)["accuracy"] > 0.3  # without any training


def test_what_a_classifier_does_not_have_is_refused(digits: Folders, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither heads nor layers"):
        shrink(workspace(digits, tmp_path / "s"), Shrink(layers=1))


def test_all_layers_cannot_be_removed(language: Folders, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"layers=2, the model has 2"):
        shrink(workspace(language, tmp_path / "s"), Shrink(layers=2))
