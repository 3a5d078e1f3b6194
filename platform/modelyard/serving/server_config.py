"""What a model server can be told."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from modelyard.config import Config


class ModelConfig(Config):
    """One model to serve."""

    reference: str = Field(min_length=1)
    """The artifact, e.g. `models:/tiny-gpt@production`; an alias is resolved once, when the server starts."""
    name: str | None = Field(default=None, min_length=1)
    """What callers write into `model`; by default the artifact's name."""
    engine: Literal["auto", "transformers", "openvino", "vllm", "batch"] = "auto"
    """`auto`: the fastest one that is installed and can run the model."""
    context_tokens: int | None = Field(default=None, gt=1)
    """Most tokens of prompt and answer; by default what the model can, or fewer where `cache_mib` ends."""
    cache_mib: int = Field(default=1024, gt=0)
    """Memory for the keys and values of all its sequences (language models; vllm takes `gpu_memory_share`)."""
    max_sequences: int = Field(default=64, gt=0)
    """Most sequences that get tokens at once."""
    max_waiting: int = Field(default=128, ge=0)
    """Sequences (inputs, for `predict`) beyond those that may wait; more are refused until some have ended."""
    max_batch: int = Field(default=32, gt=0)
    """Most inputs that one `predict` takes together."""
    max_wait_ms: float = Field(default=5.0, ge=0)
    """How long the first input of such a batch waits for others."""
    gpu_memory_share: float = Field(default=0.9, gt=0, le=1)
    """Share of each GPU's memory (vllm only)."""
    gpus: int = Field(default=1, gt=0)
    """GPUs that the model is split over (vllm only)."""


class ServerConfig(Config):
    """The models of one process."""

    models: tuple[ModelConfig, ...] = Field(min_length=1)
    """All that can be asked; they are loaded when first asked, or at the start where `preload` says so."""
    preload: bool = True
    """Load models at the start, in this order, as long as the budget has room."""
    memory_mib: int | None = Field(default=None, gt=0)
    """Budget for weights and caches of all loaded models; the longest idle one makes room. None: no limit."""
    room_timeout_s: float = Field(default=30.0, gt=0)
    """How long a call waits for busy models to make room for its own."""
    threads: int | None = Field(default=None, gt=0)
    """CPU threads for arithmetic: the CPUs of the replica. None: as many as the machine has."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [model.name for model in self.models if model.name is not None]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two models are named {twice[0]!r}; give each a name of its own")
        return self
