"""What the layers of a model see on real rows: ranges and norms of their inputs, how much a decoder layer turns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from modelyard.errors import DataError
from modelyard.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor, nn


def input_ranges(
    task: Task, model: nn.Module, names: Sequence[str], batches: Iterable[Mapping[str, Tensor]], percentile: float
) -> dict[str, tuple[float, float]]:
    """Lowest and highest input of each named layer, without the outermost `100 - percentile` percent."""
    lows: dict[str, list[float]] = {name: [] for name in names}
    highs: dict[str, list[float]] = {name: [] for name in names}

    def see(name: str, x: Tensor) -> None:
        flat = x.detach().float().flatten()
        if percentile < 100:
            cut = max(1, round(flat.numel() * (1 - percentile / 100)))
            lows[name].append(float(flat.kthvalue(cut).values))
            highs[name].append(float(flat.kthvalue(flat.numel() - cut + 1).values))
        else:
            lows[name].append(float(flat.min()))
            highs[name].append(float(flat.max()))

    _run(task, model, names, batches, see)
    return {name: (min(lows[name]), max(highs[name])) for name in names}


def input_norms(
    task: Task, model: nn.Module, names: Sequence[str], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Root mean square over all tokens (or places of an image) of each input feature (in,) of each named layer."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, x: Tensor) -> None:
        features = x.detach().float()
        features = features.movedim(1, -1) if features.ndim == 4 else features
        flat = features.reshape(-1, features.shape[-1])
        total = flat.square().sum(dim=0)
        sums[name] = sums[name] + total if name in sums else total
        counts[name] = counts.get(name, 0) + flat.shape[0]

    _run(task, model, names, batches, see)
    return {name: (sums[name] / counts[name]).sqrt() for name in names}


def input_moments(
    task: Task, model: nn.Module, names: Sequence[str], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Second moments (in, in) of the input features of each named linear layer, summed over all tokens."""
    sums: dict[str, Tensor] = {}
    last: list[Tensor] = []  # an input and its moments: several layers are often given the same one

    def see(name: str, x: Tensor) -> None:
        if not last or last[0] is not x:
            flat = x.detach().float().flatten(0, -2)
            last[:] = [x, flat.T @ flat]
        sums[name] = sums[name].add_(last[1]) if name in sums else last[1].clone()

    _run(task, model, names, batches, see)
    return sums


def layer_influence(
    task: Task, model: nn.Module, layers: Sequence[str], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, float]:
    """1 - mean cosine between what goes into each layer and what comes out (Men et al. 2024, "ShortGPT")."""
    import torch

    found: dict[str, list[float]] = {name: [] for name in layers}
    hooks = []
    for name in layers:

        def after(_module: nn.Module, inputs: tuple[Any, ...], kwargs: Any, output: Any, name: str = name) -> None:
            before = inputs[0] if inputs else kwargs["hidden_states"]
            result = output[0] if isinstance(output, tuple) else output
            cosine = torch.nn.functional.cosine_similarity(before.float(), result.float(), dim=-1)
            found[name].append(1 - float(cosine.mean()))

        hooks.append(model.get_submodule(name).register_forward_hook(after, with_kwargs=True))
    try:
        _forward(task, model, batches)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: sum(values) / len(values) for name, values in found.items()}


def _run(task: Task, model: nn.Module, names: Sequence[str], batches: Iterable[Mapping[str, Tensor]], see: Any) -> None:
    with _watching(model, names, see):
        _forward(task, model, batches)


def _forward(task: Task, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> None:
    import torch

    count = 0
    with torch.inference_mode():
        for batch in batches:
            task.statistics(model, batch)
            count += 1
    if not count:
        raise DataError("the calibration split has no rows", "name another as calibration_split")


@contextmanager
def _watching(model: nn.Module, names: Sequence[str], see: Any) -> Iterator[None]:
    """Call `see(name, input)` whenever a named layer runs."""
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _m, inputs, name=name: see(name, inputs[0]))
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
