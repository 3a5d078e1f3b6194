"""Hugging Face folders to GGUF files, for engines that run quantized weights; and GGUF files back to folders.

GGUF is the format of llama.cpp; OpenVINO GenAI reads it too. Tensors are written as Q8_0: blocks of 32 weights that
share one fp16 scale, 8 bits each, 1.06 bytes a weight.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from modelyard.errors import InputError, IntegrityError
from modelyard.extras import optional
from modelyard.tasks.compact import read_compact
from modelyard.tasks.generation import load_tokenizer
from modelyard.tasks.language_models import quiet_progress, read_config

if TYPE_CHECKING:
    from torch import nn

GGUF_ARCHITECTURES = frozenset({"LlamaForCausalLM", "MistralForCausalLM"})
"""What `write_gguf` can write: one layout of tensors."""
_BLOCK = 32
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_NORMAL, _CONTROL = 1, 3  # token types of GGUF


def why_not_gguf(config: Mapping[str, Any]) -> str:
    """Why a model with this `config.json` cannot become a GGUF file; empty when it can."""
    architecture = next(iter(config.get("architectures") or ["unknown"]))
    if architecture not in GGUF_ARCHITECTURES:
        return f"its architecture {architecture} is not one of {', '.join(sorted(GGUF_ARCHITECTURES))}"
    if config.get("factorized_layers"):
        return "its layers are factorized"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (kind := rope.get("rope_type", "default")) != "default":
        return f"its rotary positions are scaled ({kind})"
    if config.get("attention_bias") or config.get("mlp_bias"):
        return "its layers have biases"
    if config.get("sliding_window"):
        return f"its attention sees a window of {config['sliding_window']} tokens only"
    if config.get("hidden_act", "silu") != "silu":
        return f"its activation is {config['hidden_act']}, not silu"
    if config["hidden_size"] % _BLOCK or config["intermediate_size"] % _BLOCK:
        return f"its widths {config['hidden_size']} and {config['intermediate_size']} are no multiples of {_BLOCK}"
    return ""


def write_gguf(model: nn.Module, folder: Path, target: Path, *, exact: bool = False) -> None:
    """Write a Llama-style model as `target`, in Q8_0 with norms in fp32; committed by one rename.

    Layers that `folder` stores in 4 bits, in groups of 32, become Q4_0: the very same weights.

    Rows of the embedding that belong to no token of the tokenizer are left out. The tokenizer is written for byte-level
    BPE, with GPT-2's splitting of words: exact for whoever sends token ids, near for llama.cpp given text.

    Args:
        model: a `LlamaForCausalLM` or alike, adapters merged.
        folder: where its `config.json` and tokenizer are.
        target: the file; its folder is made.
        exact: write fp16 instead, for whoever rounds further.

    Raises:
        InputError: the model is of another kind (`why_not_gguf`), or its tokenizer is no byte-level BPE.
        MissingExtraError: the package `gguf` is not installed.
    """
    gguf = import_gguf()
    config = read_config(folder)
    if reason := why_not_gguf(config):
        raise InputError(f"{str(folder)!r} cannot become a GGUF file: {reason}", "choose the engine transformers")
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    writer = gguf.GGUFWriter(staged, "llama")
    try:
        rows = _write_tokenizer(writer, gguf, folder)
        _write_sizes(writer, gguf, config, rows)
        kinds = {} if exact else _four_bits(folder)
        _write_tensors(writer, gguf, model, config, rows, kinds, "F16" if exact else "Q8_0")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)


def read_gguf(file: Path, folder: Path) -> None:
    """Turn a GGUF file into a Hugging Face folder: dequantized fp32 safetensors, tokenizer, chat template.

    The greedy answers are those of the quantized weights; four to eight times the size is the price for a model that
    can be fine-tuned.

    Raises:
        InputError: transformers does not know the file's architecture.
        IntegrityError: the file is damaged.
        MissingExtraError: the package `gguf` is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    import_gguf()
    if not file.is_file():
        raise InputError(f"there is no file {str(file)!r}", "give the path of a GGUF file")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise InputError(f"{str(file)!r} is no GGUF file", "give a GGUF file, or a Hugging Face folder")
    try:
        with quiet_progress():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                local_files_only=True,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (NotImplementedError, KeyError) as error:
        raise InputError(f"transformers cannot read {str(file)!r}: {error}", "import a Hugging Face folder") from error
    except (ValueError, OSError, RuntimeError) as error:
        raise IntegrityError(f"{str(file)!r} cannot be read: {error}", "fetch it again") from error


def import_gguf() -> Any:
    """The package that reads and writes GGUF.

    Raises:
        MissingExtraError: it is not installed.
    """
    return optional("gguf", "gguf", "openvino")


def _write_sizes(writer: Any, gguf: Any, config: dict[str, Any], rows: int) -> None:
    heads = int(config["num_attention_heads"])
    width = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(rows)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)


def _write_tokenizer(writer: Any, gguf: Any, folder: Path) -> int:
    """Returns how many rows of the embedding belong to tokens."""
    tokenizer = load_tokenizer(folder)
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    if definition["model"]["type"] != "BPE" or '"ByteLevel"' not in json.dumps(definition["decoder"]):
        raise InputError(
            f"the tokenizer in {str(folder)!r} is no byte-level BPE, and no other is written to GGUF",
            "choose the engine transformers",
        )
    vocabulary = tokenizer.get_vocab()
    rows: int = max(vocabulary.values()) + 1
    tokens = [f"<unused {number}>" for number in range(rows)]
    types = [_CONTROL] * rows
    special = set(tokenizer.all_special_ids) | {t["id"] for t in definition["added_tokens"] if t["special"]}
    for token, number in vocabulary.items():
        tokens[number], types[number] = token, _CONTROL if number in special else _NORMAL
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in definition["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
    ):
        if number is not None:
            add(number)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    return rows


def _four_bits(folder: Path) -> dict[str, str]:
    """Tensors whose weights are on the grid of Q4_0, by name."""
    compact = read_compact(folder)
    layers = {} if compact is None else compact.quantized
    return {
        f"{name}.weight": "Q4_0"
        for name, layer in layers.items()
        if layer.codes == "int4" and layer.symmetric and layer.group_size == _BLOCK
    }


def _write_tensors(
    writer: Any,
    gguf: Any,
    model: nn.Module,
    config: dict[str, Any],
    rows: int,
    kinds: Mapping[str, str],
    default: str,
) -> None:
    heads = int(config["num_attention_heads"])
    turned = {"attn_q": heads, "attn_k": int(config.get("num_key_value_heads") or heads)}
    tied = bool(config.get("tie_word_embeddings"))
    for name, tensor in model.state_dict().items():
        if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
            continue
        short = _gguf_name(name.removesuffix(".weight"))
        weights = tensor.detach().float().cpu().numpy()
        if short in ("token_embd", "output"):
            weights = weights[:rows]
        part = short.rpartition(".")[2]
        if part in turned:
            weights = _interleaved(weights, turned[part])
        if weights.ndim == 1:
            writer.add_tensor(f"{short}.weight", np.ascontiguousarray(weights))
        else:
            kind = gguf.GGMLQuantizationType[kinds.get(name, default)]
            writer.add_tensor(f"{short}.weight", gguf.quants.quantize(weights, kind), raw_dtype=kind)


def _gguf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, _, layer, rest = name.split(".", 3)  # model.layers.7.self_attn.q_proj
    return f"blk.{layer}.{_NAMES[rest]}"


def _interleaved(weights: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows in GGUF's order: it rotates neighbours, Hugging Face the two halves of a head."""
    rows, columns = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
