"""Which engine runs a model: what it needs, what is installed, and why. Pure but for `Machine.here`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from modelyard.errors import ConfigError, MissingExtraError
from modelyard.serving.export import why_not_gguf

EngineName = Literal["vllm", "openvino", "transformers", "batch"]
_NEEDS: dict[EngineName, dict[str, str]] = {
    "vllm": {"vllm": "vllm"},
    "openvino": {"openvino_genai": "openvino-genai", "gguf": "gguf"},
}
"""Engine, which is also the extra that installs it: module and package of each thing it needs."""


@dataclass(frozen=True)
class Machine:
    """What a replica finds where it runs."""

    modules: frozenset[str]
    """Those of the engines' modules that are installed."""
    gpus: int = 0

    @classmethod
    def here(cls) -> Machine:
        """This process. Imports none of the engines; torch is asked for GPUs."""
        import torch

        names = {module for needs in _NEEDS.values() for module in needs}
        found = frozenset(name for name in names if importlib.util.find_spec(name) is not None)
        return cls(found, torch.cuda.device_count())

    def missing(self, engine: EngineName) -> str | None:
        """A package that the engine lacks here."""
        needs = _NEEDS.get(engine, {})
        return next((package for module, package in needs.items() if module not in self.modules), None)


@dataclass(frozen=True)
class Choice:
    """An engine, and the reason as a sentence."""

    engine: EngineName
    reason: str


@dataclass(frozen=True)
class Candidate:
    """What the choice depends on in a model."""

    task: str
    config: Mapping[str, Any]
    """Its `config.json`; empty for a model that is no language model."""
    byte_level: bool = True
    """Whether its tokenizer is a byte-level BPE."""
    has_adapter: bool = False
    """Whether a LoRA adapter lies beside its weights, not merged."""


def choose(model: Candidate, machine: Machine, asked: str | None = None) -> Choice:
    """The fastest engine that is installed and can run the model; or the one that is asked for.

    Raises:
        ConfigError: the engine that is asked for is unknown, or cannot run this model.
        MissingExtraError: it is not installed.
    """
    if asked is not None:
        return _asked(model, machine, asked)
    if model.task != "causal_lm":
        return Choice("batch", f"the task {model.task} answers in one pass, so calls are gathered into batches")
    passed: list[str] = []
    fast: tuple[EngineName, ...] = ("vllm", "openvino")
    for engine in fast:
        reason = _unfit(model, engine)
        package = machine.missing(engine)
        if engine == "vllm" and not reason and not machine.gpus:
            reason = "there is no GPU"
        if not reason and package is None:
            why = (
                f"there are {machine.gpus} GPUs" if engine == "vllm" else "it is the fastest on CPUs, in 8-bit weights"
            )
            return Choice(engine, "; ".join([why, *passed]))
        passed.append(f"not {engine}: {reason or f'{package} is not installed'}")
    return Choice("transformers", "; ".join(["it runs every architecture", *passed]))


def _asked(model: Candidate, machine: Machine, asked: str) -> Choice:
    language = ("vllm", "openvino", "transformers")
    fitting = language if model.task == "causal_lm" else ("batch",)
    engine: EngineName | None = next((name for name in (*language, "batch") if name == asked), None)  # type: ignore[misc]
    if engine is None:
        raise ConfigError(f"engine: there is no engine {asked!r}", f"known: auto, {', '.join((*language, 'batch'))}")
    if engine not in fitting:
        raise ConfigError(f"engine: {engine} does not run the task {model.task}", f"choose {' or '.join(fitting)}")
    if reason := _unfit(model, engine):
        raise ConfigError(f"engine: {engine} cannot run this model: {reason}", "choose auto or transformers")
    if (package := machine.missing(engine)) is not None:
        raise MissingExtraError(package, engine)
    return Choice(engine, "the config asks for it")


def _unfit(model: Candidate, engine: EngineName) -> str:
    """Why an engine could not run the model even if it were installed; empty when it could."""
    if engine == "vllm" and model.has_adapter:
        return "its LoRA adapter is not merged into the weights (lora.merge_at_end)"
    if engine == "openvino":
        return why_not_gguf(model.config) or ("" if model.byte_level else "its tokenizer is no byte-level BPE")
    return ""
