"""Whole channels, heads and layers out of a model: every tensor gets smaller, and plain transformers loads the rest."""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Any

from modelyard.compression.calibration import input_norms, layer_influence
from modelyard.compression.recipe import Shrink
from modelyard.compression.recovery import recover
from modelyard.compression.workspace import Workspace, require_plain
from modelyard.errors import ConfigError
from modelyard.tasks import ImageClassification, Task
from modelyard.tasks.distillation import decoder_layers

if TYPE_CHECKING:
    from torch import Tensor, nn

_MULTIPLE = 32
"""Widths stay multiples of this where they are now: kernels and block formats like it."""


def shrink(work: Workspace, step: Shrink) -> Workspace:
    """Remove the channels, heads and layers of least worth, in rounds, with training after each.

    Raises:
        ConfigError: the model is quantized already, or of a kind whose parts are not known.
        TrainingError: training failed.
    """
    require_plain(work, "shrink")
    for number in range(1, step.rounds + 1):
        part = _part(step, number)
        if any(part.values()):  # there may be fewer layers to remove than rounds
            work = _once(work, step.with_changes(rounds=1, training=None, **part))
        if step.training is not None:
            work = recover(work, step.training)
    return work


def _part(step: Shrink, number: int) -> dict[str, Any]:
    """What round `number` removes of what is there then, so that all rounds together remove what the step says."""

    def share(total: float) -> float:
        left = [1 - total * done / step.rounds for done in (number - 1, number)]
        return 1 - left[1] / left[0]

    layers = [step.layers * done // step.rounds for done in (number - 1, number)]
    return {"mlp": share(step.mlp), "heads": share(step.heads), "layers": layers[1] - layers[0]}


def _once(work: Workspace, step: Shrink) -> Workspace:
    task, model = work.load()
    before = _count(model)
    if isinstance(task, ImageClassification):
        task, model = _shrink_classifier(work, task, model, step)
    elif decoder_layers(model):
        _require_llama(model)
        if step.layers:
            _drop_layers(work, task, model, step)
        if step.heads:
            _drop_heads(work, task, model, step)
        if step.mlp:
            _drop_channels(work, task, model, step)
    elif _encoder_layers(model):
        _shrink_encoder(work, task, model, step)
    else:
        raise ConfigError(f"steps.shrink: a model of the task {task.kind} has no parts that are known", "use prune")
    after = _count(model)
    return work.save(model, "shrunk", task, note=f"{before:,} -> {after:,} parameters")


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _require_llama(model: Any) -> None:
    layer = decoder_layers(model)[0]
    names = {name for name, _ in layer.named_modules()}
    needed = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    if missing := sorted((needed | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}) - names):
        raise ConfigError(
            f"steps.shrink: layers of {type(model).__name__} have no {missing[0]}",
            "models in the style of Llama or BERT can be shrunk; use prune or distill for others",
        )


def _drop_layers(work: Workspace, task: Task, model: Any, step: Shrink) -> None:
    layers = model.model.layers
    if step.layers >= len(layers):
        raise ConfigError(f"steps.shrink.layers={step.layers}, the model has {len(layers)}", "leave at least one")
    names = [f"model.layers.{index}" for index in range(len(layers))]
    worth = layer_influence(task, model, names, work.calibration_batches(step.calibration_rows))
    dropped = set(sorted(names, key=lambda name: worth[name])[: step.layers])
    kept = [layer for name, layer in zip(names, layers, strict=True) if name not in dropped]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    model.model.layers = type(layers)(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: len(kept)]


def _drop_channels(work: Workspace, task: Task, model: Any, step: Shrink) -> None:
    """The hidden channels of each feed-forward part: rows of gate and up, columns of down."""
    width = model.config.intermediate_size
    kept_width = _kept(width, step.mlp)
    names = [f"model.layers.{index}.mlp.down_proj" for index in range(len(model.model.layers))]
    worth = _column_worth(work, task, model, names, step)
    for name, layer in zip(names, model.model.layers, strict=True):
        keep = worth[name].topk(kept_width).indices.sort().values
        _keep_rows(layer.mlp.gate_proj, keep)
        _keep_rows(layer.mlp.up_proj, keep)
        _keep_columns(layer.mlp.down_proj, keep)
    model.config.intermediate_size = kept_width


def _drop_heads(work: Workspace, task: Task, model: Any, step: Shrink) -> None:
    """Heads in whole key/value groups, as many in each layer: rows of q, k and v, columns of o."""
    import torch

    config = model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept_groups = max(1, round(groups * (1 - step.heads)))
    names = [f"model.layers.{index}.self_attn.o_proj" for index in range(len(model.model.layers))]
    worth = _column_worth(work, task, model, names, step)
    per_group = heads // groups
    for name, layer in zip(names, model.model.layers, strict=True):
        attention = layer.self_attn
        score = worth[name].reshape(groups, per_group * size).square().sum(dim=1)
        chosen = score.topk(kept_groups).indices.sort().values
        wide = torch.arange(heads * size).reshape(groups, -1)[chosen].flatten()
        narrow = torch.arange(groups * size).reshape(groups, -1)[chosen].flatten()
        _keep_rows(attention.q_proj, wide)
        _keep_rows(attention.k_proj, narrow)
        _keep_rows(attention.v_proj, narrow)
        _keep_columns(attention.o_proj, wide)
    config.head_dim = size
    config.num_attention_heads, config.num_key_value_heads = kept_groups * per_group, kept_groups


def _encoder_layers(model: Any) -> str:
    """Name of the list of layers of an encoder in the style of BERT; empty for another model."""
    name = f"{getattr(model, 'base_model_prefix', '')}.encoder.layer"
    modules = dict(model.named_modules())
    needed = (f"{name}.0.intermediate.dense", f"{name}.0.output.dense")
    return name if all(each in modules for each in needed) else ""


def _shrink_encoder(work: Workspace, task: Task, model: Any, step: Shrink) -> None:
    """Layers, and the hidden channels of each feed-forward part: rows of its first matrix, columns of its second."""
    if step.heads:
        raise ConfigError(
            f"steps.shrink.heads: {type(model).__name__} has as many heads as its width asks for",
            "give mlp or layers",
        )
    place = _encoder_layers(model)
    layers = model.get_submodule(place)
    if step.layers:
        if step.layers >= len(layers):
            raise ConfigError(f"steps.shrink.layers={step.layers}, the model has {len(layers)}", "leave at least one")
        names = [f"{place}.{index}" for index in range(len(layers))]
        worth = layer_influence(task, model, names, work.calibration_batches(step.calibration_rows))
        for index in sorted(sorted(range(len(names)), key=lambda i: worth[names[i]])[: step.layers], reverse=True):
            del layers[index]
        model.config.num_hidden_layers = len(layers)
    if step.mlp:
        width = _kept(model.config.intermediate_size, step.mlp)
        names = [f"{place}.{index}.output.dense" for index in range(len(layers))]
        columns = _column_worth(work, task, model, names, step)
        for name, layer in zip(names, layers, strict=True):
            keep = columns[name].topk(width).indices.sort().values
            _keep_rows(layer.intermediate.dense, keep)
            _keep_columns(layer.output.dense, keep)
        model.config.intermediate_size = width


def _column_worth(work: Workspace, task: Task, model: Any, names: list[str], step: Shrink) -> dict[str, Tensor]:
    """Worth (in,) of each input of the named linear layers."""
    columns = {name: model.get_submodule(name).weight.detach().float() for name in names}
    if step.criterion == "l1":
        return {name: weight.abs().sum(dim=0) for name, weight in columns.items()}
    norms = {name: weight.norm(dim=0) for name, weight in columns.items()}
    if step.criterion == "l2":
        return norms
    seen = input_norms(task, model, names, work.calibration_batches(step.calibration_rows))
    return {name: norms[name] * seen[name] for name in names}


def _kept(width: int, share: float) -> int:
    """How many of `width` channels stay: a multiple of 32 where it was one, and at least that."""
    unit = _MULTIPLE if width % _MULTIPLE == 0 and width > _MULTIPLE else 1
    return max(unit, round(width * (1 - share) / unit) * unit)


def _keep_rows(linear: Any, keep: Tensor) -> None:
    _replace(linear, "weight", linear.weight[keep])
    if linear.bias is not None:
        _replace(linear, "bias", linear.bias[keep])
    linear.out_features = len(keep)


def _keep_columns(linear: Any, keep: Tensor) -> None:
    _replace(linear, "weight", linear.weight[:, keep])
    linear.in_features = len(keep)


def _replace(module: Any, name: str, value: Tensor) -> None:
    import torch

    setattr(module, name, torch.nn.Parameter(value.detach().clone()))


def _shrink_classifier(
    work: Workspace, task: ImageClassification, model: Any, step: Shrink
) -> tuple[ImageClassification, nn.Module]:
    """The channels of every convolution and of the dense layer; groups of a group norm lose equally many each."""
    import torch
    from torch import nn

    from modelyard.tasks import read_task

    if task.architecture not in ("cnn", "mlp"):
        raise ConfigError(
            f"steps.shrink: the channels of the architecture {task.architecture} are not known",
            "architectures cnn and mlp can be shrunk; use prune or distill for others",
        )
    if step.heads or step.layers:
        raise ConfigError("steps.shrink: an image classifier has neither heads nor layers to remove", "give mlp alone")
    body = list(model.body)
    weighted = [index for index, module in enumerate(body) if isinstance(module, nn.Conv2d | nn.Linear)]
    names = [f"body.{index}" for index in weighted]
    worth = _output_worth(work, task, model, names, step)
    sizes: list[int] = []
    sizes_before = body[weighted[0]].weight.shape[1]
    keep = torch.arange(body[weighted[0]].weight.shape[1])
    for position, index in enumerate(weighted):
        module, norm = body[index], body[index + 1] if index + 1 < len(body) else None
        inputs = module.weight.shape[1]
        if len(keep) != inputs or not torch.equal(keep, torch.arange(inputs)):
            keep = _spread(keep, inputs, sizes_before)
            _replace(module, "weight", module.weight[:, keep])
            module.in_features = module.in_channels = len(keep)
        outputs = sizes_before = module.weight.shape[0]
        if position + 1 == len(weighted):
            break
        groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else 1
        each = max(1, round(outputs * (1 - step.mlp) / groups))
        chosen = worth[f"body.{index}"].reshape(groups, -1).topk(each, dim=1).indices.sort(dim=1).values
        keep = (chosen + torch.arange(groups)[:, None] * (outputs // groups)).flatten()
        _replace(module, "weight", module.weight[keep])
        _replace(module, "bias", module.bias[keep])
        module.out_features = module.out_channels = len(keep)
        for name in ("weight", "bias"):
            _replace(norm, name, getattr(norm, name)[keep])
        sizes.append(len(keep))
    convolutions = sum(isinstance(body[index], nn.Conv2d) for index in weighted)
    changes: dict[str, Any] = {"hidden": sizes[-1]}
    if convolutions:
        changes["channels"] = tuple(sizes[:convolutions])
    smaller = task.with_changes(**changes)
    rebuilt: Any = smaller.build(read_task(work.folder)[1], None)
    rebuilt.load_state_dict(copy.deepcopy(model.state_dict()))
    return smaller, rebuilt.eval()


def _spread(keep: Tensor, inputs: int, channels: int) -> Tensor:
    """Inputs that belong to the kept channels, where each channel was flattened to `inputs / channels` of them."""
    import torch

    places = inputs // channels
    return (keep[:, None] * places + torch.arange(places)).flatten()


def _output_worth(work: Workspace, task: Task, model: Any, names: list[str], step: Shrink) -> dict[str, Tensor]:
    """Worth (out,) of each output: norm of its weights, or of what the next weighted layer makes of it."""
    weights = {name: model.get_submodule(name).weight.detach().float().flatten(1) for name in names}
    if step.criterion == "l1":
        return {name: weight.abs().sum(dim=1) for name, weight in weights.items()}
    if step.criterion == "l2":
        return {name: weight.norm(dim=1) for name, weight in weights.items()}
    seen = input_norms(task, model, names, work.calibration_batches(step.calibration_rows))
    worth = {}
    for name, following in itertools.pairwise(names):
        norm, after = seen[following], model.get_submodule(following).weight.detach().float()
        strength = (after.flatten(2).square().sum(dim=(0, 2)) if after.ndim == 4 else after.square().sum(dim=0)).sqrt()
        felt = (norm * strength).square().reshape(weights[name].shape[0], -1).sum(dim=1)
        worth[name] = felt.sqrt()
    return worth | {names[-1]: weights[names[-1]].norm(dim=1)}
