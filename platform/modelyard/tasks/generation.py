"""Text out of a causal language model: tokenizers from disk, and seeded sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from modelyard.errors import ConfigError, DataError, InputError

if TYPE_CHECKING:
    from torch import nn


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in `folder`."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def load_tokenizer(folder: Path) -> Any:
    """The Hugging Face tokenizer in `folder`; code that the folder may bring along is never run.

    Raises:
        DataError: the folder holds no tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not (folder / "tokenizer_config.json").is_file() and (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{str(folder)!r} holds no tokenizer that can be read: {error}") from error


def differing_tokens(own_folder: Path, given_folder: Path) -> tuple[int, int]:
    """How many tokens of the tokenizer in `given_folder` the one in `own_folder` numbers otherwise; and of how many.

    Raises:
        DataError: a folder holds no tokenizer.
    """
    own, given = load_tokenizer(own_folder).get_vocab(), load_tokenizer(given_folder).get_vocab()
    return sum(own.get(token) != number for token, number in given.items()), len(given)


def require_same_tokenizer(model_folder: Path, dataset_tokenizer: Path) -> None:
    """Refuse a model whose own tokenizer numbers tokens differently: its weights would mean other words.

    Raises:
        ConfigError: how many tokens differ. A model without a tokenizer passes: there is nothing to compare with.
    """
    if not has_tokenizer(model_folder):
        return
    differing, total = differing_tokens(model_folder, dataset_tokenizer)
    if differing:
        raise ConfigError(
            f"task.model.pretrained: {differing} of the dataset's {total} tokens mean something else in "
            f"the tokenizer of {str(model_folder)!r}",
            "prepare the dataset with this model's tokenizer",
        )


def token_bytes(tokenizer: Any) -> npt.NDArray[np.int64] | None:
    """UTF-8 bytes that each token id stands for, (ids,), special tokens 0; None unless tokens are bytes.

    Byte-level tokenizers (GPT-2, Llama 3 and most since) write each byte as one character, so lengths are exact
    even where a token ends inside a character.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or '"ByteLevel"' not in json.dumps(json.loads(backend.to_str())["decoder"]):
        return None
    table = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=np.int64)
    special = set(tokenizer.all_special_ids)
    for token, number in tokenizer.get_vocab().items():
        table[number] = 0 if number in special else len(token)
    return table


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int | None = 0,
) -> str:
    """The model's continuation of `prompt`, without the prompt.

    Args:
        max_new_tokens: the text ends there at the latest. A prompt too long for the model's positions
            together with them loses its beginning.
        temperature: 0 picks the likeliest token every time; higher is more varied.
        top_p: sample among the likeliest tokens that hold this share of the probability.
        seed: same seed, same text; the caller's random state is left as it was. None draws freshly.

    Raises:
        InputError: an option is out of range, or the prompt has no tokens.
    """
    import torch

    _check_options(max_new_tokens, temperature, top_p)
    net: Any = model
    limit = getattr(net.config, "max_position_embeddings", None)
    if limit is not None and max_new_tokens >= limit:
        raise InputError(
            f"max_new_tokens={max_new_tokens}, but the model sees {limit} tokens at most",
            f"ask for at most {limit - 1}",
        )
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise InputError("the prompt is empty", "give at least one character")
    if limit is not None:
        ids = ids[:, -(limit - max_new_tokens) :]
    device = next(model.parameters()).device
    ids = ids.to(device)
    unused = list(range(len(tokenizer), int(net.config.vocab_size)))  # rows that only pad the vocabulary
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    training = model.training
    model.eval()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices, enabled=seed is not None), torch.inference_mode():
            if seed is not None:
                torch.manual_seed(seed)
            out = net.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
                suppress_tokens=unused or None,
                **(sampling or {"do_sample": False}),
            )
    finally:
        model.train(training)
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def _check_options(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} is below 1")
    if not temperature >= 0:
        raise InputError(f"temperature={temperature} is below 0", "use 0 for the likeliest text")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p} is outside 0..1", "use 1 to sample from every token")
