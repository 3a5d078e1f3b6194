"""LoRA through peft: train small adapters, and merge them into the weights without touching the live model.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models": W' = W + alpha / rank * B A.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from modelyard.config import Config
from modelyard.errors import ConfigError
from modelyard.extras import optional

if TYPE_CHECKING:
    from torch import Tensor, nn

ADAPTER_FOLDER = "adapter"
_PREFIX = "base_model.model."
_BASE = ".base_layer."
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


class Lora(Config):
    """Train rank-limited additions to linear layers instead of the weights themselves."""

    rank: int = Field(default=8, gt=0)
    """Rank of each addition."""
    alpha: float = Field(default=16.0, gt=0.0)
    """Scale of the additions is `alpha / rank`."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout of the adapters' inputs."""
    target_modules: tuple[str, ...] | None = None
    """Names of the linear layers to adapt, e.g. `[q_proj, v_proj]`. Default: all but the output."""
    merge_at_end: bool = True
    """Save one merged model; otherwise the untouched base model with the adapter in its `adapter/` folder."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` with adapters; only they are trainable.

        Raises:
            MissingExtraError: peft is not installed.
            ConfigError: the model has no layer of a name in `target_modules`.
        """
        peft = import_peft()
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules="all-linear" if self.target_modules is None else list(self.target_modules),
            task_type="CAUSAL_LM",
        )
        if self.target_modules is not None:
            self._require_targets(model)
        wrapped: nn.Module = peft.get_peft_model(model, config)
        return wrapped

    def _require_targets(self, model: nn.Module) -> None:
        import torch

        linear = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        for target in self.target_modules or ():
            if target.rsplit(".", 1)[-1] not in linear:
                raise ConfigError(
                    f"lora.target_modules: the model has no linear layer {target!r}",
                    f"it has: {', '.join(sorted(linear))}",
                )

    def merged(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The base model's state dict with every adapter merged in.

        `state` is the wrapped model's and stays as it is. Only tensors are needed, so weights gathered from
        ZeRO-3 serve as well. The product is made in fp32.
        """
        merged = base_state(state)
        for key, low in state.items():
            if not key.endswith(_A):
                continue
            name = key.removesuffix(_A).removeprefix(_PREFIX) + ".weight"
            high = state[key.removesuffix(_A) + _B]
            delta = (high.float() @ low.float()) * (self.alpha / self.rank)
            merged[name] = (merged[name].float() + delta.to(merged[name].device)).to(merged[name].dtype)
        return merged


def import_peft() -> Any:
    """The peft package.

    Raises:
        MissingExtraError: it is not installed.
    """
    return optional("peft", "peft", "lora")


def base_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base model's weights, by its own names, out of a wrapped model's state dict."""
    return {
        key.removeprefix(_PREFIX).replace(_BASE, "."): tensor for key, tensor in state.items() if ".lora_" not in key
    }


def save_adapter(model: Any, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapters of a wrapped model into `folder/adapter`, in peft's own format."""
    from safetensors.torch import save_file

    target = folder / ADAPTER_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    adapters = {k.replace(".default.", "."): v.detach().cpu().contiguous() for k, v in state.items() if ".lora_" in k}
    save_file(adapters, target / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"]
    inference, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(target)
    finally:
        config.inference_mode = inference


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with the adapters of `folder/adapter`, if it has some."""
    target = folder / ADAPTER_FOLDER
    if not target.is_dir():
        return model
    wrapped: nn.Module = import_peft().PeftModel.from_pretrained(model, target, is_trainable=False)
    return wrapped
