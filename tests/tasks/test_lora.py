"""LoRA: adapters alone learn, and merging them changes no answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelyard.data.dataset import Dataset
from modelyard.errors import ConfigError, MissingExtraError
from modelyard.tasks import CausalLM, load_model
from modelyard.tasks.language_models import LlamaModel
from modelyard.tasks.lora import Lora


def task(**fields: Any) -> CausalLM:
    model = LlamaModel(layers=2, hidden_size=32, heads=4, tied_embeddings=fields.pop("tied", True))
    return CausalLM(model=model, lora=Lora(rank=2, alpha=6.0, **fields))


def trained(chosen: CausalLM, folder: Path) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A wrapped model after a few steps, and a batch."""
    data = Dataset.open(folder)
    torch.manual_seed(0)
    model = chosen.build(data.info, folder)
    batch = chosen.collate(data.split("test").read(np.arange(4)), "cpu")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        chosen.loss(model, batch).mean().backward()
        optimizer.step()
    return model.eval(), batch


def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(**batch, use_cache=False).logits


def test_only_adapters_learn(tokens_folder: Path) -> None:
    chosen = task()
    torch.manual_seed(0)
    before = {k: v.clone() for k, v in chosen.build(Dataset.open(tokens_folder).info, None).state_dict().items()}
    model, _ = trained(chosen, tokens_folder)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(".lora_" in name for name in changed)
    assert all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("merge", [True, False])
def test_the_saved_model_answers_as_the_trained_one(
    tied: bool, gathered: bool, merge: bool, tokens_folder: Path, tmp_path: Path
) -> None:
    chosen = task(tied=tied, merge_at_end=merge)
    model, batch = trained(chosen, tokens_folder)
    expected = logits(model, batch)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()} if gathered else None
    chosen.save(model, tmp_path / "model", tokens_folder, state)
    loaded = load_model(tmp_path / "model")[1]
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model, batch), expected), "saving leaves the live model as it was"
    assert (tmp_path / "model" / "adapter").is_dir() is not merge
    assert any(".lora_" in name for name in loaded.state_dict()) is not merge


def test_a_merged_model_differs_from_its_base(tokens_folder: Path, tmp_path: Path) -> None:
    chosen = task()
    model, batch = trained(chosen, tokens_folder)
    with model.disable_adapter():  # type: ignore[operator]
        base = logits(model, batch)
    chosen.save(model, tmp_path / "model", tokens_folder)
    assert (logits(load_model(tmp_path / "model")[1], batch) - base).abs().max() > 1e-3


def test_frozen_weights_cost_a_third_less(tokens_folder: Path) -> None:
    info = Dataset.open(tokens_folder).info
    full = CausalLM(model=task().model)
    whole, adapted = full.flops_per_row(full.build(info, None)), task().flops_per_row(task().build(info, None))
    assert 0.6 < adapted / whole < 0.9


def test_activation_checkpointing_still_trains_adapters(tokens_folder: Path) -> None:
    chosen, data = task(), Dataset.open(tokens_folder)
    model = chosen.build(data.info, None)
    chosen.enable_activation_checkpointing(model)
    model.train()
    chosen.loss(model, chosen.collate(data.split("test").read(np.arange(2)), "cpu")).mean().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None for grad in grads)
    assert sum(float(grad.abs().sum()) for grad in grads if grad is not None) > 0


def test_an_unknown_target_module_is_refused_with_the_known_ones(tokens_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no linear layer 'q_prj'.*\n.*q_proj"):
        task(target_modules=("q_prj",)).build(Dataset.open(tokens_folder).info, None)


def test_chosen_targets_alone_are_adapted(tokens_folder: Path) -> None:
    model = task(target_modules=("q_proj", "v_proj")).build(Dataset.open(tokens_folder).info, None)
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == {"q_proj", "v_proj"}


def test_without_peft_the_extra_is_named(tokens_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"modelyard\[lora\]"):
        task().build(Dataset.open(tokens_folder).info, None)
