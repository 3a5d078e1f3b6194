"""Tasks: what a model is for. One file per task; everything else knows only `Task`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

from pydantic import Field, TypeAdapter, ValidationError

from modelyard.errors import IntegrityError
from modelyard.tasks import saving
from modelyard.tasks.base import Objective, Task, Uploads
from modelyard.tasks.causal_lm import CausalLM
from modelyard.tasks.forecasting import Forecasting
from modelyard.tasks.image_classification import ImageClassification
from modelyard.tasks.object_detection import ObjectDetection
from modelyard.tasks.recommendation import Recommendation
from modelyard.tasks.refined import Refined
from modelyard.tasks.regression import Regression
from modelyard.tasks.semantic_segmentation import SemanticSegmentation
from modelyard.tasks.speech_recognition import SpeechRecognition
from modelyard.tasks.text_classification import TextClassification
from modelyard.tasks.token_classification import TokenClassification

if TYPE_CHECKING:
    from torch import nn

    from modelyard.data.dataset import DatasetInfo

__all__ = [
    "CausalLM",
    "Forecasting",
    "ImageClassification",
    "ObjectDetection",
    "Objective",
    "Recommendation",
    "Refined",
    "Regression",
    "SemanticSegmentation",
    "SpeechRecognition",
    "Task",
    "TaskConfig",
    "TextClassification",
    "TokenClassification",
    "load_model",
    "read_task",
    "uploads_of",
]

AnyTask = (
    CausalLM
    | Forecasting
    | ImageClassification
    | ObjectDetection
    | Recommendation
    | Refined
    | Regression
    | SemanticSegmentation
    | SpeechRecognition
    | TextClassification
    | TokenClassification
)
_UPLOADS: dict[str, Uploads] = {task.model_fields["kind"].default: task.uploads for task in get_args(AnyTask)}
TaskConfig = Annotated[AnyTask, Field(discriminator="kind")]
"""The type of a config's `task` field: `kind` chooses the task."""


def uploads_of(kind: str) -> Uploads:
    """What callers may send to a model of the task `kind` as files."""
    return _UPLOADS.get(kind, "none")


def read_task(folder: Path) -> tuple[Task, DatasetInfo]:
    """The task a model folder was trained for, and what is known of its dataset; loads no weights.

    Raises:
        NotFoundError: the folder was not written by training.
        IntegrityError: its `task.json` is damaged.
    """
    from modelyard.data.dataset import DatasetInfo

    record = saving.read_task(folder)
    try:
        task: Task = TypeAdapter[AnyTask](TaskConfig).validate_python(record["task"])
        return task, DatasetInfo.model_validate(record.get("dataset"))
    except ValidationError as error:
        raise IntegrityError(f"{str(folder / saving.TASK_FILE)!r} is damaged: {error}") from error


def load_model(folder: Path) -> tuple[Task, nn.Module]:
    """The task and the model, on the CPU in eval mode, of a folder that training wrote. Reads no pickle.

    Raises:
        NotFoundError: the folder was not written by training, or has no weights.
        IntegrityError: a file in it is damaged.
        UnsafeFileError: its weights are pickles.
    """
    folder = Path(folder)
    task, info = read_task(folder)
    return task, task.load(folder, info)
