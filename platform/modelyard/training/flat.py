"""A model's trainable weights as one vector, which can be cut anywhere, sent, averaged and optimised in parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modelyard.errors import IntegrityError
from modelyard.training.config import SGD, AdamW
from modelyard.training.engine import torch_optimizer


class FlatModel:
    """The trainable weights of a model, fp32, shape (P,), and the gradient that is being gathered, likewise.

    Matrices, which decay, come before vectors, which do not. In fp32 the model's parameters are views of `weights`;
    in bf16 they are views of a copy that `publish` refreshes.
    """

    def __init__(self, model: torch.nn.Module, precision: str) -> None:
        self.module = model
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
        ordered = matrices + [parameter for parameter in trainable if parameter.ndim < 2]
        self.num_decaying = sum(parameter.numel() for parameter in matrices)
        self.weights = torch.cat([parameter.detach().float().reshape(-1) for parameter in ordered])
        self.gradient = torch.zeros_like(self.weights)
        self._computed, self._computed_gradient = self.weights, self.gradient
        if precision == "bf16":
            model.to(torch.bfloat16)
            self._computed, self._computed_gradient = self.weights.bfloat16(), self.gradient.bfloat16()
        place = 0
        for parameter in ordered:
            here = slice(place, place + parameter.numel())
            parameter.data = self._computed[here].view(parameter.shape)
            parameter.grad = self._computed_gradient[here].view(parameter.shape)
            place = here.stop

    @property
    def size(self) -> int:
        """P, the number of trainable weights."""
        return self.weights.numel()

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, trainable or not."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def fold(self) -> None:
        """Add what the last backward pass computed to `gradient` (in fp32 it went there by itself)."""
        if self._computed_gradient is not self.gradient:
            self.gradient += self._computed_gradient
            self._computed_gradient.zero_()

    def publish(self) -> None:
        """Let the model compute with `weights` as they are now."""
        if self._computed is not self.weights:
            self._computed.copy_(self.weights)

    def buffers(self) -> dict[str, torch.Tensor]:
        """The model's own buffers that belong to its state, by name."""
        kept = self.module.state_dict().keys()
        return {name: buffer for name, buffer in self.module.named_buffers() if name in kept}

    def full_state(self) -> dict[str, torch.Tensor]:
        """Copies of all weights and buffers on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}


class Replica:
    """What engines share whose every worker has a whole model: the worker's replica, as one vector."""

    is_whole = True

    def __init__(self, model: torch.nn.Module, precision: str) -> None:
        self._flat = FlatModel(model, precision)

    @property
    def model(self) -> torch.nn.Module:
        """This worker's replica."""
        return self._flat.module

    @property
    def module(self) -> torch.nn.Module:
        """This worker's replica."""
        return self._flat.module

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, trainable or not."""
        return self._flat.num_parameters

    def full_state(self) -> dict[str, torch.Tensor]:
        """Copies of the replica's weights on the CPU; within `published`, of what the gang would publish."""
        return self._flat.full_state()


class Shard:
    """A stretch of a flat model that starts at `start`, and the optimizer that moves it."""

    def __init__(self, weights: torch.Tensor, start: int, num_decaying: int, config: AdamW | SGD) -> None:
        """`weights`, shape (stop - start,), are moved in place."""
        self.weights, self.start = weights, start
        cut = min(max(num_decaying - start, 0), weights.numel())
        self._places = [place for place in (slice(0, cut), slice(cut, weights.numel())) if place.stop > place.start]
        self._pieces = [torch.nn.Parameter(weights[place]) for place in self._places]
        groups = [
            {"params": [piece], "weight_decay": config.weight_decay if place.stop <= cut else 0.0}
            for piece, place in zip(self._pieces, self._places, strict=True)
        ]
        # A server of a tiny model may own nothing at all.
        self._optimizer = torch_optimizer(groups, config) if groups else None
        self._peak = config.learning_rate

    def step(self, gradient: torch.Tensor, rate: float) -> None:
        """One optimizer step with `gradient`, shape (stop - start,), at `rate` times the peak learning rate."""
        if self._optimizer is None:
            return
        for piece, place in zip(self._pieces, self._places, strict=True):
            piece.grad = gradient[place]
        for group in self._optimizer.param_groups:
            group["lr"] = self._peak * rate
        self._optimizer.step()

    def moments(self) -> dict[str, torch.Tensor]:
        """The optimizer's state as vectors like `weights`, and counters as scalars; empty before the first step."""
        states = [self._state(piece) for piece in self._pieces]
        found: dict[str, torch.Tensor] = {}
        for name in states[0] if states else ():
            parts = [state[name] for state in states]
            found[name] = torch.cat(parts) if parts[0].ndim else parts[0].clone()
        return found

    def restore(self, moments: Mapping[str, torch.Tensor]) -> None:
        """Take what `moments` gave, cut to this stretch."""
        if self._optimizer is None:
            return
        for piece, place in zip(self._pieces, self._places, strict=True):
            self._optimizer.state[piece] = {
                name: (value[place] if value.ndim else value).clone() for name, value in moments.items()
            }

    def _state(self, piece: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        assert self._optimizer is not None
        return {name: v for name, v in self._optimizer.state[piece].items() if isinstance(v, torch.Tensor)}


@dataclass(frozen=True)
class Saved:
    """What one worker wrote: a stretch of the weights and of the optimizer's state, and the model's buffers."""

    step: int
    """Optimizer steps done."""
    start: int
    weights: torch.Tensor
    moments: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]

    def write(self, folder: Path, rank: int) -> None:
        """As `folder/worker-<rank>.pt`."""
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({name: getattr(self, name) for name in self.__dataclass_fields__}, folder / _name(rank))


def read_saved(folder: Path) -> list[Saved]:
    """What every worker wrote below `folder`, by rank. Tensors are mapped, not read, and are on the CPU.

    Raises:
        IntegrityError: there is nothing.
    """
    paths = sorted(folder.glob("worker-*.pt"))
    if not paths:
        raise IntegrityError(f"the checkpoint {folder} holds no worker's state", "start the run anew")
    return [Saved(**torch.load(path, map_location="cpu", mmap=True, weights_only=True)) for path in paths]


def joined(parts: Sequence[Saved], start: int, stop: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weights and moments of `start` to `stop`, from stretches that follow one another."""
    weights = torch.cat([part.weights for part in parts])[start:stop].clone()
    filled = [part.moments for part in parts if part.weights.numel()]
    moments: dict[str, torch.Tensor] = {}
    for name, first in filled[0].items():
        moments[name] = torch.cat([each[name] for each in filled])[start:stop].clone() if first.ndim else first.clone()
    return weights, moments


def averaged(parts: Sequence[Saved]) -> Saved:
    """The mean of whole replicas, element by element."""
    first = parts[0]
    return Saved(
        first.step,
        first.start,
        _mean([part.weights for part in parts]),
        {name: _mean([part.moments[name] for part in parts]) for name in first.moments},
        {name: _mean([part.buffers[name] for part in parts]) for name in first.buffers},
    )


def _mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
    if not values[0].is_floating_point():
        return values[0].clone()
    total = values[0].clone().float()
    for value in values[1:]:
        total += value
    return (total / len(values)).to(values[0].dtype)


def _name(rank: int) -> str:
    return f"worker-{rank:05d}.pt"


def restore_buffers(model: FlatModel, values: Mapping[str, Any]) -> None:
    """Put saved buffers back in place."""
    for name, buffer in model.buffers().items():
        buffer.copy_(values[name])
