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
from modelyard.tasks.distillation import Distillation, HiddenStates, hidden_difference, hidden_width
from modelyard.tasks.movement import Movement, learn_masks, masked_state
from modelyard.tasks.teachers import Teacher, scores_of, teacher_of, write

if TYPE_CHECKING:
    from torch import Tensor, device, nn

    from modelyard.data.dataset import DatasetInfo

_TOKENS, _TAGS, _IGNORED = "input_ids", "tags", -100
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
    movement: Movement | None = None
    """Layers whose weights are pruned while they are trained."""
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
        if distillation.teacher is None and not distillation.is_remote:
            raise ConfigError("distillation.teacher: required, but not given", "name a model, models:/...")
        if distillation.service is not None and distillation.service.application is None:
            raise ConfigError("distillation.service.application: required, but not given", "name the teacher's")
        if distillation.gateway is not None and info.format != "tokens":
            raise ConfigError(
                f"distillation.gateway tells the probabilities of tokens, the dataset holds {info.format}",
                "use service, or a teacher in the worker",
            )
        if (distillation.student_text or distillation.teacher_text) and info.format != "tokens":
            raise ConfigError(
                f"distillation: student_text and teacher_text are for language models, the dataset holds {info.format}"
            )

    def bases(self) -> tuple[str, ...]:
        names = [self.start, self._own_teacher() or ""]
        return tuple(dict.fromkeys(name for name in names if name.startswith("models:/")))

    def with_bases(self, folders: Mapping[str, Path]) -> Refined:
        local = {name: str(folder) for name, folder in folders.items()}
        changes: dict[str, Any] = {"start": local.get(self.start, self.start)}
        if self.distillation is not None and (teacher := self._own_teacher()) is not None:
            changes["distillation"] = {**self.distillation.model_dump(), "teacher": local.get(teacher, teacher)}
        return self.with_changes(**changes)

    def _own_teacher(self) -> str | None:
        """The teacher that each worker loads."""
        if self.distillation is None or self.distillation.is_remote:
            return None
        return self.distillation.teacher

    def build(self, info: DatasetInfo, dataset_folder: Path | None) -> nn.Module:
        from modelyard.tasks import load_model
        from modelyard.tasks.rounding import train_rounded

        model: Any = load_model(Path(self.start))[1].float()
        model.requires_grad_(True)
        if info.block_tokens is not None:
            model.row_tokens = info.block_tokens
        if self.keep_zeros:
            _keep_zeros(model)
        model.own_flops = self.task.flops_per_row(model)
        train_rounded(model, self.rounded)
        if self.movement is not None:
            learn_masks(model, self.movement)
        if self.distillation is not None:
            tokenizer = dataset_folder / info.tokenizer if dataset_folder is not None and info.tokenizer else None
            teacher = teacher_of(self.distillation, tokenizer)
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

    def begin_step(self, model: nn.Module, step: int, total: int) -> None:
        self.task.begin_step(model, step, total)
        if self.movement is not None:
            pruned: Any = model
            pruned.begin_step(step, total)

    def statistics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.task.statistics(model, batch)

    def row_statistics(self, folder: Path) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
        return self.task.row_statistics(folder)

    def metrics(self, stats: Mapping[str, np.ndarray]) -> dict[str, float]:
        return self.task.metrics(stats)

    def flops_per_row(self, model: nn.Module) -> float:
        """Those of the student alone, without what helps it to learn."""
        own: float | None = getattr(model, "own_flops", None)
        return self.task.flops_per_row(model) if own is None else own

    def save(
        self,
        model: nn.Module,
        folder: Path,
        dataset_folder: Path,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """A folder of the model's own task."""
        full = model.state_dict() if state is None else state
        own = {name: tensor for name, tensor in full.items() if not name.startswith(_PROJECTION)}
        if self.movement is not None:
            own = masked_state(own, self.movement)
        self.task.save(model, folder, dataset_folder, own)

    def load(self, folder: Path, info: DatasetInfo) -> nn.Module:
        return self.task.load(folder, info)

    def predict(self, model: nn.Module, inputs: Sequence[Any], **options: Any) -> list[Any]:
        return self.task.predict(model, inputs, **options)

    def enable_activation_checkpointing(self, model: nn.Module) -> None:
        self.task.enable_activation_checkpointing(model)


class _Lesson:
    """A student and its teacher on one worker."""

    def __init__(self, student: nn.Module, teacher: Teacher, config: Distillation) -> None:
        from torch import nn

        from modelyard.tasks.teachers import LocalTeacher

        self._config = config
        self._teacher = teacher
        if not config.hidden:
            return
        assert isinstance(teacher, LocalTeacher)
        self._student_states = HiddenStates(student)
        widths = hidden_width(student), hidden_width(teacher.model)
        if widths[0] != widths[1]:
            student.add_module(_PROJECTION, nn.Linear(*widths, bias=False))

    def loss(self, task: Task, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Loss of each row (B,): the task's own, the divergence, and the hidden states' difference."""
        config = self._config
        batch, writer, begin = self._written(getattr(model, "module", model), batch)
        heard = _Recorder(model)
        own_b = task.loss(heard, batch)  # type: ignore[arg-type]
        weight = 1.0 if writer == "student" else config.weight
        loss_b = (1 - weight) * own_b
        if weight or config.hidden:
            judged = _judged(task, batch, begin)
            loss_b = loss_b + weight * self._teacher.judge(heard.scores, heard.inputs, heard.options, judged)
        if config.hidden:
            project = getattr(getattr(model, "module", model), _PROJECTION, None)
            loss_b = loss_b + config.hidden * hidden_difference(
                self._student_states.states, self._teacher.states, project
            )
        return loss_b

    def _written(
        self, student: Any, batch: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], Literal["data", "student", "teacher"], int]:
        """The batch, its second half perhaps written by the student or the teacher; and where the lesson begins."""
        import torch

        config = self._config
        if not (config.student_text or config.teacher_text):
            return batch, "data", 0
        draw = float(torch.rand(()))  # seeded by step and worker
        if draw >= config.student_text + config.teacher_text:
            return batch, "data", 0
        tokens_BT = batch[_TOKENS]
        half = tokens_BT.shape[1] // 2
        prompt_BT, tokens = tokens_BT[:, :half], tokens_BT.shape[1] - half
        if draw < config.student_text:
            return {**batch, _TOKENS: write(student, prompt_BT, tokens)}, "student", half - 1
        return {**batch, _TOKENS: self._teacher.write(prompt_BT, tokens)}, "teacher", half - 1


def _judged(task: Task, batch: Mapping[str, Tensor], begin: int) -> Tensor | None:
    """The places (B, T) of texts whose scores are compared, bool; None where a row has one answer."""
    import torch

    if task.kind == "token_classification":
        return batch[_TAGS] != _IGNORED
    if task.kind != "causal_lm":
        return None
    judged_BT = torch.zeros_like(batch[_TOKENS], dtype=torch.bool)
    judged_BT[:, begin:-1] = True  # no data judges what follows the last token
    return judged_BT


class _Recorder:
    """A model that remembers what it was asked and answered; the task's loss may use up its copy of the scores."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.inputs: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        self.inputs, self.options = inputs, options
        output = self._model(*inputs, **options)
        self.scores = scores_of(output)
        if hasattr(output, "logits"):
            output.logits = output.logits.clone()
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _keep_zeros(model: nn.Module) -> None:
    """Drop the gradients of weights that are zero now; Adam and weight decay then leave them there."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            mask = parameter.detach() != 0
            if not bool(mask.all()):
                leaf: Any = parameter
                leaf.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient.device))
