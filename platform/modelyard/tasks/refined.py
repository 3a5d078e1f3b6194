"""Go on training a model that exists, whatever its task: after pruning, under rounding, or with a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, SerializeAsAny, TypeAdapter, field_validator

from modelyard.errors import ConfigError
from modelyard.tasks.base import Objective, Task
from modelyard.tasks.compact import StoredLayer
from modelyard.tasks.distillation import (
    Distillation,
    HiddenStates,
    divergence,
    hidden_difference,
    hidden_width,
)

if TYPE_CHECKING:
    from torch import Tensor, device, nn

    from modelyard.data.dataset import DatasetInfo

_TOKENS = "input_ids"
_PROJECTION = "distillation_projection"


class Refined(Task):
    """The task of the model at `start`, which is trained further; what is saved is a model of that task."""

    kind: Literal["refined"] = "refined"
    task: SerializeAsAny[Task]
    """The model's own task."""
    start: str = Field(min_length=1)
    """Reference or folder of the model to go on from, shapes and all."""
    keep_zeros: bool = False
    """Weights that are exactly zero at the start stay zero."""
    rounded: dict[str, StoredLayer] = {}
    """Layers that compute with rounded weights while they are trained, and how."""
    distillation: Distillation | None = None

    @field_validator("task", mode="before")
    @classmethod
    def _by_kind(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        from modelyard.tasks import TaskConfig

        return TypeAdapter[Any](TaskConfig).validate_python(value)

    @property
    def objective(self) -> Objective:
        return self.task.objective

    def check(self, info: DatasetInfo) -> None:
        distillation = self.distillation
        if distillation is None:
            return
        if distillation.teacher is None:
            raise ConfigError("distillation.teacher: required, but not given", "name a model, models:/...")
        if (distillation.student_text or distillation.teacher_text) and info.format != "tokens":
            raise ConfigError(
                f"distillation: student_text and teacher_text are for language models, the dataset holds {info.format}"
            )

    def bases(self) -> tuple[str, ...]:
        names = [self.start, (self.distillation and self.distillation.teacher) or ""]
        return tuple(dict.fromkeys(name for name in names if name.startswith("models:/")))

    def with_bases(self, folders: Mapping[str, Path]) -> Refined:
        local = {name: str(folder) for name, folder in folders.items()}
        changes: dict[str, Any] = {"start": local.get(self.start, self.start)}
        if self.distillation is not None and self.distillation.teacher is not None:
            teacher = self.distillation.teacher
            changes["distillation"] = {**self.distillation.model_dump(), "teacher": local.get(teacher, teacher)}
        return self.with_changes(**changes)

    def build(self, info: DatasetInfo, dataset_folder: Path | None) -> nn.Module:
        from modelyard.tasks import load_model
        from modelyard.tasks.rounding import train_rounded

        model: Any = load_model(Path(self.start))[1].float()
        model.requires_grad_(True)
        if info.block_tokens is not None:
            model.row_tokens = info.block_tokens
        if self.keep_zeros:
            _keep_zeros(model)
        train_rounded(model, self.rounded)
        if self.distillation is not None:
            assert self.distillation.teacher is not None
            teacher = load_model(Path(self.distillation.teacher))[1].float().eval().requires_grad_(False)
            object.__setattr__(model, "lesson", _Lesson(model, teacher, self.distillation))  # not a part of the model
        result: nn.Module = model
        return result

    def collate(self, rows: Mapping[str, np.ndarray], device: device | str) -> dict[str, Tensor]:
        return self.task.collate(rows, device)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if self.distillation is None:
            return self.task.loss(model, batch)
        lesson: _Lesson = getattr(model, "module", model).__dict__["lesson"]
        return lesson.loss(self.task, model, batch)

    def statistics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.task.statistics(model, batch)

    def row_statistics(self, folder: Path) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
        return self.task.row_statistics(folder)

    def metrics(self, stats: Mapping[str, np.ndarray]) -> dict[str, float]:
        return self.task.metrics(stats)

    def flops_per_row(self, model: nn.Module) -> float:
        """Those of the student alone."""
        return self.task.flops_per_row(model)

    def save(
        self,
        model: nn.Module,
        folder: Path,
        dataset_folder: Path,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """A folder of the model's own task."""
        full = model.state_dict() if state is None else state
        self.task.save(
            model, folder, dataset_folder, {name: t for name, t in full.items() if not name.startswith(_PROJECTION)}
        )

    def load(self, folder: Path, info: DatasetInfo) -> nn.Module:
        return self.task.load(folder, info)

    def predict(self, model: nn.Module, inputs: Sequence[Any], **options: Any) -> list[Any]:
        return self.task.predict(model, inputs, **options)

    def enable_activation_checkpointing(self, model: nn.Module) -> None:
        self.task.enable_activation_checkpointing(model)


class _Lesson:
    """A teacher beside the student on one worker."""

    def __init__(self, student: nn.Module, teacher: nn.Module, config: Distillation) -> None:
        from torch import nn

        self._config = config
        self._teacher = teacher
        if not config.hidden:
            return
        self._student_states, self._teacher_states = HiddenStates(student), HiddenStates(teacher)
        widths = hidden_width(student), hidden_width(teacher)
        if widths[0] != widths[1]:
            student.add_module(_PROJECTION, nn.Linear(*widths, bias=False))

    def loss(self, task: Task, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Loss of each row (B,): the task's own, the divergence, and the hidden states' difference."""
        import torch

        config = self._config
        tokens = next(iter(batch.values()))
        self._teacher.to(tokens.device)
        batch, begin = self._written(getattr(model, "module", model), batch)
        heard = _Recorder(model)
        own_b = task.loss(heard, batch)  # type: ignore[arg-type]
        with torch.no_grad():
            aim = _scores(self._teacher(*heard.inputs, **heard.options))
        each = divergence(_until_last(heard.scores, batch), _until_last(aim, batch), config)
        if each.ndim == 2:
            each = each[:, begin:].mean(dim=1)
        loss_b = config.weight * each + (1 - config.weight) * own_b
        if config.hidden:
            project = getattr(getattr(model, "module", model), _PROJECTION, None)
            loss_b = loss_b + config.hidden * hidden_difference(
                self._student_states.states, self._teacher_states.states, project
            )
        return loss_b

    def _written(self, student: Any, batch: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], int]:
        """The batch, its second half perhaps written by the student or the teacher; and where the lesson begins."""
        import torch

        config = self._config
        draw = float(torch.rand(()))  # seeded by step and worker
        if _TOKENS not in batch or draw >= config.student_text + config.teacher_text:
            return batch, 0
        writer: Any = student if draw < config.student_text else self._teacher
        tokens_BT = batch[_TOKENS]
        half = tokens_BT.shape[1] // 2
        training = writer.training
        writer.eval()
        with torch.no_grad():
            prompt = tokens_BT[:, :half]
            written = writer.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens_BT.shape[1] - half,
                min_new_tokens=tokens_BT.shape[1] - half,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                pad_token_id=0,
            )
        writer.train(training)
        return {**batch, _TOKENS: written}, half - 1


class _Recorder:
    """A model that remembers what it was asked and answered; the task's loss may use up its copy of the scores."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.inputs: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        self.inputs, self.options = inputs, options
        output = self._model(*inputs, **options)
        self.scores = _scores(output)
        if hasattr(output, "logits"):
            output.logits = output.logits.clone()
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _scores(output: Any) -> Tensor:
    scores: Tensor = output.logits if hasattr(output, "logits") else output
    return scores


def _until_last(scores: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Without the last token's scores (B, T, C) of a text, which no data judges."""
    return scores[:, :-1] if scores.ndim == 3 and _TOKENS in batch else scores


def _keep_zeros(model: nn.Module) -> None:
    """Drop the gradients of weights that are zero now; Adam and weight decay then leave them there."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            mask = parameter.detach() != 0
            if not bool(mask.all()):
                leaf: Any = parameter
                leaf.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient.device))
