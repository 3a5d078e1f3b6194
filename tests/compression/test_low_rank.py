"""Factorized layers and merged adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.compression.conftest import Folders
from tests.compression.workspaces import parameters, quality, workspace

from modelyard.compression.low_rank import factorize, low_rank, merge_lora
from modelyard.compression.quantize import quantize
from modelyard.compression.recipe import Factorize, MergeLora, Quantize
from modelyard.errors import ConfigError
from modelyard.serving.export import why_not_gguf
from modelyard.tasks import CausalLM, load_model, read_task
from modelyard.tasks.language_models import PretrainedModel, read_config
from modelyard.tasks.lora import Lora


def test_factors_of_full_rank_are_the_weight() -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    first, second = low_rank(weight, 4, torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    assert torch.allclose(second @ first, weight, atol=1e-5)


def test_with_moments_no_other_map_of_that_rank_has_nearer_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, mixing = torch.randn(32, 16, generator=generator), torch.randn(16, 16, generator=generator)
    x = torch.randn(500, 16, generator=generator) * torch.logspace(-2, 2, 16) @ mixing
    plain, scaled = (low_rank(weight, 4, moments) for moments in (None, x.T @ x))
    errors = [float((x @ (second @ first - weight).T).square().mean()) for first, second in (plain, scaled)]
    least = torch.linalg.svdvals(x @ weight.T)[4:].square().sum() / (500 * 32)  # Eckart and Young
    assert errors[1] == pytest.approx(float(least), rel=1e-3)
    assert errors[0] > 2 * errors[1]


def test_a_factorized_model_is_smaller_loads_and_answers(language: Folders, tmp_path: Path) -> None:
    result = factorize(workspace(language, tmp_path / "s"), Factorize(size=0.8)).folder
    assert parameters(result) < 0.9 * parameters(language.model)
    before, after = (quality(folder, language.dataset)["perplexity"] for folder in (language.model, result))
    assert after < 2 * before
    task, model = load_model(result)
    assert len(task.predict(model, ["The for statement"], max_new_tokens=4)[0]) > 0
    assert why_not_gguf(read_config(result)) == "its layers are factorized"


def test_a_model_without_an_adapter_has_nothing_to_merge(language: Folders, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter"):
        merge_lora(workspace(language, tmp_path / "s"), MergeLora())


def test_a_merged_adapter_answers_as_it_did_beside_its_base(language: Folders, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    task = CausalLM(model=PretrainedModel(pretrained=str(language.model)), lora=Lora(rank=4, merge_at_end=False))
    info = read_task(language.model)[1]
    model = task.build(info, None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    task.save(model, tmp_path / "adapted", language.dataset)
    adapted = Folders(tmp_path / "adapted", language.dataset)
    result = merge_lora(workspace(adapted, tmp_path / "s"), MergeLora()).folder
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        a, b = (load_model(folder)[1](input_ids=ids).logits for folder in (adapted.model, result))
        plain = load_model(language.model)[1](input_ids=ids).logits
    assert torch.allclose(a, b, atol=1e-4)
    assert not torch.allclose(plain, b, atol=1e-2)
    with pytest.raises(ConfigError, match="LoRA adapter"):
        quantize(workspace(adapted, tmp_path / "t"), Quantize())
