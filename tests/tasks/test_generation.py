"""Generation: seeded, bounded, and polite to the caller's state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modelyard.data.dataset import Dataset
from modelyard.errors import DataError, InputError
from modelyard.tasks import CausalLM, load_model
from modelyard.tasks.generation import generate, load_tokenizer, token_bytes
from modelyard.tasks.language_models import LlamaModel

from .conftest import TEXT


@pytest.fixture
def model_and_tokenizer(tokens_folder: Path) -> tuple[torch.nn.Module, Any]:
    task = CausalLM(model=LlamaModel(layers=1, hidden_size=32, heads=2, max_positions=24, vocab_multiple=128))
    torch.manual_seed(0)
    return task.build(Dataset.open(tokens_folder).info, None), load_tokenizer(tokens_folder / "tokenizer")


def test_the_same_seed_gives_the_same_text(model_and_tokenizer: tuple[torch.nn.Module, Any]) -> None:
    texts = [generate(*model_and_tokenizer, "the quick", max_new_tokens=12, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_callers_random_state_and_mode_are_left_alone(
    model_and_tokenizer: tuple[torch.nn.Module, Any],
) -> None:
    model, tokenizer = model_and_tokenizer
    model.train()
    before = torch.get_rng_state()
    generate(model, tokenizer, "the", max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_temperature_zero_is_greedy(model_and_tokenizer: tuple[torch.nn.Module, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    text = generate(model, tokenizer, "the", max_new_tokens=1, temperature=0, seed=None)
    with torch.inference_mode():
        scores = model.eval()(tokenizer("the", return_tensors="pt").input_ids).logits[0, -1, : len(tokenizer)]
    assert text == tokenizer.decode([int(scores.argmax())], skip_special_tokens=True)


def test_rows_that_only_pad_the_vocabulary_are_never_chosen(
    model_and_tokenizer: tuple[torch.nn.Module, Any],
) -> None:
    model, tokenizer = model_and_tokenizer
    net: Any = model
    with torch.no_grad():  # make the 84 padding rows by far the likeliest
        net.get_input_embeddings().weight[300:] = net.get_input_embeddings().weight[50] * 100
    assert net.config.vocab_size == 384
    ids: list[int] = []
    tokenizer_decode = tokenizer.decode
    tokenizer.decode = lambda out, **options: ids.extend(out.tolist()) or tokenizer_decode(out, **options)
    for seed in range(5):
        generate(model, tokenizer, "the", max_new_tokens=8, temperature=5.0, top_p=1.0, seed=seed)
    assert ids
    assert max(ids) < 300


def test_a_long_prompt_loses_its_beginning(model_and_tokenizer: tuple[torch.nn.Module, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    ids = tokenizer(TEXT).input_ids
    tail = tokenizer.decode(ids[-20:])
    assert len(tokenizer(tail).input_ids) == 20
    assert generate(model, tokenizer, TEXT, max_new_tokens=4) == generate(model, tokenizer, tail, max_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "below 1"),
        ({"max_new_tokens": 24}, "sees 24 tokens at most"),
        ({"temperature": -1.0}, "below 0"),
        ({"temperature": float("nan")}, "below 0"),
        ({"top_p": 0.0}, r"outside 0\.\.1"),
        ({"top_p": 1.5}, r"outside 0\.\.1"),
    ],
)
def test_impossible_options_are_refused(
    options: dict[str, Any], message: str, model_and_tokenizer: tuple[torch.nn.Module, Any]
) -> None:
    with pytest.raises(InputError, match=message):
        generate(*model_and_tokenizer, "the", **({"max_new_tokens": 4} | options))


def test_an_empty_prompt_is_refused(model_and_tokenizer: tuple[torch.nn.Module, Any]) -> None:
    with pytest.raises(InputError, match="prompt is empty"):
        generate(*model_and_tokenizer, "", max_new_tokens=4)


def test_a_loaded_model_predicts_with_its_own_tokenizer(tokens_folder: Path, tmp_path: Path) -> None:
    task = CausalLM(model=LlamaModel(layers=1, hidden_size=32, heads=2))
    model = task.build(Dataset.open(tokens_folder).info, None)
    task.save(model, tmp_path / "model", tokens_folder)
    loaded_task, loaded = load_model(tmp_path / "model")
    answers = loaded_task.predict(loaded, ["the", "the", "fox"], max_new_tokens=4, seed=3)
    assert answers[0] == answers[1]
    assert answers[0] == generate(model, load_tokenizer(tokens_folder / "tokenizer"), "the", max_new_tokens=4, seed=3)


def test_bytes_of_tokens_add_up_to_the_text(tokens_folder: Path) -> None:
    tokenizer = load_tokenizer(tokens_folder / "tokenizer")
    table = token_bytes(tokenizer)
    assert table is not None
    text = "naïve café 東京 🦊 the quick\n\tfox"
    assert table[tokenizer(text).input_ids].sum() == len(text.encode())
    assert table[tokenizer.eos_token_id] == 0


def test_tokens_that_are_not_bytes_are_not_counted(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")) is None


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
