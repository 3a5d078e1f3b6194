"""Training without a centre: every worker steps by itself, then averages its weights with its neighbours' alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from modelyard.errors import WaitTimeoutError
from modelyard.training.batching import RankPlan
from modelyard.training.config import Muon, TrainConfig
from modelyard.training.engine import clipped
from modelyard.training.flat import Replica, Saved, Shard, averaged, read_saved, restore_buffers
from modelyard.training.gang import Gang
from modelyard.training.noise import Norms
from modelyard.training.schedule import rate_factor
from modelyard.training.strategies import Gossip


@dataclass(frozen=True)
class Exchange:
    """Whom one worker sends its weights to in one step, and whose it takes; equal weights with its own."""

    to: tuple[int, ...]
    of: tuple[int, ...]


def exchange(topology: str, step: int, rank: int, num_workers: int) -> Exchange:
    """The neighbours of worker `rank` in `step`. Pure.

    Over all workers the mixing matrix is doubly stochastic at every step, for any number of workers, so that mixing
    moves no average. One-peer exponential graph: Ying et al. 2021, section 4.
    """
    if num_workers == 1:
        return Exchange((), ())
    if topology == "ring":
        both = tuple(dict.fromkeys(((rank + 1) % num_workers, (rank - 1) % num_workers)))
        return Exchange(both, both)
    hop = 1 << (step % diameter("exponential", num_workers))
    return Exchange(((rank + hop) % num_workers,), ((rank - hop) % num_workers,))


def diameter(topology: str, num_workers: int) -> int:
    """Steps until what one worker learns has reached all others; so far one may be ahead of another."""
    return num_workers // 2 if topology == "ring" else max(0, math.ceil(math.log2(num_workers)))


class GossipEngine(Replica):
    """One replica of the model with an optimizer of its own, mixed with its neighbours' after every step.

    The rows of a worker's part are weighted as in the global batch, so the mean over workers of their gradients is
    that of the global batch. Gradients are clipped by the norm of the worker's own.
    """

    is_claiming = False

    def __init__(self, model: torch.nn.Module, config: TrainConfig, plan: RankPlan, gang: Gang) -> None:
        strategy = config.training.strategy
        assert isinstance(strategy, Gossip)
        assert not isinstance(config.optimizer, Muon)
        self._config, self._strategy, self._plan, self._gang = config, strategy, plan, gang
        super().__init__(model, config.training.precision)
        self._shard = Shard(self._flat.weights, 0, self._flat.num_decaying, config.optimizer)
        self._row_weight = gang.num_workers / config.training.global_batch_size
        # A group of its own: what is on the way here must not hold up the gang's other collectives.
        self._group = dist.new_group() if gang.num_workers > 1 else None
        self._steps = 0
        self.spread = diameter(strategy.topology, gang.num_workers)
        self.sent_bytes = 0
        if config.training.compile:
            model.compile()

    def parts(self, step: int) -> Iterator[RankPlan]:
        """This worker's fixed part."""
        self._flat.gradient.zero_()
        yield self._plan

    def backward(self, row_losses_b: torch.Tensor, *, is_last: bool, measure_rows: int = 0) -> None:
        """Add the gradient of these rows, shape (B,), to this worker's."""
        (row_losses_b.sum() * self._row_weight).backward()  # type: ignore[no-untyped-call]
        self._flat.fold()

    def take_norms(self) -> Norms:
        """None: the gradient of the whole batch, to compare with, is never formed."""
        return Norms()

    def step(self, step: int) -> tuple[float, float]:
        """Step this worker's optimizer, then average with its neighbours. The norm is that of its own gradient."""
        training = self._config.training
        rate = rate_factor(self._config.schedule, step, training.max_steps)
        norm = clipped(self._flat.gradient, training.gradient_clipping)
        self._shard.step(self._flat.gradient, rate)
        self._mix(exchange(self._strategy.topology, step, self._gang.rank, self._gang.num_workers))
        self._flat.publish()
        self._steps = step + 1
        return self._config.optimizer.learning_rate * rate, norm

    def _mix(self, peers: Exchange) -> None:
        weights, others = self._flat.weights, [torch.empty_like(self._flat.weights) for _ in peers.of]
        ops = [dist.P2POp(dist.isend, weights, peer, self._group) for peer in peers.to]
        ops += [dist.P2POp(dist.irecv, other, peer, self._group) for other, peer in zip(others, peers.of, strict=True)]
        if not ops:
            return
        self._wait(dist.batch_isend_irecv(ops), peers)
        for other in others:
            weights += other
        weights /= len(others) + 1
        self.sent_bytes += len(peers.to) * weights.nbytes

    def _wait(self, works: list[dist.Work], peers: Exchange) -> None:
        try:
            for work in works:
                work.wait(timedelta(seconds=self._strategy.timeout_s))
        except RuntimeError as error:
            if "timed out" not in str(error).lower():
                raise
            waited = f"the weights of worker {' or '.join(map(str, peers.of))}"
            raise WaitTimeoutError(waited, self._strategy.timeout_s, "training.strategy.timeout_s") from error

    @contextlib.contextmanager
    def published(self) -> Iterator[torch.nn.Module]:
        """Within it the replica is the average over all workers; afterwards it is itself again. Collective."""
        own = {id(value): value.clone() for value in self._averaged_values()}
        for value in self._averaged_values():
            if self._gang.num_workers > 1:
                dist.all_reduce(value, group=self._group)
                value /= self._gang.num_workers
        self._flat.publish()
        try:
            yield self.model
        finally:
            for value in self._averaged_values():
                value.copy_(own[id(value)])
            self._flat.publish()

    def _averaged_values(self) -> list[torch.Tensor]:
        return [self._flat.weights, *(b for b in self._flat.buffers().values() if b.is_floating_point())]

    def save(self, folder: Path, tag: str) -> None:
        """Write this worker's whole replica."""
        buffers = {name: buffer.cpu() for name, buffer in self._flat.buffers().items()}
        moments = {name: value.cpu() for name, value in self._shard.moments().items()}
        saved = Saved(self._steps, 0, self._flat.weights.cpu(), moments, buffers)
        saved.write(folder / tag, self._gang.rank)

    def load(self, folder: Path, tag: str, *, weights_only: bool = False) -> None:
        """Take this worker's replica back; another number of workers starts from the average of all replicas."""
        replicas = read_saved(folder / tag)
        saved = replicas[self._gang.rank] if len(replicas) == self._gang.num_workers else averaged(replicas)
        self._flat.weights.copy_(saved.weights)
        self._flat.publish()
        restore_buffers(self._flat, saved.buffers)
        self._steps = saved.step
        if not weights_only:
            self._shard.restore({name: value.to(self._flat.weights.device) for name, value in saved.moments.items()})

    def close(self) -> None:
        """Let go of the neighbours."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
