"""What the tasks on whole texts share: an encoder from scratch or from a folder, its tokenizer, saving and loading."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, Tag, model_validator

from modelyard.config import Config
from modelyard.errors import ConfigError, DataError
from modelyard.tasks.folders import FolderTask, require_same_classes
from modelyard.tasks.generation import require_same_tokenizer
from modelyard.tasks.language_models import ATTENTION, PretrainedModel, folder_or

if TYPE_CHECKING:
    from torch import Tensor, device, nn

    from modelyard.data.dataset import DatasetInfo

TOKENS, LENGTH = "input_ids", "length"
"""Columns of labelled and tagged text: (n, T) token ids padded at the end, and (n,) how many count."""


class BertModel(Config):
    """A BERT encoder from scratch (Devlin et al. 2019)."""

    architecture: Literal["bert"] = "bert"
    layers: int = Field(default=4, gt=0)
    hidden_size: int = Field(default=128, gt=0)
    heads: int = Field(default=4, gt=0)
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"heads={self.heads} does not divide hidden_size={self.hidden_size}")
        return self


EncoderSource = Annotated[
    Annotated[BertModel, Tag("bert")] | Annotated[PretrainedModel, Tag("pretrained")], folder_or("bert")
]


class EncoderTask(FolderTask, ABC):
    """A task whose model is an encoder of transformers with a head; saved as a Hugging Face folder."""

    model: EncoderSource = BertModel()
    """An encoder from scratch (`architecture: bert`, sizes) or one to go on from (`pretrained: FOLDER`)."""

    format: ClassVar[str]
    """The format of dataset it is trained on."""
    attention: ClassVar[str | None] = ATTENTION

    def check(self, info: DatasetInfo) -> None:
        if info.format != self.format or info.vocab_size is None or info.block_tokens is None:
            raise DataError(
                f"task {self.kind} needs a dataset of {self.format}, this one holds {info.format}",
                f"prepare one with source.kind `{self.format}`",
            )
        if isinstance(self.model, PretrainedModel):
            vocabulary, positions = self.model.limits(info)
            if info.vocab_size > vocabulary:
                raise ConfigError(
                    f"task.model: the dataset's tokenizer has {info.vocab_size} tokens, the model only {vocabulary}",
                    "prepare the dataset with this model's tokenizer",
                )
            if positions is not None and info.block_tokens > positions:
                raise ConfigError(
                    f"task.model: rows have {info.block_tokens} tokens, the model sees {positions} at most",
                    "lower sentences.max_tokens and prepare the dataset again",
                )

    def build(self, info: DatasetInfo, dataset_folder: Path | None) -> nn.Module:
        self.check(info)
        names = dict(enumerate(info.classes))
        if isinstance(self.model, BertModel):
            model = self._from_scratch(self.model, info, names)
        else:
            if dataset_folder is not None and info.tokenizer is not None:
                require_same_tokenizer(self.model.folder(), dataset_folder / info.tokenizer)
            model = self._from_folder(self.model.folder(), id2label=names, label2id={v: k for k, v in names.items()})
        self._remember(model, info)
        return model

    def _from_scratch(self, source: BertModel, info: DatasetInfo, names: dict[int, str]) -> nn.Module:
        import transformers

        config = transformers.BertConfig(
            vocab_size=info.vocab_size,
            hidden_size=source.hidden_size,
            num_hidden_layers=source.layers,
            num_attention_heads=source.heads,
            intermediate_size=4 * source.hidden_size,
            hidden_dropout_prob=source.dropout,
            attention_probs_dropout_prob=source.dropout,
            max_position_embeddings=info.block_tokens,
            pad_token_id=None,
            id2label=names,
            label2id={name: number for number, name in names.items()},
            attn_implementation=ATTENTION,
        )
        built: nn.Module = getattr(transformers, self.auto_class).from_config(config)
        return built

    def _inputs(self, rows: Mapping[str, np.ndarray], where: device | str) -> dict[str, Tensor]:
        """Token ids and lengths, cut to the longest of these rows: padding costs time and changes nothing."""
        import torch

        longest = max(1, int(rows[LENGTH].max(initial=1)))
        tokens = torch.from_numpy(rows[TOKENS][:, :longest].astype(np.int64))
        lengths = torch.from_numpy(rows[LENGTH].astype(np.int64))
        return {TOKENS: tokens.to(where), LENGTH: lengths.to(where)}

    def check_saved(self, folder: Path, trained: DatasetInfo, info: DatasetInfo, dataset_folder: Path) -> None:
        super().check_saved(folder, trained, info, dataset_folder)
        require_same_classes(trained, info)
        if info.tokenizer is not None:
            require_same_tokenizer(folder, dataset_folder / info.tokenizer)

    def flops_per_row(self, model: nn.Module) -> float:
        """6 per weight and token of a full row, and `12 * layers * width * T` per token for attention."""
        net: Any = model
        tokens = int(net.row_tokens)
        looked_up = {id(module.weight) for module in model.modules() if type(module).__name__ == "Embedding"}
        weights = sum(
            math.prod(shape)
            for p in model.parameters()
            if len(shape := getattr(p, "ds_shape", p.shape)) == 2 and id(p) not in looked_up
        )
        return float(tokens * (6 * weights + 12 * net.config.num_hidden_layers * net.config.hidden_size * tokens))

    def load(self, folder: Path, info: DatasetInfo) -> nn.Module:
        model: Any = super().load(folder, info)
        model.tokenizer_file = folder / "tokenizer.json"
        loaded: nn.Module = model
        return loaded

    def _remember(self, model: nn.Module, info: DatasetInfo) -> None:
        remembering: Any = model
        remembering.row_tokens = info.block_tokens


def encode(model: nn.Module, texts: Sequence[Any], *, pretokenized: bool, tokenizer: Path | None = None) -> list[Any]:
    """The encodings of texts (or of lists of words) by the tokenizer the model was loaded with, or that file.

    Raises:
        DataError: the model has none.
    """
    from modelyard.data.sentences import padding_encoder

    net: Any = model
    file = tokenizer or getattr(net, "tokenizer_file", None)
    if file is None or not Path(file).is_file():
        raise DataError("the model has no tokenizer", "load it with `modelyard.tasks.load_model`")
    bpe = padding_encoder(Path(file).read_text(encoding="utf-8"), net.row_tokens)
    found: list[Any] = bpe.encode_batch(list(texts), is_pretokenized=pretokenized)
    return found


def rows_of(encodings: Sequence[Any]) -> dict[str, np.ndarray]:
    """Encodings as the columns that a dataset has."""
    return {
        TOKENS: np.array([one.ids for one in encodings], dtype=np.int64),
        LENGTH: np.array([sum(one.attention_mask) for one in encodings], dtype=np.int64),
    }


def attention_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """1 for the tokens that count, 0 for padding, (B, T) int64."""
    import torch

    places = torch.arange(batch[TOKENS].shape[1], device=batch[TOKENS].device)
    return (places < batch[LENGTH][:, None]).long()
