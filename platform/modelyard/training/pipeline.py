"""Pipeline parallelism by DeepSpeed's PipelineModule: every worker of a group has a run of consecutive layers.

Huang et al. 2019, "GPipe", with the one-forward-one-backward schedule of Narayanan et al. 2021. Micro-batches travel
from worker to worker; with m of them and p workers a share (p - 1) / (m + p - 1) of the time is spent waiting, so
`training.micro_batch_size` should be small enough for several. The last worker has the loss.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from modelyard.errors import ConfigError
from modelyard.tasks.base import Task
from modelyard.tasks.slices import TOKENS
from modelyard.training.sequence import require_causal_attention


class _Table(torch.nn.Module):
    """The embedding, as the first layer and, where they share it, as the last."""

    def __init__(self, table: torch.nn.Module) -> None:
        super().__init__()
        self.table = table

    @property
    def weight(self) -> torch.nn.Parameter:
        """By this name DeepSpeed keeps the copies of the first and the last worker equal."""
        weight: torch.nn.Parameter = self.table.get_parameter("weight")
        return weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) token ids -> (B, T, hidden)."""
        hidden: torch.Tensor = self.table(ids)
        return hidden


def _logits(table: _Table, hidden: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(hidden, table.weight)


class _Block(torch.nn.Module):
    """A decoder layer with the rotary positions that the model around it would have handed in."""

    def __init__(self, layer: torch.nn.Module, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.rotary = layer, rotary

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, hidden) -> (B, T, hidden)."""
        places = torch.arange(hidden.shape[1], device=hidden.device)[None]
        output = self.layer(
            hidden,
            attention_mask=None,
            position_ids=places,
            position_embeddings=self.rotary(hidden, places),
            use_cache=False,
        )
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result.contiguous()


def in_stages(model: torch.nn.Module, stages: int) -> Any:
    """The layers of `model` as DeepSpeed's `PipelineModule`. Each worker keeps its own; the others lose their data.

    Collective. Raises:
        ConfigError: the model is no Llama-like decoder.
    """
    from deepspeed.pipe import PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import ProcessTopology

    net: Any = model
    body: Any = getattr(net, "model", None)
    if not all(hasattr(body, name) for name in ("embed_tokens", "layers", "norm", "rotary_emb")):
        raise ConfigError(
            f"training.parallel.pipeline={stages}: {type(net).__name__} has no layers that could be run one by one",
            "use training.zero_stage=3 for it, or a Llama-like architecture (Llama, Qwen, Mistral, ...)",
        )
    require_causal_attention(model, f"training.parallel.pipeline={stages}")
    blocks = [_Block(layer, body.rotary_emb) for layer in body.layers]
    if net.get_output_embeddings().weight is body.embed_tokens.weight:
        first: Any = TiedLayerSpec("embedding", _Table, body.embed_tokens)
        last: Any = TiedLayerSpec("embedding", _Table, body.embed_tokens, forward_fn=_logits)
    else:
        first, last = _Table(body.embed_tokens), net.get_output_embeddings()
    _require_nothing_else(net, blocks, stages)
    # Neighbours by rank are one group, as in the other layouts; DeepSpeed's default would be the reverse.
    topology = ProcessTopology(axes=["data", "pipe"], dims=[dist.get_world_size() // stages, stages])
    with contextlib.redirect_stdout(io.StringIO()):
        module = PipelineModule([first, *blocks, body.norm, last], topology=topology, dynamic_shape=True)
    kept = {id(parameter) for parameter in module.parameters()}
    for part in net.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) not in kept:
                part._parameters[name] = torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return module


def _require_nothing_else(net: Any, blocks: Sequence[torch.nn.Module], stages: int) -> None:
    """Refuse a model that computes something between its layers (scaled embeddings, capped logits)."""
    ids = torch.arange(3, device=net.device)[None]
    was_training = net.training
    net.eval()
    with torch.no_grad():
        hidden = net.model.embed_tokens(ids)
        for block in blocks:
            hidden = block(hidden)
        found = net.get_output_embeddings()(net.model.norm(hidden))
        expected = net(input_ids=ids, use_cache=False).logits
    net.train(was_training)
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
        raise ConfigError(
            f"training.parallel.pipeline={stages}: {type(net).__name__} is more than its layers one after another",
            "use training.zero_stage=3 for it",
        )


class StagedModel(torch.nn.Module):
    """Runs a task's batches through the pipeline. All workers of the gang call the same methods."""

    def __init__(self, engine: Any, loss_scale: float) -> None:
        """`engine`: DeepSpeed's; `loss_scale`: as in `RankPlan`."""
        super().__init__()
        self._engine = [engine]  # in a list, so that it is no part of this module
        self._scale = loss_scale

    def train_on(self, task: Task, batches: Sequence[tuple[Mapping[str, torch.Tensor], bool]]) -> torch.Tensor:
        """Gradients of a step's micro-batches, reduced over the groups; each batch with whether its rows count.

        Returns the sum of the rows' losses; 0 on all workers but the last of a group.
        """
        (engine,) = self._engine
        total = torch.zeros((), device=engine.device)

        def loss(logits: torch.Tensor, labels: Sequence[torch.Tensor]) -> torch.Tensor:
            losses_b = task.loss(_given(logits), {TOKENS: labels[0]}) * labels[1]
            total.add_(losses_b.detach().sum())
            return losses_b.sum() * self._scale

        engine.module.train()
        engine.module.loss_fn, engine._compute_loss, engine.total_loss = loss, True, None
        engine.set_dataiterator(_pairs(batches))
        engine._exec_schedule(_without_step(engine))
        return total

    def step(self) -> None:
        """Apply the gradients."""
        self._engine[0]._exec_optimizer_step()

    def statistics(self, task: Task, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`task.statistics` of a batch; empty on all workers but the last of a group."""
        (engine,) = self._engine
        found: dict[str, torch.Tensor] = {}

        def note(logits: torch.Tensor, labels: Sequence[torch.Tensor]) -> torch.Tensor:
            found.update(task.statistics(_given(logits), {TOKENS: labels[0]}))
            return torch.zeros(())

        engine.module.loss_fn = note
        engine.eval_batch(_pairs([(batch, True)]), reduce_output=None, bcast_loss=False, num_micro_batches=1)
        return found


def gathered(net: torch.nn.Module, stages: int) -> dict[str, torch.Tensor]:
    """All weights of the model on worker 0, from the workers of its group; empty elsewhere. Collective."""
    rank, state = dist.get_rank(), {}
    parameters = {
        name: parameter.detach()
        for name, parameter in net.named_parameters(remove_duplicate=False)
        if parameter.device.type != "meta"
    }
    known: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(known, {name: (tuple(p.shape), p.dtype) for name, p in parameters.items()})
    if rank >= stages:
        return {}
    for owner, names in enumerate(known[:stages]):
        for name, (shape, dtype) in names.items():
            if any(name in before for before in known[:owner]):
                continue
            if rank == 0 == owner:
                state[name] = parameters[name].cpu().clone()
            elif rank == owner:
                dist.send(parameters[name].contiguous(), dst=0)
            elif rank == 0:
                device = next(iter(parameters.values())).device
                received = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(received, src=owner)
                state[name] = received.cpu()
    return state


def _given(logits: torch.Tensor) -> Any:
    """A model that has computed already."""
    return lambda **inputs: SimpleNamespace(logits=logits)


def _pairs(batches: Sequence[tuple[Mapping[str, torch.Tensor], bool]]) -> Iterator[Any]:
    """What the first worker reads, and what the last one needs of it."""
    for batch, counts in batches:
        yield batch[TOKENS], (batch[TOKENS], torch.tensor(float(counts)))


def _without_step(engine: Any) -> Any:
    """DeepSpeed's schedule of a step, up to the reduced gradients."""
    from deepspeed.runtime.pipe.schedule import OptimizerStep, TrainSchedule

    class Schedule(TrainSchedule):  # type: ignore[misc]
        def steps(self) -> Iterator[list[Any]]:
            for commands in super().steps():
                yield [command for command in commands if not isinstance(command, OptimizerStep)]

    return Schedule(micro_batches=engine.micro_batches, stages=engine.num_stages, stage_id=engine.stage_id)
