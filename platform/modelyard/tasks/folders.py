"""What tasks share whose model is one of transformers: built from sizes or a folder, saved as a Hugging Face folder."""

from __future__ import annotations

import re
from abc import ABC
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from modelyard.errors import ConfigError, DataError, IntegrityError
from modelyard.tasks import saving
from modelyard.tasks.base import Task
from modelyard.tasks.compact import Compact, load_compact, read_compact
from modelyard.tasks.language_models import PretrainedModel, quiet_progress, read_config

if TYPE_CHECKING:
    from torch import Tensor, nn

    from modelyard.data.dataset import DatasetInfo

_LAYER = re.compile(r"\.(layers?|blocks?|block|stages)\.\d+\.")


class FolderTask(Task, ABC):
    """A task whose `model` is built from sizes, or goes on from a folder (`pretrained: FOLDER`)."""

    model: Any

    auto_class: ClassVar[str]
    """Name of the class in transformers that puts the head on."""
    attention: ClassVar[str | None] = None
    """Which implementation of attention is asked for; None: the model's own choice."""

    def bases(self) -> tuple[str, ...]:
        name = self.model.pretrained if isinstance(self.model, PretrainedModel) else ""
        return (name,) if name.startswith("models:/") else ()

    def with_bases(self, folders: Mapping[str, Path]) -> Task:
        changed = {name: self.with_changes(model={"pretrained": str(folders[name])}) for name in self.bases()}
        return next(iter(changed.values()), self)

    def _from_folder(self, folder: Path, **options: Any) -> nn.Module:
        """The folder's model in fp32; with `options` its head may be new, but the layers must be there.

        Raises:
            IntegrityError: weights are damaged or missing.
            ConfigError: it needs a package that is not installed.
        """
        import torch
        import transformers
        from safetensors import SafetensorError

        saving.require_safe_weights(folder)
        if self.attention is not None:
            options |= {"attn_implementation": self.attention}
        new_head = bool(options.get("id2label") or options.get("vocab_size"))
        try:
            with quiet_progress(), quiet_report():
                model, report = getattr(transformers, self.auto_class).from_pretrained(
                    folder,
                    local_files_only=True,
                    use_safetensors=True,
                    dtype=torch.float32,
                    output_loading_info=True,
                    **options,
                )
        except ImportError as error:
            raise ConfigError(f"task.model.pretrained: {str(folder)!r} needs a further package: {error}") from error
        except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
            raise IntegrityError(f"the model in {str(folder)!r} cannot be loaded: {error}") from error
        new = [*map(str, report["missing_keys"]), *(str(key[0]) for key in report["mismatched_keys"])]
        missing = sorted(name for name in new if _LAYER.search(name) or not new_head)
        if missing:
            raise IntegrityError(
                f"{str(folder)!r} lacks {len(missing)} of the weights its config.json asks for, e.g. {missing[0]!r}",
                "a part of it would start from random numbers; fetch the folder again",
            )
        built: nn.Module = model
        return built

    def _from_compact(self, folder: Path, compact: Compact) -> nn.Module:
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # for other readers of the same files
        options = {} if self.attention is None else {"attn_implementation": self.attention}
        with quiet_progress():
            model = getattr(transformers, self.auto_class).from_config(config, **options)
        return load_compact(model, folder, compact)

    def enable_activation_checkpointing(self, model: nn.Module) -> None:
        net: Any = model
        if not net.supports_gradient_checkpointing:
            raise ConfigError(
                f"training.activation_checkpointing: {type(net).__name__} cannot recompute its activations",
                "set it to false, and lower training.micro_batch_size if memory is short",
            )
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def save(
        self,
        model: nn.Module,
        folder: Path,
        dataset_folder: Path,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """A Hugging Face folder (any such tool reads it) with `task.json` and the tokenizer, if there is one."""
        net: Any = model
        info = saving.read_info(dataset_folder)
        folder.mkdir(parents=True, exist_ok=True)
        given = model.state_dict() if state is None else state
        # Copies: an engine's weights are views of one buffer, and transformers takes shared storage for tied weights.
        weights = {name: value.detach().cpu().clone() for name, value in given.items()}
        saving.drop_aliases(net, weights)
        with quiet_progress():
            net.save_pretrained(folder, state_dict=weights)
        if info.tokenizer is not None:
            saving.copy_tokenizer(dataset_folder / info.tokenizer, folder)
        saving.write_task(folder, self, info)

    def load(self, folder: Path, info: DatasetInfo) -> nn.Module:
        read_config(folder)
        compact = read_compact(folder)
        model = self._from_folder(folder) if compact is None else self._from_compact(folder, compact)
        self._remember(model, info)
        return model.eval()

    def _remember(self, model: nn.Module, info: DatasetInfo) -> None:
        """Keep on the model what `predict` must know of the dataset."""


def require_same_classes(trained: DatasetInfo, info: DatasetInfo) -> None:
    """Refuse a dataset whose classes are not those of the model's.

    Raises:
        DataError: the first classes of both are named.
    """
    if trained.classes != info.classes:
        raise DataError(
            f"the model knows the classes {', '.join(trained.classes[:8])}, the dataset {', '.join(info.classes[:8])}",
            "measure it on a dataset with the same classes",
        )


@contextmanager
def quiet_report() -> Iterator[None]:
    """Keep transformers' table of new and unused weights out of the run's display: a new head is expected here."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def freeze_batch_statistics(model: nn.Module) -> None:
    """Make batch normalisation use its kept mean and variance in training too.

    What a row counts must not depend on the rows beside it, nor on how many workers share a batch. The weights keep
    their names, so any reader of the folder computes the same.
    """
    from torch import nn as layers
    from torch.nn import functional

    class Frozen(layers.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )

    for module in model.modules():
        if type(module) is layers.BatchNorm2d:
            module.__class__ = Frozen
