"""Which weights may go is learned with the weights themselves: movement pruning (Sanh et al. 2020).

Each pruned weight W has a score S. The layer computes with W * M, where M keeps the largest scores; the gradient of S
is that of the layer's weight times W, as if M were S (straight-through). So a score falls while training moves its
weight towards zero, and a weight that was left out comes back when its score rises again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from modelyard.config import Config
from modelyard.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

Pattern = Literal["unstructured", "2:4"]
SCORES = "movement_scores"


class Movement(Config):
    """Which layers lose how many weights while they are trained."""

    layers: tuple[str, ...] = Field(min_length=1)
    """Linear and convolution layers by name."""
    sparsity: float = Field(gt=0, lt=1)
    """Share of zeros in each layer at the end."""
    pattern: Pattern = "unstructured"
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps before the first weight goes."""
    cooldown: float = Field(default=0.3, ge=0, lt=1)
    """Share of the steps after the last one went."""

    @model_validator(mode="after")
    def _room(self) -> Movement:
        if self.warmup + self.cooldown >= 1:
            raise ValueError(f"warmup + cooldown is {self.warmup + self.cooldown:g}: no step is left to prune in")
        return self

    def sparsity_at(self, step: int, total: int) -> float:
        """Share of zeros in optimizer step `step` (from 0) of `total`: cubic in between (Zhu and Gupta 2017). Pure."""
        done = (step / total - self.warmup) / (1 - self.warmup - self.cooldown)
        return self.sparsity * (1 - (1 - min(max(done, 0.0), 1.0)) ** 3)


def learn_masks(model: nn.Module, movement: Movement) -> None:
    """Give the named layers scores, and the model a method `begin_step(step, total)`.

    Until its first call the layers compute with all of their weights.
    """
    learner = _Learner(model, movement)
    object.__setattr__(model, "begin_step", learner.begin_step)


def masked_state(state: Mapping[str, Tensor], movement: Movement) -> dict[str, Tensor]:
    """A state dict without scores, and with zeros where they are lowest."""
    plain = dict(state)
    for name in movement.layers:
        weight, scores = plain[f"{name}.weight"], plain.pop(f"{name}.{SCORES}")
        keep = keep_mask(scores.float().flatten(1), movement.sparsity, movement.pattern)
        plain[f"{name}.weight"] = weight * keep.view_as(weight)
    return plain


def keep_mask(worth: Tensor, sparsity: float, pattern: Pattern = "unstructured", *, per_row: bool = False) -> Tensor:
    """Which weights (out, in) stay, as bool: all but the share of least worth, of the matrix, of each row or of each 4.

    Raises:
        ConfigError: a row is no multiple of four and the pattern is 2:4.
    """
    import torch

    rows, columns = worth.shape
    if pattern == "2:4":
        if columns % 4:
            raise ConfigError(f"pattern 2:4: a row of {columns} weights is no multiple of 4", "add the layer to skip")
        fours = worth.reshape(rows, -1, 4)
        keep = torch.zeros_like(fours, dtype=torch.bool).scatter_(2, fours.topk(2, dim=2).indices, True)
        return keep.reshape(rows, columns)
    flat = worth if per_row else worth.reshape(1, -1)
    count = round(flat.shape[1] * sparsity)
    drop = flat.topk(count, dim=1, largest=False).indices
    return torch.ones_like(flat, dtype=torch.bool).scatter_(1, drop, False).reshape(rows, columns)


class _Learner:
    """The masks of one model on one worker: the same on all, for they follow from the scores alone."""

    def __init__(self, model: nn.Module, movement: Movement) -> None:
        import torch

        self._model = model
        self._movement = movement
        self._masks: dict[str, Tensor] = {}
        for name in movement.layers:
            module: Any = model.get_submodule(name)
            module.register_parameter(SCORES, torch.nn.Parameter(torch.zeros_like(module.weight)))
            module.forward = self._forward(name, module)

    def begin_step(self, step: int, total: int) -> None:
        """Choose anew which weights count."""
        sparsity = self._movement.sparsity_at(step, total)
        pattern = self._movement.pattern
        for name, module in self._layers():
            if sparsity == 0:
                self._masks.pop(name, None)
                continue
            scores = getattr(module, SCORES).detach().float().flatten(1)
            # 2:4 has no steps in between: it comes when half of the way is done
            early = pattern == "2:4" and sparsity < self._movement.sparsity / 2
            keep = keep_mask(scores, sparsity, "unstructured" if early else pattern)
            self._masks[name] = keep.view_as(module.weight).to(module.weight.dtype)

    def _layers(self) -> Iterator[tuple[str, Any]]:
        for name in self._movement.layers:
            yield name, self._model.get_submodule(name)

    def _forward(self, name: str, module: Any) -> Any:
        import torch
        from torch.nn import functional

        masked = _straight_through()

        def forward(x: Tensor) -> Tensor:
            mask = self._masks.get(name)
            weight = masked(module.weight, getattr(module, SCORES), mask)
            if isinstance(module, torch.nn.Conv2d):
                convolved: Tensor = module._conv_forward(x, weight, module.bias)
                return convolved
            return functional.linear(x, weight, module.bias)

        return forward


@cache
def _straight_through() -> Any:
    import torch

    class Masked(torch.autograd.Function):
        """weight * mask, whose gradient reaches the scores as if they were the mask."""

        @staticmethod
        def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor | None) -> Tensor:
            ctx.save_for_backward(weight, mask)
            return weight.clone() if mask is None else weight * mask

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
            weight, mask = ctx.saved_tensors
            return gradient if mask is None else gradient * mask, gradient * weight, None

    return Masked.apply
