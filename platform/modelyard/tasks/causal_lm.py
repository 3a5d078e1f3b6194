"""Causal language models: predict the next token of packed blocks of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from modelyard.errors import ConfigError, DataError
from modelyard.tasks import saving
from modelyard.tasks.base import Objective, Task
from modelyard.tasks.generation import (
    differing_tokens,
    generate,
    has_tokenizer,
    load_tokenizer,
    require_same_tokenizer,
    token_bytes,
)
from modelyard.tasks.language_models import ModelSource, PretrainedModel, load_folder, quiet_progress, read_config
from modelyard.tasks.lora import Lora, base_state, load_adapter, save_adapter
from modelyard.tasks.slices import POSITIONS, TARGETS, TOKENS, WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor, device, nn

    from modelyard.data.dataset import DatasetInfo


class CausalLM(Task):
    """Language modelling on rows of T tokens; every token but the first is predicted from those before it."""

    kind: Literal["causal_lm"] = "causal_lm"
    model: ModelSource
    """A model from scratch (`architecture: llama`, sizes) or one to go on from (`pretrained: FOLDER`)."""
    lora: Lora | None = None
    """Train adapters instead of all weights."""

    metric_names: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "bits_per_byte")

    @property
    def objective(self) -> Objective:
        return ("perplexity", "min")

    def check(self, info: DatasetInfo) -> None:
        if info.format != "tokens" or info.vocab_size is None or info.block_tokens is None:
            raise DataError(
                f"task causal_lm needs a dataset of tokens, this one holds {info.format}",
                "choose another dataset, or the task `image_classification`",
            )
        if info.block_tokens < 2:
            raise DataError(f"blocks of {info.block_tokens} token leave nothing to predict", "prepare longer blocks")
        vocabulary, positions = self.model.limits(info)
        if info.vocab_size > vocabulary:
            raise ConfigError(
                f"task.model: the dataset's tokenizer has {info.vocab_size} tokens, "
                f"the model's vocabulary only {vocabulary}",
                "raise task.model.vocab_size, or prepare the dataset with this model's tokenizer",
            )
        if positions is not None and info.block_tokens > positions:
            raise ConfigError(
                f"task.model: rows have {info.block_tokens} tokens, the model sees {positions} at most",
                "raise task.model.max_positions, or prepare shorter blocks",
            )

    def bases(self) -> tuple[str, ...]:
        name = self.model.pretrained if isinstance(self.model, PretrainedModel) else ""
        return (name,) if name.startswith("models:/") else ()

    def with_bases(self, folders: Mapping[str, Path]) -> CausalLM:
        changed = {name: self.with_changes(model={"pretrained": str(folders[name])}) for name in self.bases()}
        return next(iter(changed.values()), self)

    def build(self, info: DatasetInfo, dataset_folder: Path | None) -> nn.Module:
        self.check(info)
        if isinstance(self.model, PretrainedModel) and dataset_folder is not None and info.tokenizer is not None:
            require_same_tokenizer(self.model.folder(), dataset_folder / info.tokenizer)
        model = self.model.build(info)
        if self.lora is not None:
            model = self.lora.wrap(model)
        _remember_row_tokens(model, info)
        return model

    def collate(self, rows: Mapping[str, np.ndarray], device: device | str) -> dict[str, Tensor]:
        import torch

        return {TOKENS: torch.from_numpy(rows[TOKENS].astype(np.int64)).to(device, non_blocking=True)}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Of slices of rows (`slices.cut`), the slice's share of the row's mean."""
        losses = _token_losses(model, batch)
        return losses @ batch[WEIGHTS] if WEIGHTS in batch else losses.mean(dim=1)

    def statistics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`nll`: fp32 sum of the row's losses in nats; `tokens`: int64 number of predicted tokens."""
        import torch

        losses = _token_losses(model, batch)
        if WEIGHTS in batch:
            losses = losses[:, batch[WEIGHTS] > 0]
        tokens = torch.full((losses.shape[0],), losses.shape[1], dtype=torch.int64, device=losses.device)
        return {"nll": losses.sum(dim=1), "tokens": tokens}

    def check_saved(self, folder: Path, trained: DatasetInfo, info: DatasetInfo, dataset_folder: Path) -> None:
        super().check_saved(folder, trained, info, dataset_folder)
        positions = read_config(folder).get("max_position_embeddings")
        if positions is not None and (info.block_tokens or 0) > positions:
            raise DataError(
                f"rows have {info.block_tokens} tokens, the model sees {positions} at most",
                "measure it on a dataset with shorter blocks",
            )
        if info.tokenizer is not None and trained.tokenizer is not None:
            differing, total = differing_tokens(folder, dataset_folder / info.tokenizer)
            if differing:
                raise DataError(
                    f"{differing} of the dataset's {total} tokens are others in the model's own tokenizer",
                    "measure it on a dataset that was prepared with the model's tokenizer",
                )

    def row_statistics(self, folder: Path) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
        """`bytes`: int64 number of bytes of the row's predicted tokens, for byte-level tokenizers."""
        table = token_bytes(load_tokenizer(folder)) if has_tokenizer(folder) else None
        if table is None:
            return lambda rows: {}
        known = table  # for the closure: not None
        return lambda rows: {"bytes": known[rows[TOKENS][:, 1:]].sum(axis=1)}

    def metrics(self, stats: Mapping[str, np.ndarray]) -> dict[str, float]:
        """`loss` (nats per token), `perplexity`, and with a statistic `bytes` (n,) `bits_per_byte`."""
        nll = float(stats["nll"].sum(dtype=np.float64))
        loss = nll / max(1, int(stats["tokens"].sum()))
        result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if "bytes" in stats:
            result["bits_per_byte"] = nll / math.log(2) / max(1, int(stats["bytes"].sum()))
        return result

    def flops_per_row(self, model: nn.Module) -> float:
        """FLOPs by Chowdhery et al. 2022 (PaLM), appendix B, for one row of T tokens.

        6 per weight and token (2 forward, 4 backward; 4 in all for a frozen weight, whose own gradient is not
        needed) and `12 * layers * hidden * T` per token for attention, halved because it is causal: half of
        the scores are not used. The embedding is a look-up and counts only where it is the output matrix too.
        Experts of a mixture would be counted as if all were used.
        """
        net: Any = model
        length = int(net.row_tokens)
        config = net.config.get_text_config()
        lookup = {id(net.get_input_embeddings().weight)} - {id(net.get_output_embeddings().weight)}
        per_token = 0
        for parameter in net.parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty stand-in
            if len(shape) == 2 and id(parameter) not in lookup:
                per_token += (6 if parameter.requires_grad else 4) * math.prod(shape)
        width = config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        attention = 12 * config.num_hidden_layers * width * length / 2
        return float(length * (per_token + attention))

    def enable_activation_checkpointing(self, model: nn.Module) -> None:
        net: Any = model
        options = {"use_reentrant": False}
        if hasattr(net, "activation_checkpointing_enable"):  # the newer name; the older one warns
            net.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    def save(
        self,
        model: nn.Module,
        folder: Path,
        dataset_folder: Path,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """A Hugging Face folder (any such tool reads it) with the dataset's tokenizer and `task.json`."""
        net: Any = model
        info = saving.read_info(dataset_folder)
        folder.mkdir(parents=True, exist_ok=True)
        full = dict(model.state_dict() if state is None else state)
        if self.lora is not None:
            net = net.get_base_model()
            weights = self.lora.merged(full) if self.lora.merge_at_end else base_state(full)
            if not self.lora.merge_at_end:
                save_adapter(model, full, folder)
        else:
            weights = full
        saving.drop_aliases(net, weights)
        with quiet_progress():
            net.save_pretrained(folder, state_dict=weights)
        if info.tokenizer is not None:
            saving.copy_tokenizer(dataset_folder / info.tokenizer, folder)
        saving.write_task(folder, self, info)

    def load(self, folder: Path, info: DatasetInfo) -> nn.Module:
        model = load_adapter(load_folder(folder), folder)
        _remember_row_tokens(model, info)
        return model.eval()

    def predict(self, model: nn.Module, inputs: Sequence[Any], **options: Any) -> list[Any]:
        """A continuation of each prompt; `options` are those of `generate`, and `tokenizer`.

        The tokenizer defaults to the one in the folder the model was loaded from.
        """
        net: Any = model
        tokenizer = options.pop("tokenizer", None) or load_tokenizer(Path(net.config._name_or_path))
        return [generate(model, tokenizer, prompt, **options) for prompt in inputs]


def _token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    from modelyard.tasks.cross_entropy import cross_entropy, shifted_cross_entropy

    tokens_BT = batch[TOKENS]
    if TARGETS in batch:
        logits_BTV = model(input_ids=tokens_BT, position_ids=batch[POSITIONS], use_cache=False).logits
        return cross_entropy(logits_BTV, batch[TARGETS])  # (B, T of the slice)
    logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
    return shifted_cross_entropy(logits_BTV, tokens_BT)  # (B, T-1)


def _remember_row_tokens(model: nn.Module, info: DatasetInfo) -> None:
    net: Any = model
    net.row_tokens = info.block_tokens
