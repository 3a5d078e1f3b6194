"""Teachers that a student asks while it is trained: beside it, behind Ray Serve, or behind a gateway.

Letters in shapes: B rows, T tokens, C classes or vocabulary, k likeliest answers, P places of a text.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard.errors import ConfigError, TrainingError, WaitTimeoutError
from modelyard.tasks.distillation import (
    Distillation,
    HiddenStates,
    Likely,
    TeacherGateway,
    TeacherService,
    divergence,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

DEPLOYMENT = "Teacher"
"""Name of the deployment in a teacher's Serve application."""


class Teacher(ABC):
    """Whoever knows better. One per worker; called from its training loop alone."""

    def __init__(self, config: Distillation) -> None:
        self._config = config

    @abstractmethod
    def judge(
        self, student: Tensor, inputs: Sequence[Any], options: Mapping[str, Any], judged: Tensor | None
    ) -> Tensor:
        """Mean divergence of each row (B,), in nats.

        Args:
            student: its scores (B, C), or (B, T, C).
            inputs, options: what it was called with.
            judged: bool, the places of texts that count; None without texts.
        """

    @abstractmethod
    def write(self, prompt: Tensor, tokens: int) -> Tensor:
        """Texts that begin with `prompt` and go on with `tokens` tokens drawn from the teacher."""

    @property
    def states(self) -> list[Tensor]:
        """Hidden states of the last judgement, where the teacher is near enough to show them."""
        raise AssertionError("the config refuses hidden states of this teacher")


class LocalTeacher(Teacher):
    """A model in the worker itself."""

    def __init__(self, model: nn.Module, config: Distillation) -> None:
        super().__init__(config)
        self.model: Any = model.float().eval().requires_grad_(False)
        self._states = HiddenStates(model) if config.hidden else None

    def judge(
        self, student: Tensor, inputs: Sequence[Any], options: Mapping[str, Any], judged: Tensor | None
    ) -> Tensor:
        """See `Teacher`."""
        import torch

        self.model.to(student.device)
        with torch.no_grad():
            aim = scores_of(self.model(*inputs, **options))
        return mean_of_rows(divergence(student, aim, self._config), judged)

    def write(self, prompt: Tensor, tokens: int) -> Tensor:
        """See `Teacher`."""
        self.model.to(prompt.device)
        return write(self.model, prompt, tokens)

    @property
    def states(self) -> list[Tensor]:
        """See `Teacher`."""
        assert self._states is not None
        return self._states.states


class ServedTeacher(Teacher):
    """A deployment of `compression.teaching` on the same Ray cluster; it tells its likeliest answers."""

    def __init__(self, service: TeacherService, config: Distillation) -> None:
        super().__init__(config)
        assert service.application is not None
        self._service, self._application = service, service.application
        self._deployment: Any = None

    def judge(
        self, student: Tensor, inputs: Sequence[Any], options: Mapping[str, Any], judged: Tensor | None
    ) -> Tensor:
        """See `Teacher`."""
        import torch

        given = [_plain(value) for value in inputs], {name: _plain(value) for name, value in options.items()}
        ids, logs = self._ask("likely", *given, self._service.top, self._config.temperature)
        device = student.device
        aim = Likely(torch.from_numpy(ids).to(device).long(), torch.from_numpy(logs).to(device).float())
        return mean_of_rows(divergence(student, aim, self._config), judged)

    def write(self, prompt: Tensor, tokens: int) -> Tensor:
        """See `Teacher`."""
        import torch

        seed = int(torch.randint(1 << 31, ()))
        written = self._ask("write", _plain(prompt), tokens, seed)
        return torch.from_numpy(written).to(prompt.device)

    def _ask(self, method: str, *given: Any) -> Any:
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        timeout_s = self._service.timeout_s
        try:
            if self._deployment is None:
                self._deployment = serve.get_deployment_handle(DEPLOYMENT, self._application)
            return getattr(self._deployment, method).remote(*given).result(timeout_s=timeout_s)
        except TimeoutError:
            raise WaitTimeoutError("the teacher's answer", timeout_s, "distillation.service.timeout_s") from None
        except (RayError, RayServeException) as error:
            *_, reason = str(error).strip().splitlines()
            raise TrainingError(
                f"the teacher {self._application!r} does not answer: {reason}", "see `modelyard serve status`"
            ) from error


class GatewayTeacher(Teacher):
    """A model behind a gateway, which tells few log probabilities: at some places of each text."""

    def __init__(self, gateway: TeacherGateway, config: Distillation, tokenizer: Path) -> None:
        super().__init__(config)
        from modelyard.tasks.generation import load_tokenizer

        self._gateway = gateway
        self._ids = unambiguous(_token_texts(load_tokenizer(tokenizer)))

    def judge(
        self, student: Tensor, inputs: Sequence[Any], options: Mapping[str, Any], judged: Tensor | None
    ) -> Tensor:
        """See `Teacher`."""
        import torch

        assert judged is not None
        tokens_BT = options["input_ids"]
        count = min(self._gateway.places, int(judged.sum(dim=1).min()))
        places_BP = torch.multinomial(judged.float(), count)
        prompts = [
            row[: int(place) + 1].tolist() for row, places in zip(tokens_BT, places_BP, strict=True) for place in places
        ]
        known = [logs for choice in self._complete(prompts, 1) for logs in choice[:1]]
        ids, logs = self._as_tensors(known, (*places_BP.shape, -1))
        chosen = student.gather(1, places_BP[:, :, None].expand(-1, -1, student.shape[-1]))
        aim = Likely(ids.to(student.device), logs.to(student.device))
        return divergence(chosen, aim, self._config).mean(dim=1)

    def write(self, prompt: Tensor, tokens: int) -> Tensor:
        """Never called."""
        raise AssertionError("the config refuses text of this teacher")

    def _as_tensors(self, known: list[dict[int, float]], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        import torch

        top = self._gateway.top + 1  # the chosen one may come beside the likeliest
        ids = torch.zeros(len(known), top, dtype=torch.long)
        logs = torch.full((len(known), top), float("-inf"))
        for row, found in enumerate(known):
            for column, (token, log) in enumerate(sorted(found.items(), key=lambda item: -item[1])[:top]):
                ids[row, column], logs[row, column] = token, log
        return ids.view(shape), logs.view(shape)

    def _complete(self, prompts: list[list[int]], tokens: int) -> list[list[dict[int, float]]]:
        """Of each prompt's continuation, the log probabilities that are told at each token, by token id."""
        size = self._gateway.prompts
        found: list[list[dict[int, float]]] = []
        for start in range(0, len(prompts), size):
            chunk = prompts[start : start + size]
            body = {"model": self._gateway.model, "prompt": chunk, "max_tokens": tokens, "logprobs": self._gateway.top}
            choices = self._post({**body, "temperature": 0})["choices"]
            for choice in sorted(choices, key=lambda each: each["index"]):
                told = (choice.get("logprobs") or {}).get("top_logprobs") or [{}]  # nothing: the text ends here
                found.append([{self._ids[t]: log for t, log in one.items() if t in self._ids} for one in told])
        return found

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        gateway = self._gateway
        headers = {"content-type": "application/json"}
        if key := os.environ.get(gateway.key_variable):
            headers["authorization"] = f"Bearer {key}"
        url = f"{gateway.url.rstrip('/').removesuffix('/v1')}/v1/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=gateway.timeout_s) as answer:
                content: dict[str, Any] = json.load(answer)
                return content
        except urllib.error.HTTPError as error:
            reason = error.read(2000).decode(errors="replace")
            todo = f"set {gateway.key_variable} on every worker" if error.code == 401 else "see the gateway's answer"
            raise TrainingError(f"the teacher at {gateway.url} refuses with {error.code}: {reason}", todo) from None
        except TimeoutError:
            raise WaitTimeoutError(
                "the gateway's answer", gateway.timeout_s, "distillation.gateway.timeout_s"
            ) from None
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"the teacher at {gateway.url} does not answer: {error}", "is the gateway up?"
            ) from None


def teacher_of(config: Distillation, tokenizer: Path | None) -> Teacher:
    """The teacher that a config names, ready to be asked from this worker.

    Raises:
        ConfigError: a gateway's tokens cannot be told, for there is no tokenizer.
    """
    from modelyard.tasks import load_model

    if config.gateway is not None:
        if tokenizer is None:
            raise ConfigError("distillation.gateway: the dataset has no tokenizer, so its tokens have no text")
        return GatewayTeacher(config.gateway, config, tokenizer)
    if config.service is not None:
        return ServedTeacher(config.service, config)
    assert config.teacher is not None
    return LocalTeacher(load_model(Path(config.teacher))[1], config)


def write(model: Any, prompt: Tensor, tokens: int) -> Tensor:
    """Texts that begin with `prompt` and go on with exactly `tokens` tokens drawn from the model."""
    import torch

    training = model.training
    model.eval()
    with torch.no_grad():
        written: Tensor = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            pad_token_id=0,
        )
    model.train(training)
    return written


def scores_of(output: Any) -> Tensor:
    """The scores in what a model returned."""
    scores: Tensor = output.logits if hasattr(output, "logits") else output
    return scores


def mean_of_rows(each: Tensor, judged: Tensor | None) -> Tensor:
    """Mean over the judged places of each row, (B,)."""
    if each.ndim == 1:
        return each
    assert judged is not None
    return (each * judged).sum(dim=1) / judged.sum(dim=1).clamp(min=1)


def unambiguous(texts: Sequence[str]) -> dict[str, int]:
    """Token id by text, of the texts that one token alone has. Pure."""
    found: dict[str, int] = {}
    twice: set[str] = set()
    for token, text in enumerate(texts):
        if text in found:
            twice.add(text)
        found[text] = token
    return {text: token for text, token in found.items() if text not in twice}


def _token_texts(tokenizer: Any) -> list[str]:
    """The text of each token by itself, as servers of completions write it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_byte_level = backend is not None and '"ByteLevel"' in json.dumps(json.loads(backend.to_str())["decoder"])
    special = set(tokenizer.all_special_tokens)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [
        tokenizer.convert_tokens_to_string([token])
        if is_byte_level and token not in special
        else str(token).replace("\u2581", " ")
        for token in tokens
    ]


def _plain(value: Any) -> Any:
    """Tensors as numpy arrays, the rest as it is."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value
