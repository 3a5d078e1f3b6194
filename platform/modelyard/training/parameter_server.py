"""Training with parameter servers under bounded staleness (stale synchronous parallel, Ho et al., 2013)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from modelyard.training.batching import RankPlan, plan
from modelyard.training.config import Muon, TrainConfig
from modelyard.training.flat import FlatModel, Replica, Saved, Shard, joined, read_saved, restore_buffers
from modelyard.training.gang import Gang
from modelyard.training.noise import NoiseMeter, Norms
from modelyard.training.schedule import rate_factor
from modelyard.training.server import (
    GRADIENT,
    REPLY,
    REQUEST,
    WEIGHTS,
    Counter,
    Kind,
    Network,
    Server,
    ServerThread,
    header,
)
from modelyard.training.strategies import ParameterServer

_IDLE = timedelta(days=365)
"""A server waits for requests as long as its gang lives; the workers' own waits end at `strategy.timeout_s`."""


class ParameterServerEngine(Replica):
    """One worker and the server on its thread.

    Optimizer step t takes the gradient of exactly the rows of global batch t, whoever computed them, each at weights
    of version t - staleness or newer. A worker sends its gradient once per step, however many parts it computed.
    """

    def __init__(self, model: torch.nn.Module, config: TrainConfig, own: RankPlan, gang: Gang) -> None:
        strategy, training = config.training.strategy, config.training
        assert isinstance(strategy, ParameterServer)
        assert not isinstance(config.optimizer, Muon)
        self._config, self._strategy, self._gang, self._own = config, strategy, gang, own
        self._meter = NoiseMeter(model) if training.noise_every_steps else None
        super().__init__(model, training.precision)
        self._parts = num_parts(training.global_batch_size, training.micro_batch_size, gang.num_workers)
        self.is_claiming = strategy.work_claiming
        # One more than the staleness: a gang that agrees on step t then waits for nothing that training would not.
        self.spread = strategy.staleness + 1 if strategy.staleness else 0
        self._version = self._steps = self._rows = 0
        self._norm = 0.0
        self._counter = Counter()
        self._servers = Servers(self._flat, config, gang, self._counter)
        if training.compile:
            model.compile()

    @property
    def sent_bytes(self) -> int | None:
        """Bytes sent so far, by this worker and by the server on it."""
        return self._counter.total

    def parts(self, step: int) -> Iterator[RankPlan]:
        """This worker's fixed part, or those that it gets hold of before the others do."""
        self._servers.wait_until_sent()
        self._flat.gradient.zero_()
        self._rows = 0
        for part in self._claimed(step) if self.is_claiming else [self._own]:
            if self._rows == 0:
                self._refresh(step - self._strategy.staleness)
            self._rows += part.stop - part.start
            yield part

    def _claimed(self, step: int) -> Iterator[RankPlan]:
        training = self._config.training
        while (part := self._servers.claim(step, self._parts)) is not None:
            yield plan(training.global_batch_size, training.micro_batch_size, self._parts, part)

    def _refresh(self, version: int) -> None:
        """Take the newest weights, of `version` at least."""
        self._version, self._norm = self._servers.pull(version, self._version)
        self._flat.publish()

    def backward(self, row_losses_b: torch.Tensor, *, is_last: bool, measure_rows: int = 0) -> None:
        """Add the gradient of the global batch's mean loss that comes from these rows, shape (B,)."""
        meter = self._meter if measure_rows else None
        if meter is not None:
            meter.begin()
        size = self._config.training.global_batch_size
        (row_losses_b.sum() / size).backward()  # type: ignore[no-untyped-call]
        if meter is not None:
            meter.end(measure_rows, measure_rows / size)
        self._flat.fold()

    def take_norms(self) -> Norms:
        """Norms of this worker's micro-batches that were measured since the last call."""
        return self._meter.take() if self._meter is not None else Norms()

    def step(self, step: int) -> tuple[float, float]:
        """Push what this worker computed of global batch `step`.

        Returns the step's learning rate, and the norm of the newest whole gradient that this worker knows of: with
        staleness 0 that of this step.
        """
        if self._rows:
            self._servers.push(step, self._rows, self._flat.gradient)
        self._steps = step + 1
        if self._strategy.staleness == 0:
            self._refresh(self._steps)
        rate = rate_factor(self._config.schedule, step, self._config.training.max_steps)
        return self._config.optimizer.learning_rate * rate, self._norm

    @contextlib.contextmanager
    def published(self) -> Iterator[torch.nn.Module]:
        """Within it every worker has the weights after all steps so far. Collective."""
        self._refresh(self._steps)
        yield self.model

    def save(self, folder: Path, tag: str) -> None:
        """Write this worker's server's stretch after all steps so far. Collective."""
        self._refresh(self._steps)
        weights, moments = self._servers.own.state()
        buffers = self._flat.buffers() if self._gang.is_main else {}
        saved = Saved(self._steps, self._servers.start, weights, moments, {n: b.cpu() for n, b in buffers.items()})
        saved.write(folder / tag, self._gang.rank)

    def load(self, folder: Path, tag: str, *, weights_only: bool = False) -> None:
        """Take the state that any number of workers wrote."""
        parts = read_saved(folder / tag)
        weights, _ = joined(parts, 0, self._flat.size)
        self._flat.weights.copy_(weights)
        self._flat.publish()
        restore_buffers(self._flat, parts[0].buffers)
        self._servers.restore(parts, weights_only=weights_only)
        self._version = self._steps = parts[0].step
        self._gang.barrier()  # no request may reach a server that has not read its part

    def close(self) -> None:
        """Say goodbye to the other servers and end this one."""
        self._servers.close()


def num_parts(global_batch_size: int, micro_batch_size: int, num_workers: int) -> int:
    """Parts of a global batch that workers claim: one for each worker at least, of a micro-batch at most. Pure."""
    return max(num_workers, -(-global_batch_size // micro_batch_size))


class Servers:
    """All servers of the gang as one worker sees them: its own in this process, the others over the network."""

    def __init__(self, flat: FlatModel, config: TrainConfig, gang: Gang, counter: Counter) -> None:
        assert isinstance(config.training.strategy, ParameterServer)
        self._flat, self._rank, self._count = flat, gang.rank, gang.num_workers
        self._timeout_s = config.training.strategy.timeout_s
        self._cuts = [flat.size * index // self._count for index in range(self._count + 1)]
        self.start, self._stop = self._cuts[self._rank], self._cuts[self._rank + 1]
        self._peers = [rank for rank in range(self._count) if rank != self._rank]
        self._sending: list[tuple[Any, torch.Tensor]] = []
        self._among: Any = None
        self._thread: ServerThread | None = None
        assert not isinstance(config.optimizer, Muon)
        weights = flat.weights[self.start : self._stop].cpu().clone()
        self._shard = Shard(weights, self.start, flat.num_decaying, config.optimizer)
        self.own = Server(
            self._shard,
            batch_rows=config.training.global_batch_size,
            clipping=config.training.gradient_clipping,
            rate=lambda step: rate_factor(config.schedule, step, config.training.max_steps),
            sum_over_servers=self._sum_over_servers,
        )
        if self._peers:
            # Gloo, whatever the workers compute on: servers live in host memory.
            group = dist.new_group(backend="gloo", timeout=_IDLE)
            self._among = dist.new_group(backend="gloo", timeout=_IDLE)
            self._group = group
            self._network = Network(group, self._timeout_s, counter)
            self._thread = ServerThread(self.own, self._network, weights.numel(), len(self._peers))

    def _sum_over_servers(self, value: float) -> float:
        if self._among is None:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        work = dist.all_reduce(total, group=self._among, async_op=True)
        self._network.wait(work, "the other servers to take their step")
        return float(total)

    def push(self, step: int, rows: int, gradient: torch.Tensor) -> None:
        """Send each server its stretch of a gradient, which must not change before `wait_until_sent`."""
        gradient = gradient.cpu()
        for peer in self._peers:
            request = header(Kind.PUSH, step, rows)
            piece = gradient[self._cuts[peer] : self._cuts[peer + 1]]
            self._sending.append((self._network.send(request, peer, REQUEST), request))
            self._sending.append((self._network.send(piece, peer, GRADIENT), piece))
        # Last: it may wait for other servers, which wait for the above.
        self.own.push(step, rows, gradient[self.start : self._stop].clone())

    def wait_until_sent(self) -> None:
        """Until nothing is on the way any more."""
        for work, _ in self._sending:
            self._network.wait(work, "a server to take a gradient")
        self._sending.clear()

    def pull(self, version: int, known: int) -> tuple[int, float]:
        """Write weights of `version` or newer into the model's; what they are, and the last gradient's norm."""
        self._ask(self._peers, header(Kind.PULL, version, known))
        versions = []
        for peer in self._peers:
            found = self._answer(peer, f"weights of version {version} from worker {peer}")
            if found != known:
                piece = torch.empty(self._cuts[peer + 1] - self._cuts[peer])
                self._network.receive(piece, peer, WEIGHTS, f"weights of worker {peer}")
                self._flat.weights[self._cuts[peer] : self._cuts[peer + 1]] = piece
            versions.append(found)
        snapshot = self.own.pull(version, self._timeout_s)
        self._flat.weights[self.start : self._stop] = snapshot.weights
        return min([snapshot.version, *versions]), snapshot.norm

    def claim(self, step: int, parts: int) -> int | None:
        """A part of global batch `step` from worker 0, which keeps count; None when all are taken."""
        if self._rank == 0:
            return self.own.claim(step, parts)
        self._ask([0], header(Kind.CLAIM, step, parts))
        part = self._answer(0, f"a part of step {step}")
        return None if part < 0 else part

    def _ask(self, peers: list[int], request: torch.Tensor) -> None:
        for peer in peers:
            self._sending.append((self._network.send(request, peer, REQUEST), request))

    def _answer(self, peer: int, what: str) -> int:
        return int(self._network.receive(header(), peer, REPLY, what)[0])

    def restore(self, saved: list[Saved], *, weights_only: bool) -> None:
        """Give this worker's server its stretch of a checkpoint."""
        weights, moments = joined(saved, self.start, self._stop)
        self._shard.weights.copy_(weights)
        if not weights_only:
            self._shard.restore(moments)
        self.own.start_at(saved[0].step)

    def close(self) -> None:
        """Say goodbye to the others, wait for theirs."""
        if self._thread is None:
            return
        self._ask(self._peers, header(Kind.BYE))
        self.wait_until_sent()
        self._thread.join(self._timeout_s)
        self._thread = None
        for group in (self._group, self._among):
            dist.destroy_process_group(group)
