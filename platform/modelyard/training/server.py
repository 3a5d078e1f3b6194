"""A server of a parameter-server gang: it owns a stretch of the weights, sums gradients, steps, and hands weights out.

One runs on a thread of every worker; the workers reach the others' by point-to-point messages over Gloo. A message is
a header of three whole numbers, and for gradients and weights a second message with the numbers themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch

from modelyard.errors import WaitTimeoutError
from modelyard.training.engine import clipped
from modelyard.training.flat import Shard

SETTING = "training.strategy.timeout_s"
REQUEST, GRADIENT, REPLY, WEIGHTS = 1, 2, 3, 4
"""Tags of the messages."""


class Kind(IntEnum):
    """What a request asks for, and the meaning of the numbers that follow it."""

    PUSH = 0
    """Step, rows; the gradient follows."""
    PULL = 1
    """Least version, version that is there already."""
    CLAIM = 2
    """Step, number of parts."""
    BYE = 3


@dataclass(frozen=True)
class Snapshot:
    """Weights after `version` optimizer steps."""

    version: int
    weights: torch.Tensor
    """Shape (stop - start,); never changed."""
    norm: float
    """Of the last step's whole gradient, before clipping."""


class Server:
    """One stretch of the weights. All methods may be called from any thread.

    Optimizer step t is taken once gradients of all rows of global batch t have come, in the order of t.
    """

    def __init__(
        self,
        shard: Shard,
        *,
        batch_rows: int,
        clipping: float,
        rate: Callable[[int], float],
        sum_over_servers: Callable[[float], float],
    ) -> None:
        self._shard, self._batch_rows, self._clipping = shard, batch_rows, clipping
        self._rate, self._sum_over_servers = rate, sum_over_servers
        self._changed = threading.Condition(threading.RLock())
        self._sums: dict[int, tuple[torch.Tensor, int]] = {}
        self._claimed: dict[int, int] = {}
        self._waiting: list[tuple[int, Callable[[Snapshot], None]]] = []
        self._error: BaseException | None = None
        self._version, self._norm = 0, 0.0
        self._snapshot: Snapshot | None = None

    def start_at(self, version: int) -> None:
        """Go on after `version` steps, with the weights that the shard has now."""
        with self._changed:
            self._version, self._snapshot = version, None

    def push(self, step: int, rows: int, gradient: torch.Tensor) -> None:
        """Add the gradient of `rows` rows of global batch `step`; takes the tensor over."""
        with self._changed:
            before = self._sums.get(step)
            if before is not None:
                gradient, rows = before[0].add_(gradient), before[1] + rows
            self._sums[step] = (gradient, rows)
            while self._sums.get(self._version, (None, 0))[1] == self._batch_rows:
                self._take_step(*self._sums.pop(self._version))

    def _take_step(self, gradient: torch.Tensor, rows: int) -> None:
        square = float(torch.linalg.vector_norm(gradient)) ** 2
        # All servers take the same steps in the same order, so that they meet here.
        self._norm = clipped(gradient, self._clipping, self._sum_over_servers(square))
        self._shard.step(gradient, self._rate(self._version))
        self._claimed.pop(self._version, None)
        self._version, self._snapshot = self._version + 1, None
        due = [answer for version, answer in self._waiting if version <= self._version]
        self._waiting = [each for each in self._waiting if each[0] > self._version]
        for answer in due:
            answer(self._current())
        self._changed.notify_all()

    def when(self, version: int, answer: Callable[[Snapshot], None]) -> None:
        """Call `answer` with the newest weights as soon as they have `version` steps: now, or on another thread."""
        with self._changed:
            if self._version >= version:
                answer(self._current())
            else:
                self._waiting.append((version, answer))

    def pull(self, version: int, timeout_s: float) -> Snapshot:
        """The newest weights, once they have `version` steps.

        Raises:
            WaitTimeoutError: they do not come.
            Exception: what the server's thread has failed of.
        """
        with self._changed:
            came = self._changed.wait_for(lambda: self._version >= version or self._error is not None, timeout_s)
            if self._error is not None:
                raise self._error
            if not came:
                raise WaitTimeoutError(f"all workers' gradients of step {self._version}", timeout_s, SETTING)
            return self._current()

    def claim(self, step: int, parts: int) -> int | None:
        """A part of global batch `step` that nobody has yet; None when all `parts` are taken."""
        with self._changed:
            part = self._claimed.get(step, 0)
            if step < self._version or part == parts:
                return None
            self._claimed[step] = part + 1
            return part

    def fail(self, error: BaseException) -> None:
        """Tell whoever waits."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def state(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Copies of the weights and the optimizer's moments."""
        with self._changed:
            return self._shard.weights.clone(), self._shard.moments()

    def _current(self) -> Snapshot:
        if self._snapshot is None or self._snapshot.version != self._version:
            self._snapshot = Snapshot(self._version, self._shard.weights.clone(), self._norm)
        return self._snapshot


class Counter:
    """Adds up, from any thread."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def add(self, amount: int) -> None:
        """Add `amount`."""
        with self._lock:
            self.total += amount


class Network:
    """Messages between the workers of one process group, counted."""

    def __init__(self, group: Any, timeout_s: float, sent: Counter) -> None:
        self._group, self._timeout_s, self._sent = group, timeout_s, sent

    def send(self, tensor: torch.Tensor, peer: int, tag: int) -> Any:
        """Begin to send; the tensor must stay as it is until the result is waited for."""
        self._sent.add(tensor.nbytes)
        return self._group.send([tensor], peer, tag)

    def receive(self, tensor: torch.Tensor, peer: int, tag: int, what: str) -> torch.Tensor:
        """Wait for a message of `peer`.

        Raises:
            WaitTimeoutError: it does not come.
        """
        self.wait(self._group.recv([tensor], peer, tag), what)
        return tensor

    def receive_any(self, tensor: torch.Tensor, tag: int) -> int:
        """Wait for a message of anyone, as long as the gang lives; who sent it."""
        work = self._group.recv_anysource([tensor], tag)
        work.wait()
        sender: int = work._source_rank()  # as torch.distributed.recv asks
        return sender

    def wait(self, work: Any, what: str) -> None:
        """Wait for a message that is on the way."""
        try:
            work.wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            if "timed out" not in str(error).lower():
                raise
            raise WaitTimeoutError(what, self._timeout_s, SETTING) from error


def header(*numbers: int) -> torch.Tensor:
    """Up to three whole numbers as a message."""
    return torch.tensor([*numbers, *[0] * (3 - len(numbers))], dtype=torch.int64)


class ServerThread:
    """Answers the requests of the other workers until each has said goodbye."""

    def __init__(self, server: Server, network: Network, size: int, num_peers: int) -> None:
        self._server, self._network, self._size, self._peers = server, network, size, num_peers
        self._replies: dict[int, list[tuple[Any, torch.Tensor]]] = {}
        self._thread = threading.Thread(target=self._run, name="parameter-server", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait until all have said goodbye."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while self._peers:
                message = header()
                sender = self._network.receive_any(message, REQUEST)
                kind, first, second = message.tolist()
                self._handle(Kind(kind), first, second, sender)
        except BaseException as error:  # noqa: BLE001 - the worker's own thread raises it
            self._server.fail(error)

    def _handle(self, kind: Kind, first: int, second: int, sender: int) -> None:
        match kind:
            case Kind.PUSH:
                gradient = torch.empty(self._size)
                self._network.receive(gradient, sender, GRADIENT, f"the gradient of worker {sender}")
                self._server.push(first, second, gradient)
            case Kind.PULL:
                self._server.when(first, lambda snapshot: self._hand_out(snapshot, second, sender))
            case Kind.CLAIM:
                part = self._server.claim(first, second)
                self._reply(sender, [(header(-1 if part is None else part), REPLY)])
            case Kind.BYE:
                self._peers -= 1

    def _hand_out(self, snapshot: Snapshot, known: int, peer: int) -> None:
        messages = [(header(snapshot.version), REPLY)]
        if snapshot.version != known:
            messages.append((snapshot.weights, WEIGHTS))
        self._reply(peer, messages)

    def _reply(self, peer: int, messages: list[tuple[torch.Tensor, int]]) -> None:
        for work, _ in self._replies.pop(peer, []):
            self._network.wait(work, f"worker {peer} to take what it asked for")
        self._replies[peer] = [(self._network.send(tensor, peer, tag), tensor) for tensor, tag in messages]
