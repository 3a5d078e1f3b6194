"""Causal language models: what is built, what it costs, what is refused, what is saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelyard.config import Config, parse
from modelyard.data.dataset import Dataset, DatasetInfo
from modelyard.errors import ConfigError, DataError, IntegrityError, NotFoundError, UnsafeFileError
from modelyard.tasks import CausalLM, TaskConfig, load_model

SMALL = {"layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2}


class Job(Config):
    """A config with a task in it, as training has."""

    task: TaskConfig


def task(**fields: Any) -> CausalLM:
    built = parse(Job, {"task": {"kind": "causal_lm", "model": SMALL} | fields}).task
    assert isinstance(built, CausalLM)
    return built


def info_of(folder: Path) -> DatasetInfo:
    return Dataset.open(folder).info


def build(chosen: CausalLM, folder: Path, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return chosen.build(info_of(folder), folder)


def batch_of(chosen: CausalLM, folder: Path, rows: int = 3) -> dict[str, torch.Tensor]:
    return chosen.collate(Dataset.open(folder).split("test").read(np.arange(rows)), "cpu")


def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(**batch, use_cache=False).logits


def test_the_same_seed_builds_the_same_weights(tokens_folder: Path) -> None:
    one, same, other = (build(task(), tokens_folder, seed) for seed in (1, 1, 2))
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_loss_is_each_rows_mean_over_its_shifted_targets(tokens_folder: Path) -> None:
    chosen = task()
    model, batch = build(chosen, tokens_folder), batch_of(chosen, tokens_folder)
    scores = logits(model, batch).double().log_softmax(-1)
    tokens = batch["input_ids"]
    by_hand = [-sum(scores[row, place, tokens[row, place + 1]] for place in range(11)) / 11 for row in range(3)]
    loss = chosen.loss(model, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), torch.stack(by_hand), rtol=1e-6, atol=1e-6)


def test_gradients_equal_those_of_transformers_own_loss(tokens_folder: Path) -> None:
    chosen = task()
    ours, theirs = build(chosen, tokens_folder), build(chosen, tokens_folder)
    batch = batch_of(chosen, tokens_folder)
    chosen.loss(ours, batch).mean().backward()
    theirs(**batch, labels=batch["input_ids"]).loss.backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_statistics_do_not_depend_on_the_batch_a_row_is_in(tokens_folder: Path) -> None:
    chosen = task()
    model = build(chosen, tokens_folder).eval()
    batch = batch_of(chosen, tokens_folder, 4)
    with torch.inference_mode():
        whole = chosen.statistics(model, batch)
        single = [chosen.statistics(model, {"input_ids": batch["input_ids"][i : i + 1]}) for i in range(4)]
    torch.testing.assert_close(whole["nll"], torch.cat([part["nll"] for part in single]))
    assert whole["tokens"].tolist() == [11] * 4
    assert {name: (value.shape, value.dtype) for name, value in whole.items()} == {
        "nll": ((4,), torch.float32),
        "tokens": ((4,), torch.int64),
    }


def test_metrics_of_a_uniform_model_are_its_vocabulary() -> None:
    stats = {"nll": np.full(3, 10 * math.log(64), np.float32), "tokens": np.full(3, 10)}
    found = task().metrics(stats | {"bytes": np.full(3, 20)})
    assert found == pytest.approx({"loss": math.log(64), "perplexity": 64.0, "bits_per_byte": 3.0}, rel=1e-6)


def test_perplexity_of_a_diverged_model_is_a_number() -> None:
    assert math.isfinite(task().metrics({"nll": np.array([1e9]), "tokens": np.array([1])})["perplexity"])


def test_flops_follow_palm_appendix_b(tokens_folder: Path) -> None:
    untied = task(model=SMALL | {"tied_embeddings": False})
    model = build(untied, tokens_folder)
    embedding = model.get_input_embeddings().weight.numel()
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    matrices = sum(p.numel() for p in model.parameters()) - embedding - norms
    expected = 6 * matrices * 12 + 12 * 2 * 32 * 12**2 / 2
    assert untied.flops_per_row(model) == expected
    # tied: the one matrix is the output matrix too, so the count is the same
    assert task().flops_per_row(build(task(), tokens_folder)) == expected


def test_vocabulary_is_rounded_up_and_defaults_are_derived(tokens_folder: Path) -> None:
    info = info_of(tokens_folder)
    assert info.vocab_size == 300
    model = build(task(model=SMALL | {"vocab_multiple": 128}), tokens_folder)
    config: Any = model.config
    assert (config.vocab_size, config.intermediate_size, config.max_position_embeddings) == (384, 128, 12)
    assert config._attn_implementation == "sdpa"


def test_activation_checkpointing_changes_no_gradient(tokens_folder: Path) -> None:
    chosen = task()
    plain, saving = build(chosen, tokens_folder).train(), build(chosen, tokens_folder).train()
    chosen.enable_activation_checkpointing(saving)
    batch = batch_of(chosen, tokens_folder)
    recomputed = 0

    def count(*_: Any) -> None:
        nonlocal recomputed
        recomputed += 1

    saving.model.layers[0].mlp.register_forward_pre_hook(count)  # type: ignore[union-attr,index]
    for model in (plain, saving):
        chosen.loss(model, batch).mean().backward()
    assert recomputed == 2
    for mine, other in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_answers_with_identical_logits(tied: bool, tokens_folder: Path, tmp_path: Path) -> None:
    chosen = task(model=SMALL | {"tied_embeddings": tied})
    model, batch = build(chosen, tokens_folder), batch_of(chosen, tokens_folder)
    before = logits(model, batch)
    chosen.save(model, tmp_path / "model", tokens_folder)
    loaded_task, loaded = load_model(tmp_path / "model")
    assert loaded_task == chosen
    assert torch.equal(logits(loaded, batch), before)
    assert torch.equal(logits(model, batch), before)
    assert loaded_task.flops_per_row(loaded) == chosen.flops_per_row(model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("drop_alias", [True, False])
def test_gathered_weights_without_shared_memory_are_saved_once(
    tied: bool, drop_alias: bool, tokens_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    chosen = task(model=SMALL | {"tied_embeddings": tied})
    model, batch = build(chosen, tokens_folder), batch_of(chosen, tokens_folder)
    expected = logits(model, batch)
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if tied and drop_alias:
        del gathered["lm_head.weight"]
    for parameter in model.parameters():  # as ZeRO-3 leaves them
        parameter.data = torch.empty(0)
    chosen.save(model, tmp_path / "model", tokens_folder, gathered)
    assert "lm_head.weight" in gathered or (tied and drop_alias), "the caller's dict is not changed"
    assert torch.equal(logits(load_model(tmp_path / "model")[1], batch), expected)
    assert ("lm_head.weight" in load_file(tmp_path / "model" / "model.safetensors")) is not tied


def test_a_saved_folder_holds_no_pickle_and_plain_transformers_reads_it(tokens_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chosen = task()
    model, batch = build(chosen, tokens_folder), batch_of(chosen, tokens_folder)
    chosen.save(model, tmp_path / "model", tokens_folder)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "task.json", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(theirs, batch), logits(model, batch))
    text = "the quick fox"
    own = AutoTokenizer.from_pretrained(str(tokens_folder / "tokenizer"))(text).input_ids
    assert AutoTokenizer.from_pretrained(str(tmp_path / "model"))(text).input_ids == own


def test_training_goes_on_from_a_saved_folder(tokens_folder: Path, tmp_path: Path) -> None:
    chosen = task()
    model, batch = build(chosen, tokens_folder), batch_of(chosen, tokens_folder)
    chosen.save(model, tmp_path / "model", tokens_folder)
    further = task(model={"pretrained": str(tmp_path / "model")})
    assert torch.equal(logits(build(further, tokens_folder, seed=9), batch), logits(model, batch))


def test_a_task_survives_yaml(tmp_path: Path) -> None:
    job = Job(task=task(lora={"rank": 4}))
    assert parse(Job, __import__("yaml").safe_load(job.to_yaml())) == job


# What is refused.


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_with_both_sizes(tokens_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"300 tokens.*only 200"):
        task(model=SMALL | {"vocab_size": 200}).check(info_of(tokens_folder))


def test_a_pretrained_model_with_too_small_a_vocabulary_is_refused(
    tokens_folder: Path, tokens_of: Callable[..., Path], tmp_path: Path
) -> None:
    chosen = task()
    chosen.save(build(chosen, tokens_folder), tmp_path / "model", tokens_folder)
    larger = tokens_of("larger", vocab_size=320)
    with pytest.raises(ConfigError, match=r"320 tokens.*only 300"):
        task(model={"pretrained": str(tmp_path / "model")}).check(info_of(larger))


def test_a_pretrained_model_with_another_tokenizer_is_refused(
    tokens_folder: Path, tokens_of: Callable[..., Path], tmp_path: Path
) -> None:
    chosen = task()
    chosen.save(build(chosen, tokens_folder), tmp_path / "model", tokens_folder)
    other = tokens_of("other", vocab_size=290, text="zebras zigzag, jazz quizzes puzzle zealous wizards " * 30)
    with pytest.raises(ConfigError, match="tokens mean something else"):
        build(task(model={"pretrained": str(tmp_path / "model")}), other)


def test_blocks_longer_than_the_positions_are_refused(tokens_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"12 tokens.*sees 8 at most"):
        task(model=SMALL | {"max_positions": 8}).check(info_of(tokens_folder))


def test_a_dataset_of_images_is_refused(images_folder: Path) -> None:
    with pytest.raises(DataError, match="needs a dataset of tokens, this one holds images"):
        task().check(info_of(images_folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 30}, "no multiple of 2 \\* heads"),
        ({"kv_heads": 3}, "kv_heads=3 does not divide heads=4"),
        ({"layers": 0}, "greater than 0"),
        ({"layer": 2}, "unknown key"),
        ({"dropout": 1.0}, "less than 1"),
    ],
)
def test_impossible_models_are_refused_when_the_config_is_read(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task(model=SMALL | change)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_a_folder_of_pickled_weights_is_refused_unread(name: str, tokens_folder: Path, tmp_path: Path) -> None:
    chosen = task()
    folder = tmp_path / "model"
    chosen.save(build(chosen, tokens_folder), folder, tokens_folder)
    (folder / "model.safetensors").unlink()
    bomb = folder / name
    # a pickle that would make a file when it is read
    bomb.write_bytes(b"cposix\nsystem\n(S'touch " + str(tmp_path / "pwned").encode() + b"'\ntR.")
    with pytest.raises(UnsafeFileError, match="as a pickle") as refusal:
        task(model={"pretrained": str(folder)}).check(info_of(tokens_folder))
    assert "save_pretrained" in refusal.value.todo
    with pytest.raises(UnsafeFileError):
        load_model(folder)
    assert not (tmp_path / "pwned").exists()


def test_missing_folders_and_weights_are_named(tokens_folder: Path, tmp_path: Path) -> None:
    info = info_of(tokens_folder)
    with pytest.raises(NotFoundError, match="nowhere"):
        task(model={"pretrained": str(tmp_path / "nowhere")}).check(info)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match=r"holds no \*\.safetensors"):
        task(model={"pretrained": str(tmp_path / "empty")}).check(info)
    with pytest.raises(NotFoundError, match=r"has no task\.json"):
        load_model(tmp_path / "empty")


@pytest.mark.parametrize("damage", ["truncated", "missing weight", "not json", "wrong task"])
def test_damaged_folders_are_refused(damage: str, tokens_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    chosen, folder = task(), tmp_path / "model"
    chosen.save(build(chosen, tokens_folder), folder, tokens_folder)
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing weight":
        fewer = load_file(weights)
        del fewer["model.layers.0.mlp.up_proj.weight"]
        save_file(fewer, weights, metadata={"format": "pt"})
    elif damage == "not json":
        (folder / "task.json").write_text("{")
    else:
        record = json.loads((folder / "task.json").read_text())
        record["task"]["kind"] = "telepathy"
        (folder / "task.json").write_text(json.dumps(record))
    with pytest.raises(IntegrityError):
        load_model(folder)


def test_code_that_a_folder_brings_along_is_never_run(tokens_folder: Path, tmp_path: Path) -> None:
    chosen, folder = task(), tmp_path / "model"
    chosen.save(build(chosen, tokens_folder), folder, tokens_folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Conf"}, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    with pytest.raises(IntegrityError):
        load_model(folder)
    assert not (tmp_path / "pwned").exists()


def test_a_registered_base_model_is_named_for_the_trainer_and_read_from_where_it_was_fetched(tmp_path: Path) -> None:
    task = CausalLM.model_validate({"model": {"pretrained": "models:/base/2"}})
    assert task.bases() == ("models:/base/2",)
    local = task.with_bases({"models:/base/2": tmp_path})
    assert local.bases() == ()
    assert local.model.pretrained == str(tmp_path)
