"""The default engine: any Hugging Face causal language model, with continuous batching inside a fixed memory.

transformers has a continuous batching of its own; it samples all requests of a batch alike, takes one seed for all of
them, reports no likeliest tokens, and computes less per second here (see `benchmarks/serving.py`). So the loop is ours,
on the model's own `forward`.
"""

from __future__ import annotations

import inspect
import random
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modelyard.serving.engines import ragged
from modelyard.serving.engines.memory import MIB, fit_context
from modelyard.serving.engines.sampling import choose, logprobs
from modelyard.serving.engines.threaded import ThreadedEngine
from modelyard.serving.protocol import EngineRequest, EngineStats, Feature, Sampling, Tokens


def transformers_engine(model: nn.Module, **options: Any) -> ThreadedEngine:
    """A `TransformersCore` (its arguments are there) on a thread of its own."""
    return ThreadedEngine(lambda: TransformersCore(model, **options))


@dataclass(eq=False)
class _Sequence:
    key: int
    tokens: list[int]
    """Prompt and answer."""
    sampling: Sampling
    end: int
    """Length at which it stops."""
    generator: random.Random
    cache: ragged.SequenceCache
    due: int = 0
    """Tokens of it in the step that is being made."""


class TransformersCore:
    """Steps of a batch whose sequences come and go. Memory: the weights, and a cache that never exceeds its budget.

    A sequence takes blocks of the cache as it grows. When there are none left the youngest one gives up its own and
    waits in front; its answer so far is read again later, and goes on as if nothing had happened.
    """

    name = "transformers"
    features: frozenset[Feature] = frozenset({"logprobs", "top_logprobs", "seed"})

    def __init__(
        self,
        model: nn.Module,
        *,
        eos_ids: Collection[int] = (),
        vocab_tokens: int | None = None,
        cache_mib: int = 1024,
        context_tokens: int | None = None,
        threads: int | None = None,
        max_sequences: int = 64,
        step_tokens: int = 256,
    ) -> None:
        """Take over `model`; it answers to nobody else from here on.

        Args:
            model: a transformers causal language model in eval mode, on its device, adapters merged.
            eos_ids: tokens that end an answer.
            vocab_tokens: ids below this may be chosen; the rest pads the model's vocabulary.
            cache_mib: most memory for keys and values.
            context_tokens: most tokens of a sequence; by default the model's positions, or fewer where the budget ends.
            threads: CPU threads for the arithmetic, the CPUs of the replica; more than there are slow it down badly.
            max_sequences: most sequences in one step.
            step_tokens: most tokens in one step; bounds how long a long prompt delays the others.

        Raises:
            CapacityError: a sequence of `context_tokens` does not fit into the budget.
            InputError: the model cannot run on this engine.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        net: Any = model
        self._model = net
        self._shape = ragged.prepare(model)
        self._eos_ids = frozenset(eos_ids)
        self._vocab_tokens = vocab_tokens
        self._max_sequences = max_sequences
        self._step_tokens = step_tokens
        self._blocks = cache_mib * MIB // (self._shape.token_bytes * ragged.BLOCK_TOKENS)
        self.context_tokens = fit_context(
            context_tokens,
            getattr(net.config.get_text_config(), "max_position_embeddings", None),
            self._blocks * ragged.BLOCK_TOKENS,
            self._shape.token_bytes,
            cache_mib,
        )
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._prompt_tokens = 0
        self._generated_tokens = 0

    def add(self, key: int, request: EngineRequest) -> None:
        sampling = request.sampling
        prompt = list(request.prompt_ids)
        self._waiting.append(
            _Sequence(
                key=key,
                tokens=prompt,
                sampling=sampling,
                end=min(len(prompt) + sampling.max_tokens, self.context_tokens),
                generator=random.Random(sampling.seed),
                cache=ragged.SequenceCache(self._shape),
            )
        )
        self._prompt_tokens += len(prompt)

    def cancel(self, key: int) -> None:
        self._running = [sequence for sequence in self._running if sequence.key != key]
        self._waiting = deque(sequence for sequence in self._waiting if sequence.key != key)

    @property
    def holds_gil(self) -> bool:
        return False

    @property
    def busy(self) -> bool:
        return bool(self._running or self._waiting)

    def step(self) -> Mapping[int, Tokens]:
        batch = self._compose()
        parts = [(s.tokens[s.cache.tokens : s.cache.tokens + s.due], s.cache) for s in batch]
        rows, ready, row = [], [], 0
        for sequence, (tokens, cache) in zip(batch, parts, strict=True):
            row += len(tokens)
            if cache.tokens + len(tokens) == len(sequence.tokens):  # all is read: this row tells what comes next
                rows.append(row - 1)
                ready.append(sequence)
        with torch.inference_mode():
            logits_BV = self._logits(parts, rows)
            chosen = choose(logits_BV, [s.sampling for s in ready], [s.generator for s in ready]) if ready else []
            answers = {
                sequence.key: self._answer(sequence, token, logits_V)
                for sequence, token, logits_V in zip(ready, chosen, logits_BV, strict=True)
            }
        self._generated_tokens += sum(len(tokens.ids) for tokens in answers.values())
        self._running = [s for s in self._running if s.key not in answers or answers[s.key].finish_reason is None]
        return answers

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            cache_usage=self._used() / self._blocks,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
        )

    def embed(self, tokens: Sequence[int]) -> list[float]:
        """The mean of the last layer's states over the tokens, at length 1: (hidden,)."""
        with torch.inference_mode():
            output, _ = ragged.forward(self._model.base_model, [(tokens, None)])
            mean = output.last_hidden_state[0].float().mean(dim=0)
            vector: list[float] = torch.nn.functional.normalize(mean, dim=0).tolist()
            return vector

    def close(self) -> None:
        self._running, self._waiting, self._model = [], deque(), None

    def _used(self) -> int:
        return sum(sequence.cache.blocks for sequence in self._running)

    def _compose(self) -> list[_Sequence]:
        """Choose the sequences of this step and their tokens in it, and give each the blocks it needs."""
        while self._waiting and len(self._running) < self._max_sequences:
            if self._used() + self._shape.blocks(len(self._waiting[0].tokens) + 1) > self._blocks:
                break
            sequence = self._waiting.popleft()
            sequence.cache.grow(self._shape.blocks(len(sequence.tokens) + 1))
            self._running.append(sequence)
        room = self._step_tokens
        batch: list[_Sequence] = []
        for sequence in sorted(self._running, key=lambda s: len(s.tokens) - s.cache.tokens > 1):  # answers first
            if room and sequence in self._running and self._make_room(sequence):
                sequence.due = min(room, len(sequence.tokens) - sequence.cache.tokens)
                room -= sequence.due
                batch.append(sequence)
        return [sequence for sequence in batch if sequence in self._running]

    def _make_room(self, sequence: _Sequence) -> bool:
        """Blocks for one more token, taken from the youngest sequences where none is free."""
        needed = self._shape.blocks(len(sequence.tokens))
        while self._used() - sequence.cache.blocks + needed > self._blocks:
            youngest = self._running.pop()
            youngest.cache = ragged.SequenceCache(self._shape)
            self._waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        sequence.cache.grow(needed)
        return True

    def _logits(self, parts: Sequence[tuple[list[int], ragged.SequenceCache]], rows: list[int]) -> torch.Tensor:
        """(B, V) for the wanted rows."""
        if self._keeps_logits:
            keep = torch.tensor(rows, dtype=torch.long, device=self._shape.device)
            output, _ = ragged.forward(self._model, parts, logits_to_keep=keep)
            logits_BV = output.logits[0]
        else:
            output, _ = ragged.forward(self._model, parts)
            logits_BV = output.logits[0, rows]
        return logits_BV[:, : self._vocab_tokens]  # type: ignore[no-any-return]

    def _answer(self, sequence: _Sequence, token: int, row: torch.Tensor) -> Tokens:
        if token in self._eos_ids:
            return Tokens((), finish_reason="stop")
        sequence.tokens.append(token)
        top = sequence.sampling.top_logprobs
        return Tokens(
            (token,),
            () if top is None else (logprobs(row, token, top),),
            "length" if len(sequence.tokens) >= sequence.end else None,
        )
