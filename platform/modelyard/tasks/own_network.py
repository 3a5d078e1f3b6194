"""What tasks share whose network is built from their own fields: one safetensors file, loaded by building anew."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelyard.errors import InputError, IntegrityError
from modelyard.tasks import saving
from modelyard.tasks.base import Task
from modelyard.tasks.compact import load_compact, read_compact

if TYPE_CHECKING:
    from torch import Tensor, nn

    from modelyard.data.dataset import DatasetInfo

WEIGHTS = "model.safetensors"


class OwnNetwork(Task, ABC):
    """A task whose `build` makes the same network from the same fields and dataset description."""

    def save(
        self,
        model: nn.Module,
        folder: Path,
        dataset_folder: Path,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        weights = model.state_dict() if state is None else state
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
        saving.write_task(folder, self, saving.read_info(dataset_folder))

    def load(self, folder: Path, info: DatasetInfo) -> nn.Module:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        saving.require_safe_weights(folder)
        model = self.build(info, None)
        if (compact := read_compact(folder)) is not None:
            return load_compact(model, folder, compact).eval()
        try:
            model.load_state_dict(load_file(folder / WEIGHTS), strict=True)
        except (SafetensorError, RuntimeError, OSError) as error:
            raise IntegrityError(f"{str(folder / WEIGHTS)!r} does not hold this model: {error}") from error
        return model.eval()


@contextmanager
def answering(model: nn.Module) -> Iterator[Any]:
    """Eval mode without gradients; yields the device of the weights, and puts the mode back."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(training)


def plain_module(model: nn.Module) -> Any:
    """The network itself, when `model` is an engine around it."""
    return getattr(model, "module", model)


def matrix_weights(model: nn.Module, without: str = "") -> int:
    """Numbers in the matrices of a network; those with `without` in their name, if given, do not count."""
    shapes = [
        getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty stand-in
        for name, parameter in model.named_parameters()
        if not without or without not in name
    ]
    return sum(math.prod(shape) for shape in shapes if len(shape) == 2)


def refuse_options(kind: str, options: Mapping[str, Any]) -> None:
    """For tasks whose `predict` takes no options.

    Raises:
        InputError: there are some.
    """
    if options:
        raise InputError(f"{kind} has no option {sorted(options)[0]!r}", "it takes none")


def plain(value: Any) -> Any:
    """An input as Python values: an array of any shape becomes what `tolist` makes of it."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def numbers(value: Any, count: int, what: str) -> np.ndarray:
    """An input as `count` finite numbers, float32 (count,).

    Raises:
        InputError: it is something else.
    """
    try:
        array = np.asarray(plain(value), dtype=np.float32)
    except (TypeError, ValueError):
        raise InputError(f"an input is no list of numbers: {str(value)[:80]!r}", f"give {count} {what}") from None
    array = array.reshape(1) if array.ndim == 0 else array
    if array.shape != (count,):
        raise InputError(f"an input has the shape {array.shape}, the model takes ({count},)", f"give {count} {what}")
    if not np.isfinite(array).all():
        raise InputError("an input holds a number that is not finite", f"give {count} {what}")
    return array
