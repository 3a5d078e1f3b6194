"""What a student learns from a teacher: its distribution over answers, and its hidden states.

Hinton et al. 2015 (temperature); Gu et al. 2024, "MiniLLM" (reverse KL); Agarwal et al. 2024, "GKD" (on-policy text).
Letters in shapes: B rows, T tokens, C classes or vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from modelyard.config import Config

if TYPE_CHECKING:
    from torch import Tensor, nn


class Distillation(Config):
    """How a student learns from a teacher."""

    teacher: str | None = None
    """Reference or folder of the teacher; a recipe takes the model it was given when this is None."""
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl"
    """`forward_kl` covers all that the teacher would say; `reverse_kl` keeps to what it would most likely say."""
    temperature: float = Field(default=1.0, gt=0)
    """Both distributions are softened by it, and the loss scaled by its square."""
    weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the divergence in the loss; the rest is the task's own loss on the labels."""
    hidden: float = Field(default=0.0, ge=0)
    """Weight of the difference between hidden states, in variances of the teacher's."""
    student_text: float = Field(default=0.0, ge=0, le=1)
    """Language models: share of the batches whose second half the student writes itself (on-policy, GKD)."""
    teacher_text: float = Field(default=0.0, ge=0, le=1)
    """Language models: share of the batches whose second half the teacher writes (sequence level)."""

    @model_validator(mode="after")
    def _shares_fit(self) -> Distillation:
        if self.student_text + self.teacher_text > 1:
            raise ValueError(f"student_text + teacher_text is {self.student_text + self.teacher_text:g}, above 1")
        return self


def divergence(student: Tensor, teacher: Tensor, config: Distillation) -> Tensor:
    """Divergence of each distribution in nats, times temperature squared: scores (..., C) twice -> (...)."""
    import torch
    from torch.nn import functional

    temperature = config.temperature
    p = functional.log_softmax(teacher.float() / temperature, dim=-1)
    q = functional.log_softmax(student.float() / temperature, dim=-1)
    if config.divergence == "forward_kl":
        each = _kl(p, q)
    elif config.divergence == "reverse_kl":
        each = _kl(q, p)
    else:
        middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
        each = (_kl(p, middle) + _kl(q, middle)) / 2
    return each * temperature**2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) over the last axis of two log-probabilities."""
    return (p.exp() * (p - q)).sum(dim=-1)


class HiddenStates:
    """Keeps the last hidden states of a model as it runs.

    Decoders: the output of every layer. Other models: what goes into their last linear layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.states: list[Tensor] = []
        layers = decoder_layers(model)
        for index, layer in enumerate(layers):
            layer.register_forward_hook(self._after(index))
        if not layers:
            last_linear(model).register_forward_pre_hook(self._before)

    def _after(self, index: int) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            self.states = [*self.states[:index], output[0] if isinstance(output, tuple) else output]

        return hook

    def _before(self, _module: Any, inputs: Any) -> None:
        self.states = [inputs[0]]


def hidden_difference(student: list[Tensor], teacher: list[Tensor], project: nn.Module | None) -> Tensor:
    """Mean squared difference per row (B,), in variances of the teacher's states.

    A student of fewer layers is compared with evenly spaced layers of the teacher, the last with the last.
    """
    total = None
    for index, state in enumerate(student):
        aim = teacher[(index + 1) * len(teacher) // len(student) - 1].detach().float()
        state = state.float() if project is None else project(state.float())
        error = (state - aim).square().flatten(1).mean(dim=1) / aim.var().clamp_min(1e-6)
        total = error if total is None else total + error
    assert total is not None
    return total / len(student)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a language model in order; none of another model."""
    inner: Any = model
    found = getattr(getattr(inner, "model", None), "layers", None)
    return list(found) if found is not None else []


def last_linear(model: nn.Module) -> nn.Module:
    """The linear layer that comes last in the model."""
    from torch import nn

    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def hidden_width(model: nn.Module) -> int:
    """H of the states that `HiddenStates` keeps."""
    inner: Any = model
    if decoder_layers(model):
        return int(inner.config.hidden_size)
    linear: Any = last_linear(model)
    return int(linear.in_features)
