"""vLLM on GPUs, by its `AsyncLLM` (0.29 and later): paged attention, continuous batching, tensor parallelism.

vLLM runs in a process of its own that this engine starts and ends. It reads the model's folder as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncGenerator, Collection
from pathlib import Path
from typing import Any

from modelyard.errors import InputError, UnavailableError
from modelyard.extras import optional
from modelyard.serving.engines.json_schema import plain_schema
from modelyard.serving.protocol import EngineRequest, EngineStats, Feature, Sampling, TokenLogprob, Tokens

MAX_TOP_LOGPROBS = 20


class VLLMEngine:
    """An `AsyncLLM` behind the `Engine` protocol; used by one event loop."""

    name = "vllm"
    features: frozenset[Feature] = frozenset({"logprobs", "top_logprobs", "seed", "json_schema"})

    def __init__(
        self,
        folder: Path,
        *,
        eos_ids: Collection[int] = (),
        vocab_tokens: int | None = None,
        context_tokens: int | None = None,
        max_sequences: int = 64,
        gpu_memory_share: float = 0.9,
        gpus: int = 1,
        **engine_options: Any,
    ) -> None:
        """Start the engine's process and load the weights; takes minutes, so call it on a thread.

        Args:
            folder: the model's files: safetensors, `config.json`, tokenizer.
            eos_ids: tokens that end an answer, beside the model's own.
            vocab_tokens: ids below this may be chosen; the rest pads the model's vocabulary.
            context_tokens: most tokens of a sequence; by default what the model can.
            max_sequences: most sequences in one step.
            gpu_memory_share: share of each GPU's memory for weights and cache.
            gpus: GPUs that the model is split over (tensor parallelism).
            engine_options: further fields of vLLM's `AsyncEngineArgs`, as they are.

        Raises:
            MissingExtraError: vLLM is not installed.
            InputError: vLLM does not know the model, or a sequence of the context does not fit into the memory.
        """
        # how much is used, of what and by whom is nobody else's business
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_DO_NOT_TRACK", "1")
        self._inputs = optional("vllm.inputs", "vllm", "vllm")
        self._params = optional("vllm.sampling_params", "vllm", "vllm")
        arguments = optional("vllm.engine.arg_utils", "vllm", "vllm")
        engine = optional("vllm.v1.engine.async_llm", "vllm", "vllm")
        self._dead: type[Exception] = optional("vllm.v1.engine.exceptions", "vllm", "vllm").EngineDeadError
        self._refused: type[Exception] = optional("vllm.exceptions", "vllm", "vllm").VLLMClientError
        self._eos_ids = frozenset(eos_ids)
        self._numbers = itertools.count()
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._seen = (0, 0, 0.0)
        try:
            self._engine = engine.AsyncLLM.from_engine_args(
                arguments.AsyncEngineArgs(
                    model=str(folder),
                    max_model_len=context_tokens,
                    max_num_seqs=max_sequences,
                    gpu_memory_utilization=gpu_memory_share,
                    tensor_parallel_size=gpus,
                    max_logprobs=MAX_TOP_LOGPROBS,
                    trust_remote_code=False,
                    load_format="safetensors",
                    **engine_options,
                ),
                stat_loggers=[self._stat_logger()],
            )
        except ValueError as error:  # an unknown architecture, or a cache too small for the context
            raise InputError(f"vLLM refuses {str(folder)!r}: {error}", "see the log of its process") from error
        config = self._engine.model_config
        self.context_tokens = int(config.max_model_len)
        padded = vocab_tokens is not None and vocab_tokens < config.get_vocab_size()
        self._allowed = list(range(vocab_tokens)) if padded and vocab_tokens is not None else None

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Tokens, None]:
        """The answer as it comes; closing the iterator aborts it.

        Raises:
            InputError: vLLM refuses the request, e.g. its JSON schema.
            UnavailableError: the engine's process ended.
        """
        sampling = request.sampling
        room = self.context_tokens - len(request.prompt_ids)
        options = sampling_options(sampling, room, self._eos_ids, self._allowed)
        schema = options.pop("json_schema", None)
        if schema is not None:
            options["structured_outputs"] = self._params.StructuredOutputsParams(json=schema)
        prompt = self._inputs.tokens_input(list(request.prompt_ids))
        number = f"{request.request_id}-{next(self._numbers)}"  # vLLM wants it unique
        try:
            params = self._params.SamplingParams(output_kind=self._params.RequestOutputKind.DELTA, **options)
            async with contextlib.aclosing(self._engine.generate(prompt, params, number)) as outputs:
                self._prompt_tokens += len(request.prompt_ids)
                async for output in outputs:
                    tokens = tokens_of(output.outputs[0], self._eos_ids, sampling.top_logprobs)
                    self._generated_tokens += len(tokens.ids)
                    yield tokens
        except self._dead as error:
            raise UnavailableError("the engine's process ended", "see its log") from error
        except (self._refused, ValueError) as error:
            raise InputError(f"vLLM refuses the request: {error}") from error

    def stats(self) -> EngineStats:
        """As of the last step that vLLM reported."""
        running, waiting, usage = self._seen
        return EngineStats(running, waiting, usage, self._prompt_tokens, self._generated_tokens)

    async def close(self) -> None:
        """End the engine's process."""
        await asyncio.to_thread(self._engine.shutdown)

    def _stat_logger(self) -> Any:
        """A class, as vLLM builds one for each of its engines; the object only remembers the newest numbers."""
        engine = self
        base = optional("vllm.v1.metrics.loggers", "vllm", "vllm").StatLoggerBase

        class Remember(base):  # type: ignore[misc, valid-type]
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                pass

            def record(self, scheduler_stats: Any, iteration_stats: Any, *rest: Any, **others: Any) -> None:
                if scheduler_stats is not None:
                    deferred = getattr(scheduler_stats, "num_skipped_waiting_reqs", 0)
                    engine._seen = (
                        scheduler_stats.num_running_reqs,
                        scheduler_stats.num_waiting_reqs + deferred,
                        float(scheduler_stats.kv_cache_usage),
                    )

            def log_engine_initialized(self) -> None:
                pass

        return Remember


def sampling_options(
    sampling: Sampling, room: int, eos_ids: Collection[int], allowed: list[int] | None = None
) -> dict[str, Any]:
    """vLLM's `SamplingParams` for a request with `room` tokens left in the context.

    `json_schema` is left for the caller to wrap; `detokenize` is off, because text is made elsewhere.

    Raises:
        InputError: more log probabilities than the engine was started for, or a JSON schema beyond the plain part.
    """
    if (sampling.top_logprobs or 0) > MAX_TOP_LOGPROBS:
        raise InputError(f"top_logprobs={sampling.top_logprobs} is above {MAX_TOP_LOGPROBS}")
    options: dict[str, Any] = {
        "n": 1,
        "max_tokens": min(sampling.max_tokens, room),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": sampling.seed,
        "logprobs": sampling.top_logprobs,
        "stop_token_ids": sorted(eos_ids),
        "detokenize": False,
    }
    if allowed is not None:
        options["allowed_token_ids"] = allowed
    if sampling.json_schema is not None:
        options["json_schema"] = plain_schema(sampling.json_schema)
    return options


def tokens_of(output: Any, eos_ids: Collection[int], top: int | None) -> Tokens:
    """One of vLLM's `CompletionOutput`s (its newest tokens) as ours.

    Raises:
        UnavailableError: vLLM gave the request up.
    """
    ids, positions = tuple(output.token_ids), list(output.logprobs or ())
    reason = output.finish_reason
    if reason not in (None, "stop", "length"):
        raise UnavailableError(f"vLLM gave the request up ({reason})", "try again")
    if reason == "stop" and ids and ids[-1] in eos_ids:
        ids, positions = ids[:-1], positions[: len(ids) - 1]
    if top is None:
        return Tokens(ids, finish_reason=reason)
    logprobs = []
    for token_id, found in zip(ids, positions, strict=True):
        ranked = sorted((item.rank, number) for number, item in found.items() if item.rank is not None)
        likeliest = tuple((number, found[number].logprob) for rank, number in ranked if rank <= top)
        logprobs.append(TokenLogprob(token_id, found[token_id].logprob, likeliest))
    return Tokens(ids, tuple(logprobs), reason)
