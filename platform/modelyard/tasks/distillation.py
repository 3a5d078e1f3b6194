"""What a student learns from a teacher, and where the teacher runs: its distribution over answers, its hidden states.

Hinton et al. 2015 (temperature); Gu et al. 2024, "MiniLLM" (reverse KL); Agarwal et al. 2024, "GKD" (on-policy text).
Letters in shapes: B rows, T tokens, C classes or vocabulary, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from modelyard.config import Config

if TYPE_CHECKING:
    from torch import Tensor, nn


class TeacherService(Config):
    """A teacher as a Ray Serve deployment: on a pool of its own, one for all workers."""

    application: str | None = None
    """One that runs already; by default a recipe starts one for its teacher and takes it down again."""
    pool: str | None = None
    """Value of the node label `modelyard/pool`; None takes any node."""
    replicas: int = Field(default=1, gt=0)
    cpus: float = Field(default=1.0, gt=0)
    """Per replica; also its threads."""
    gpus: float = Field(default=0.0, ge=0)
    top: int = Field(default=64, gt=0)
    """How many of its likeliest answers it tells; all others count as one."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Longest wait for an answer."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """Longest wait for the deployment to run."""


class TeacherGateway(Config):
    """A teacher behind Modelyard's gateway, or another server of OpenAI's completions that takes token ids.

    It tells the log probabilities of few tokens, at one place of a text for each prompt. So the student is judged at
    some places of each text, and everything but those tokens counts as one answer.
    """

    url: str = Field(pattern=r"^https?://")
    """Of the gateway, e.g. `https://models.example.com`."""
    model: str = Field(min_length=1)
    """What callers write into `model`."""
    key_variable: str = "MODELYARD_API_KEY"
    """Environment variable, on every worker, that holds the API key."""
    top: int = Field(default=5, gt=0, le=5)
    """Tokens whose log probabilities are asked for."""
    places: int = Field(default=8, gt=0)
    """Places of each text that are judged, drawn anew each time."""
    prompts: int = Field(default=16, gt=0)
    """Prompts in one call."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Longest wait for an answer."""


class Distillation(Config):
    """How a student learns from a teacher."""

    teacher: str | None = None
    """Reference or folder of the teacher; a recipe takes the model it was given when this is None."""
    service: TeacherService | None = None
    """Where the teacher runs, if not beside the student in each worker."""
    gateway: TeacherGateway | None = None
    """Or whom to ask instead of a teacher of one's own."""
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl"
    """`forward_kl` covers all that the teacher would say; `reverse_kl` keeps to what it would most likely say."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of `jensen_shannon` (Agarwal et al. 2024): near 0 as forward, near 1 as
    reverse KL."""
    temperature: float = Field(default=1.0, gt=0)
    """Both distributions are softened by it, and the loss scaled by its square."""
    weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the divergence in the loss; the rest is the task's own loss on the labels."""
    hidden: float = Field(default=0.0, ge=0)
    """Weight of the difference between hidden states, in variances of the teacher's."""
    student_text: float = Field(default=0.0, ge=0, le=1)
    """Language models: share of the batches whose second half the student writes itself (on-policy, GKD). There the
    divergence alone counts: the student's own words are no labels."""
    teacher_text: float = Field(default=0.0, ge=0, le=1)
    """Language models: share of the batches whose second half the teacher writes. With `weight: 0` the student learns
    from these words alone (sequence level, Kim and Rush 2016)."""

    @property
    def is_remote(self) -> bool:
        """Whether the teacher runs elsewhere."""
        return self.service is not None or self.gateway is not None

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.student_text + self.teacher_text > 1:
            raise ValueError(f"student_text + teacher_text is {self.student_text + self.teacher_text:g}, above 1")
        if self.service is not None and self.gateway is not None:
            raise ValueError("service and gateway are two places for the teacher: give one")
        if self.is_remote and self.hidden:
            raise ValueError(
                "hidden states stay with a teacher in the worker: leave out hidden, or service and gateway"
            )
        if self.gateway is not None and self.temperature != 1:
            raise ValueError("a gateway tells log probabilities at temperature 1 only: leave temperature out")
        if self.gateway is not None and self.teacher is not None:
            raise ValueError("gateway.model names the teacher: leave out teacher")
        if self.gateway is not None and self.teacher_text:
            raise ValueError("a gateway gives text and not its tokens: leave out teacher_text, or use service")
        return self


class Likely(NamedTuple):
    """What is known of a distribution: its likeliest answers. The rest of the probability lies on all others."""

    ids: Tensor
    """int64 (..., k)"""
    logs: Tensor
    """Their log probabilities in nats, fp32 (..., k); -inf where there are fewer than k."""


def likely(scores: Tensor, top: int, temperature: float) -> Likely:
    """The `top` likeliest answers of softened scores (..., C)."""
    import torch

    logs = torch.log_softmax(scores.float() / temperature, dim=-1)
    best = logs.topk(min(top, logs.shape[-1]), dim=-1)
    return Likely(best.indices, best.values)


def divergence(student: Tensor, teacher: Tensor | Likely, config: Distillation) -> Tensor:
    """Divergence of each distribution in nats, times temperature squared: scores (..., C) -> (...).

    Of a teacher whose likeliest answers alone are known, it is that of the distributions over these and "any other":
    never more than the whole.
    """
    from torch.nn import functional

    temperature = config.temperature
    q = functional.log_softmax(student.float() / temperature, dim=-1)
    if isinstance(teacher, Likely):
        p, q = _with_rest(teacher.logs, is_whole=teacher.logs.shape[-1] == q.shape[-1]), _gathered(q, teacher)
    else:
        p = functional.log_softmax(teacher.float() / temperature, dim=-1)
    if config.divergence == "forward_kl":
        each = _kl(p, q)
    elif config.divergence == "reverse_kl":
        each = _kl(q, p)
    else:
        each = _jensen_shannon(p, q, config.beta)
    return each * temperature**2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) over the last axis of two log-probabilities."""
    return (p.exp() * (p - q)).sum(dim=-1)


def _jensen_shannon(p: Tensor, q: Tensor, beta: float) -> Tensor:
    import torch

    middle = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
    return beta * _kl(p, middle) + (1 - beta) * _kl(q, middle)


_LEAST = -30.0
"""Log probability of what is left when next to nothing is: keeps divergences finite."""


def _with_rest(logs: Tensor, *, is_whole: bool) -> Tensor:
    """Log probabilities (..., k) and, unless they are all, that of the rest: (..., k + 1)."""
    import torch

    if is_whole:
        return logs
    known = logs.exp().sum(dim=-1, keepdim=True).clamp(max=1.0)
    rest = torch.log1p(-known.clamp(max=1 - 1e-6))
    return torch.cat([logs, rest], dim=-1).clamp_min(_LEAST)


def _gathered(q: Tensor, teacher: Likely) -> Tensor:
    """The student's log probabilities of the answers that the teacher tells, and of all others."""
    known = q.gather(-1, teacher.ids).masked_fill(teacher.logs.isinf(), float("-inf"))
    return _with_rest(known, is_whole=teacher.ids.shape[-1] == q.shape[-1])


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
