"""Where a causal language model comes from: built from scratch, or a Hugging Face folder on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag, model_validator

from modelyard.config import Config
from modelyard.errors import ConfigError, IntegrityError
from modelyard.tasks.compact import Compact, load_compact, read_compact
from modelyard.tasks.saving import require_safe_weights

if TYPE_CHECKING:
    from torch import nn

    from modelyard.data.dataset import DatasetInfo

ATTENTION = "sdpa"
"""torch's scaled-dot-product attention: FlashAttention on GPUs, a fused kernel on CPUs."""


_NOISY = ("torchao", "torch.utils._pytree")  # torchao, where it is installed, reports kernels for other machines


class ModelSizes(NamedTuple):
    """The numbers that decide how a model may be cut."""

    heads: int
    kv_heads: int
    layers: int
    feed_forward: int
    vocabulary: int
    tied: bool
    """Whether the embedding is the output matrix too."""


class LlamaModel(Config):
    """A Llama-style decoder with fresh weights; its vocabulary is the dataset tokenizer's."""

    architecture: Literal["llama"] = "llama"
    """RMSNorm, rotary positions, SwiGLU, grouped-query attention: transformers' `LlamaForCausalLM`."""
    layers: int = Field(gt=0)
    """Decoder layers."""
    hidden_size: int = Field(gt=0)
    """Width of the residual stream; a multiple of `2 * heads`."""
    heads: int = Field(gt=0)
    """Attention heads."""
    kv_heads: int | None = Field(default=None, gt=0)
    """Key/value heads; divides `heads`. Default: `heads` (no grouping)."""
    intermediate_size: int | None = Field(default=None, gt=0)
    """Width of the feed-forward part. Default: 8/3 of `hidden_size`, rounded up to a multiple of 64."""
    max_positions: int | None = Field(default=None, gt=0)
    """Longest text in tokens the model may see. Default: the dataset's block length."""
    tied_embeddings: bool = True
    """Use the embedding matrix as output matrix too: fewer parameters, better for small models."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout of the attention weights (the only dropout the Llama architecture has)."""
    vocab_size: int | None = Field(default=None, gt=0)
    """Rows of the embedding. Default: the tokenizer's vocabulary rounded up to `vocab_multiple`."""
    vocab_multiple: int = Field(default=1, gt=0)
    """Round the vocabulary up to a multiple of this; 64 or 128 is faster on GPUs."""

    @model_validator(mode="after")
    def _heads_fit(self) -> LlamaModel:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} is no multiple of 2 * heads={2 * self.heads} "
                "(rotary positions need heads of even width)"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        return self

    def vocabulary(self, tokenizer_size: int) -> int:
        """Rows of the embedding for a tokenizer with `tokenizer_size` ids."""
        if self.vocab_size is not None:
            return self.vocab_size
        return -(-tokenizer_size // self.vocab_multiple) * self.vocab_multiple

    def feed_forward(self) -> int:
        """Width of the feed-forward part."""
        return self.intermediate_size or -(-self.hidden_size * 8 // (3 * 64)) * 64

    def limits(self, info: DatasetInfo) -> tuple[int, int | None]:
        """(vocabulary, longest text in tokens) of the model for this dataset."""
        return self.vocabulary(info.vocab_size or 0), self.max_positions or info.block_tokens

    def sizes(self, info: DatasetInfo) -> ModelSizes:
        """What the model will have for this dataset."""
        return ModelSizes(
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            layers=self.layers,
            feed_forward=self.feed_forward(),
            vocabulary=self.limits(info)[0],
            tied=self.tied_embeddings,
        )

    def build(self, info: DatasetInfo) -> nn.Module:
        """Fresh fp32 weights from torch's global random generator."""
        from transformers import LlamaConfig, LlamaForCausalLM

        vocabulary, positions = self.limits(info)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.hidden_size,
            intermediate_size=self.feed_forward(),
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads or self.heads,
            max_position_embeddings=positions,
            tie_word_embeddings=self.tied_embeddings,
            attention_dropout=self.dropout,
            bos_token_id=None,
            eos_token_id=info.end_of_text_id,
            pad_token_id=None,
            attn_implementation=ATTENTION,
        )
        model: nn.Module = LlamaForCausalLM(config)
        return model


class PretrainedModel(Config):
    """A causal language model to go on from: any Hugging Face folder with safetensors in it."""

    pretrained: str = Field(min_length=1)
    """Folder on disk, or a model reference such as `models:/tiny-gpt@production`."""

    def folder(self) -> Path:
        """The local folder, fetched and verified first when `pretrained` is a reference.

        Raises:
            NotFoundError: there is no such folder or reference.
            UnsafeFileError: its weights are pickles.
        """
        path = Path(self.pretrained).expanduser()
        if self.pretrained.startswith("models:/"):
            from modelyard.artifacts.registry import Registry

            path = Registry.from_settings().open(self.pretrained)[1]
        require_safe_weights(path)
        return path

    def limits(self, info: DatasetInfo) -> tuple[int, int | None]:
        """(vocabulary, longest text in tokens) by the folder's `config.json`; `info` plays no part."""
        config = read_config(self.folder())
        text = config.get("text_config", config)
        positions = next((text[k] for k in ("max_position_embeddings", "n_positions") if k in text), None)
        return int(text.get("vocab_size", 0)), positions

    def sizes(self, info: DatasetInfo) -> ModelSizes:
        """What the folder's `config.json` says, by the names of Llama-like models or of GPT-2; `info` plays no part."""
        config = read_config(self.folder())
        text = config.get("text_config", config)
        heads = int(text.get("num_attention_heads") or text.get("n_head") or 0)
        hidden = int(text.get("hidden_size") or text.get("n_embd") or 0)
        return ModelSizes(
            heads=heads,
            kv_heads=int(text.get("num_key_value_heads") or heads),
            layers=int(text.get("num_hidden_layers") or text.get("n_layer") or 0),
            feed_forward=int(text.get("intermediate_size") or text.get("n_inner") or 4 * hidden),
            vocabulary=int(text.get("vocab_size", 0)),
            tied=bool(text.get("tie_word_embeddings", True)),
        )

    def build(self, info: DatasetInfo) -> nn.Module:
        """The folder's weights in fp32; code that a folder may bring along is never run."""
        import torch

        return load_folder(self.folder(), dtype=torch.float32)


def folder_or(own: str) -> Discriminator:
    """Tells a folder to go on from, tagged `pretrained`, from the sizes of a new model, tagged `own`."""

    def source(value: Any) -> str:
        given = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
        return "pretrained" if "pretrained" in given else own

    return Discriminator(source)


ModelSource = Annotated[
    Annotated[LlamaModel, Tag("llama")] | Annotated[PretrainedModel, Tag("pretrained")],
    folder_or("llama"),
]


def read_config(folder: Path) -> dict[str, Any]:
    """The Hugging Face `config.json` of a model folder.

    Raises:
        ConfigError: there is none.
        IntegrityError: it is not JSON.
    """
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"model.pretrained: {str(folder)!r} has no config.json",
            "give a folder that `save_pretrained` wrote",
        ) from None
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{str(path)!r} cannot be read: {error}") from error
    return config


def load_folder(folder: Path, dtype: Any = "auto") -> nn.Module:
    """The causal language model of a local folder, safetensors only, on the CPU.

    Raises:
        IntegrityError: the weights are damaged, or are not those of the folder's config.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    require_safe_weights(folder)
    if (compact := read_compact(folder)) is not None:
        return _load_compact(folder, compact)
    try:
        with quiet_progress():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=dtype,
                attn_implementation=ATTENTION,
                output_loading_info=True,
            )
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise IntegrityError(f"the model in {str(folder)!r} cannot be loaded: {error}") from error
    if report["missing_keys"] or report.get("mismatched_keys"):
        wrong = sorted(map(str, report["missing_keys"] or report["mismatched_keys"]))
        raise IntegrityError(
            f"{str(folder)!r} lacks {len(wrong)} of the weights its config.json asks for, e.g. {wrong[0]!r}",
            "a part of it would start from random numbers; fetch the folder again",
        )
    result: nn.Module = model
    return result


def _load_compact(folder: Path, compact: Compact) -> nn.Module:
    """The model of a folder with `compact.json`, fp32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # for other readers of the same files
    with quiet_progress():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=ATTENTION)
    model.config._name_or_path = str(folder)
    return load_compact(model, folder, compact)


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Keep transformers' progress bars, and the notes of packages that it imports, out of the run's own display."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    noisy = [logging.logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
        if shown:
            logging.enable_progress_bar()
