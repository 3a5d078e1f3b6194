"""What the training loop knows of an engine, and which engine a config means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch

from modelyard.training.batching import RankPlan
from modelyard.training.config import TrainConfig
from modelyard.training.cpu import keep_freed_memory
from modelyard.training.gang import Gang
from modelyard.training.noise import Norms
from modelyard.training.strategies import AllReduce, Gossip, ParameterServer


class TrainEngine(Protocol):
    """Forward, backward and optimizer step of one worker. Built and closed on every worker at once."""

    @property
    def spread(self) -> int:
        """Most steps by which one worker may be ahead of another; 0 means lockstep."""

    @property
    def is_claiming(self) -> bool:
        """Whether `parts` are only known when they are asked for; else they are the same at every step."""

    @property
    def is_whole(self) -> bool:
        """Whether `module` holds all weights on every worker; else saving the model needs `full_state`."""

    @property
    def sent_bytes(self) -> int | None:
        """Bytes that this worker's exchanges have sent so far; None where they cannot be counted."""

    @property
    def model(self) -> torch.nn.Module:
        """What forward passes must go through."""

    @property
    def module(self) -> torch.nn.Module:
        """The plain model inside."""

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, trainable or not."""

    def parts(self, step: int) -> Iterator[RankPlan]:
        """The parts of global batch `step` (0-based) that this worker computes, one after another; maybe none."""

    def backward(self, row_losses_b: torch.Tensor, *, is_last: bool, measure_rows: int = 0) -> None:
        """Add the gradient of the global batch's mean loss that comes from these rows, shape (B,)."""

    def take_norms(self) -> Norms:
        """Norms of this worker's micro-batches that were measured since the last call."""

    def step(self, step: int) -> tuple[float, float]:
        """End optimizer step `step`; the learning rate and a gradient norm before clipping."""

    def published(self) -> AbstractContextManager[torch.nn.Module]:
        """Within it, `module` and `model` are what the gang would publish now; gives `model`. Collective."""

    def save(self, folder: Path, tag: str) -> None:
        """Write this worker's part of the training state below `folder/tag`. Collective."""

    def load(self, folder: Path, tag: str, *, weights_only: bool = False) -> None:
        """Read the state below `folder/tag`. Collective."""

    def full_state(self) -> dict[str, torch.Tensor]:
        """Copies of all weights on the CPU. Collective; only worker 0 needs to get them."""

    def close(self) -> None:
        """Let go of peers; the weights stay. Collective."""


def build_engine(
    model: torch.nn.Module, config: TrainConfig, plan: RankPlan, gang: Gang, *, from_universal: bool = False
) -> TrainEngine:
    """The engine of `training.strategy`. Collective."""
    match config.training.strategy:
        case AllReduce():
            from modelyard.training.engine import Engine

            return Engine(model, config, plan, num_workers=gang.num_workers, from_universal=from_universal)
        case ParameterServer():
            keep_freed_memory()
            from modelyard.training.parameter_server import ParameterServerEngine

            return ParameterServerEngine(model, config, plan, gang)
        case Gossip():
            keep_freed_memory()
            from modelyard.training.gossip import GossipEngine

            return GossipEngine(model, config, plan, gang)
