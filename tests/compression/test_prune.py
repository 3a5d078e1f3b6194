"""Single weights to zero: how many, which, and that better criteria lose less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.compression.conftest import Folders
from tests.compression.workspaces import quality, workspace

from modelyard.compression.prune import keep_mask, prune, sparsity_after
from modelyard.compression.recipe import Prune
from modelyard.compression.workspace import prunable
from modelyard.errors import ConfigError
from modelyard.tasks import load_model


@pytest.mark.parametrize("criterion", ["l1", "wanda"])
def test_the_asked_share_of_every_layer_is_zero(language: Folders, tmp_path: Path, criterion: str) -> None:
    result = prune(workspace(language, tmp_path / "s"), Prune.model_validate({"criterion": criterion})).folder
    layers = prunable(load_model(result)[1])
    assert len(layers) == 14
    for module in layers.values():
        assert float((module.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_two_of_each_four_neighbours_are_zero(language: Folders, tmp_path: Path) -> None:
    result = prune(workspace(language, tmp_path / "s"), Prune(pattern="2:4", criterion="wanda")).folder
    for module in prunable(load_model(result)[1]).values():
        assert ((module.weight.reshape(-1, 4) == 0).sum(dim=1) >= 2).all()


def test_wanda_sees_the_size_of_inputs_where_magnitude_does_not(language: Folders, tmp_path: Path) -> None:
    task, model = load_model(language.model)
    with torch.no_grad():  # the same function: half of the norm's outputs larger, the weights behind them smaller
        for layer in range(2):
            model.get_submodule(f"model.layers.{layer}.post_attention_layernorm").weight[::2] *= 50
            for name in ("gate_proj", "up_proj"):
                model.get_submodule(f"model.layers.{layer}.mlp.{name}").weight[:, ::2] /= 50
    task.save(model, tmp_path / "scaled", language.dataset)
    scaled = Folders(tmp_path / "scaled", language.dataset)
    rises = {}
    for criterion in ("l1", "wanda"):
        step = Prune.model_validate({"criterion": criterion, "sparsity": 0.5})
        results = [
            prune(workspace(folders, tmp_path / f"{criterion}{number}"), step).folder
            for number, folders in enumerate((language, scaled))
        ]
        plain, rescaled = (quality(folder, language.dataset)["loss"] for folder in results)
        rises[criterion] = rescaled - plain
    assert abs(rises["wanda"]) < 1e-3
    assert rises["l1"] > 0.1


def test_the_least_worth_goes() -> None:
    worth = torch.tensor([[4.0, 1.0, 3.0, 2.0], [8.0, 7.0, 6.0, 5.0]])
    assert keep_mask(worth, 0.5).tolist() == [[False] * 4, [True] * 4]
    assert keep_mask(worth, 0.5, per_row=True).tolist() == [[True, False, True, False], [True, True, False, False]]
    assert keep_mask(worth, 0.5, "2:4").sum(dim=1).tolist() == [2, 2]


def test_rows_that_are_no_multiple_of_four_are_refused() -> None:
    with pytest.raises(ConfigError, match="a row of 9 weights is no multiple of 4"):
        keep_mask(torch.ones(2, 9), 0.5, "2:4")


def test_rounds_end_at_the_sparsity_and_remove_most_early() -> None:
    shares = [sparsity_after(number, 4, 0.8) for number in range(1, 5)]
    assert shares[-1] == pytest.approx(0.8)
    steps = [b - a for a, b in zip([0.0, *shares], shares, strict=False)]
    assert steps == sorted(steps, reverse=True)
