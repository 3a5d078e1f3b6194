"""The variants of `serving.py`: each in a process of its own that loads once and then runs rounds when it is told to.

A round is `streams` chats at once, greedy, of `tokens` tokens each. `serving_variants.py SPEC` is the gateway process.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 300.0
THREADS = 1
CACHE_MIB = 512


@dataclass
class Round:
    """What one round was."""

    streams: int
    seconds: float = 0.0
    cpu_s: float = 0.0
    """Of everything that answers; not of who asks over HTTP."""
    tokens: int = 0
    first_s: list[float] = field(default_factory=list)
    """To the first token of each stream."""
    gaps_s: list[float] = field(default_factory=list)
    """Between tokens."""


class Variant:
    """Runs rounds."""

    def run(self, streams: int, tokens: int) -> Round:
        """One round."""
        raise NotImplementedError

    def close(self) -> None:
        """End what was started."""


def work(connection: Connection, name: str, spec: dict[str, Any]) -> None:
    """A worker process: load, then answer (streams, tokens) with a `Round` until told to end."""
    os.environ.update(spec["environment"])
    import torch

    torch.set_num_threads(THREADS)
    try:
        variant = VARIANTS[name](spec)
    except BaseException as error:
        connection.send(error if isinstance(error, RuntimeError) else RuntimeError(repr(error)))
        raise
    connection.send("ready")
    try:
        while (told := connection.recv()) != "end":
            connection.send(variant.run(*told))
    finally:
        variant.close()


def messages(streams: int) -> list[list[dict[str, str]]]:
    """A chat for each stream; none of them is answered briefly."""
    return [
        [{"role": "user", "content": f"Tell me a long story about the {number + 3} mills of a small town by the sea."}]
        for number in range(streams)
    ]


def prompt_ids(folder: Path, streams: int) -> list[list[int]]:
    """The same chats as token ids."""
    from modelyard.serving.language import chat_ids
    from modelyard.tasks.generation import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return [list(chat_ids(tokenizer, chat, ())[0]) for chat in messages(streams)]


class Bare(Variant):
    """An engine in this process: token ids in, token ids out."""

    def __init__(self, spec: dict[str, Any], engine: str) -> None:
        self._folder = Path(spec["folder"])
        self._loop = asyncio.new_event_loop()
        model = load_model(self._folder)
        options: dict[str, Any] = {"cache_mib": CACHE_MIB, "threads": THREADS}
        if engine == "openvino":
            from modelyard.serving.engines.openvino import openvino_engine
            from modelyard.serving.export import write_gguf

            with tempfile.TemporaryDirectory() as temporary:
                file = Path(temporary) / "model.gguf"
                write_gguf(model, self._folder, file)
                del model
                self._engine = openvino_engine(file, self._folder, **options)
        else:
            from modelyard.serving.engines.transformers import transformers_engine

            self._engine = transformers_engine(model, **options)

    def run(self, streams: int, tokens: int) -> Round:
        from modelyard.serving.protocol import EngineRequest, Sampling

        done = Round(streams)

        async def one(ids: list[int]) -> None:
            began, last = time.perf_counter(), None
            async for part in self._engine.stream(EngineRequest("r", ids, Sampling(max_tokens=tokens, temperature=0))):
                last = noted(done, began, last)
                done.tokens += len(part.ids)

        async def all_of(prompts: list[list[int]]) -> None:
            await asyncio.gather(*(one(ids) for ids in prompts))

        prompts = prompt_ids(self._folder, streams)
        with measured(done, own_cpu_s):
            self._loop.run_until_complete(all_of(prompts))
        return done

    def close(self) -> None:
        self._loop.run_until_complete(self._engine.close())


class HFStatic(Variant):
    """transformers' own `generate` on one padded batch."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._folder = Path(spec["folder"])
        self._model = load_model(self._folder)

    def run(self, streams: int, tokens: int) -> Round:
        import torch

        prompts = prompt_ids(self._folder, streams)
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        done = Round(streams)
        with measured(done, own_cpu_s), torch.inference_mode():
            out = self._model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )
        done.tokens = int(out.shape[1] - longest) * streams
        return done


class HFContinuous(Variant):
    """transformers' own continuous batching, with a bounded cache."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self._folder = Path(spec["folder"])
        config = ContinuousBatchingConfig(page_size=32, num_blocks=128, max_batch_tokens=256)
        generation = GenerationConfig(do_sample=False, eos_token_id=-1)
        self._manager = load_model(self._folder).init_continuous_batching(generation, continuous_batching_config=config)
        self._manager.start()

    def run(self, streams: int, tokens: int) -> Round:
        prompts, done, left = prompt_ids(self._folder, streams), Round(streams), streams
        with measured(done, own_cpu_s):
            self._manager.add_requests(prompts, max_new_tokens=tokens)
            while left:
                result = self._manager.get_result(timeout=60)
                if result is not None and result.is_finished():
                    left, done.tokens = left - 1, done.tokens + len(result.generated_tokens)
        return done

    def close(self) -> None:
        self._manager.stop(block=True, timeout=10)


class OverHTTP(Variant):
    """Asks a server as the `openai` client would; `_cpu_s` counts the server's CPU."""

    model = "bench"
    path = "/v1/chat/completions"
    extra: dict[str, Any] = {"stream_options": {"include_usage": True}}

    def __init__(self, port: int, cpu_s: Callable[[], float], key: str = "") -> None:
        self._url, self._cpu_s = f"http://127.0.0.1:{port}", cpu_s
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._loop = asyncio.new_event_loop()
        self._session: Any = None

    def run(self, streams: int, tokens: int) -> Round:
        import aiohttp

        done = Round(streams)

        async def one(chat: list[dict[str, str]]) -> None:
            body = {"model": self.model, "messages": chat, "max_tokens": tokens, "temperature": 0, "stream": True}
            began, last, counted, usage = time.perf_counter(), None, 0, 0
            async with self._session.post(self._url + self.path, json=body | self.extra) as answer:
                if answer.status != 200:
                    raise RuntimeError(f"{answer.status}: {await answer.text()}")
                async for event in events(answer.content):
                    if event.get("error"):
                        raise RuntimeError(event["error"]["message"])
                    usage = (event.get("usage") or {}).get("completion_tokens", usage)
                    if any(choice["delta"].get("content") for choice in event["choices"]):
                        last, counted = noted(done, began, last), counted + 1
            done.tokens += usage or counted

        async def all_of() -> None:
            if self._session is None:
                connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=START_TIMEOUT_S)
                self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)
            await asyncio.gather(*(one(chat) for chat in messages(streams)))

        with measured(done, self._cpu_s):
            self._loop.run_until_complete(all_of())
        return done

    def close(self) -> None:
        if self._session is not None:
            self._loop.run_until_complete(self._session.close())


class Gateway(OverHTTP):
    """The gateway and a model server in one process."""

    def __init__(self, spec: dict[str, Any]) -> None:
        port, database, key = free_port(), *keyed()
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps({**spec, "port": port, "database": database})]
        )
        super().__init__(port, lambda: tree_cpu_s(self._process.pid), key)
        wait_for(f"http://127.0.0.1:{port}/readyz", self._process)

    def close(self) -> None:
        super().close()
        end(self._process)


class Serve(OverHTTP):
    """What `modelyard serve up` starts: proxy, gateway and replica on Ray Serve. CPU is that of all its processes."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import ray

        from modelyard.serving.deployment import control
        from modelyard.serving.deployment.config import ServingConfig

        port, database, key = free_port(), *keyed()
        self._folder = tempfile.mkdtemp(prefix="my-ray-")
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=self._folder)
        config = {
            "port": port,
            "gateway": {"settings": {"database": database}},
            "models": [{"model": model_config(spec), "placement": {"cpus": THREADS}}],
        }
        control.up(ServingConfig.model_validate(config), lambda text: None)
        own = os.getpid()
        super().__init__(port, lambda: tree_cpu_s(own) - own_cpu_s(), key)

    def close(self) -> None:
        import ray
        from ray import serve

        super().close()
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


class TransformersServe(OverHTTP):
    """`transformers serve`, with its continuous batching."""

    extra: dict[str, Any] = {}

    def __init__(self, spec: dict[str, Any]) -> None:
        self.model, port = spec["folder"], free_port()
        command = [str(Path(sys.executable).with_name("transformers")), "serve", spec["folder"], "--device", "cpu"]
        command += ["--port", str(port), "--continuous-batching", "--cb-block-size", "32", "--cb-num-blocks", "128"]
        command += ["--cb-max-batch-tokens", "256", "--dtype", "float32"]
        with Path(spec["log"]).open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        super().__init__(port, lambda: tree_cpu_s(self._process.pid))
        wait_for(f"http://127.0.0.1:{port}/health", self._process)

    def close(self) -> None:
        super().close()
        end(self._process)


VARIANTS: dict[str, Callable[[dict[str, Any]], Variant]] = {
    "engine": lambda spec: Bare(spec, spec["engine"]),
    "gateway": Gateway,
    "serve": Serve,
    "hf_static": HFStatic,
    "transformers": lambda spec: Bare(spec, "transformers"),
    "hf_continuous": HFContinuous,
    "transformers_serve": TransformersServe,
}


def why_not(name: str) -> str | None:
    """What a variant lacks here."""
    needs = {"transformers_serve": ("fastapi", "uvicorn", "openai"), "ray_serve_llm": ("vllm",)}.get(name, ())
    missing = [module for module in needs if find_spec(module) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def noted(done: Round, began: float, last: float | None) -> float:
    """Note a token that came now."""
    now = time.perf_counter()
    if last is None:
        done.first_s.append(now - began)
    else:
        done.gaps_s.append(now - last)
    return now


class measured:  # noqa: N801  (reads as a phrase: `with measured(done, own_cpu_s)`)
    """Wall and CPU seconds of a block."""

    def __init__(self, done: Round, cpu_s: Callable[[], float]) -> None:
        self._done, self._cpu_s = done, cpu_s

    def __enter__(self) -> None:
        self._cpu = self._cpu_s()
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._done.seconds = time.perf_counter() - self._began
        self._done.cpu_s = self._cpu_s() - self._cpu


async def events(content: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The JSON events of a stream."""
    async for line in content:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def load_model(folder: Path) -> Any:
    """In fp32."""
    from modelyard.tasks.language_models import load_folder

    return load_folder(folder).float().eval()


def model_config(spec: dict[str, Any]) -> dict[str, Any]:
    """Of the registered model, as `ModelConfig` reads it."""
    return {"reference": "models:/bench", "engine": spec["engine"], "cache_mib": CACHE_MIB}


def keyed() -> tuple[str, str]:
    """A database of its own, and a key in it whose limits are counted and far away."""
    from modelyard.security import KeyStore

    database = f"sqlite:///{tempfile.mkdtemp(prefix='my-keys-')}/gateway.db"
    keys = KeyStore(database)
    key = keys.create(tenant="bench", requests_per_minute=10**6, tokens_per_minute=10**9)
    keys.close()
    return database, key


def own_cpu_s() -> float:
    """CPU seconds of this process."""
    return time.process_time()


def tree_cpu_s(pid: int) -> float:
    """CPU seconds of a process and all its living descendants."""
    import psutil

    root, total = psutil.Process(pid), 0.0
    for process in (root, *root.children(recursive=True)):
        try:
            times = process.cpu_times()
            total += times.user + times.system
        except psutil.Error:
            continue
    return total


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[Any]) -> None:
    """Until it answers 200."""
    import urllib.request

    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode} before it answered")
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"{url} did not answer within {START_TIMEOUT_S:g} s")


def end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)


def serve_gateway(spec: dict[str, Any]) -> None:
    """The gateway's process."""
    import torch

    from modelyard.artifacts.registry import Registry
    from modelyard.serving.gateway import GatewaySettings, create_app
    from modelyard.serving.gateway.server import server
    from modelyard.serving.model_server import ModelServer
    from modelyard.serving.server_config import ServerConfig

    torch.set_num_threads(THREADS)
    config = ServerConfig.model_validate({"models": [model_config(spec)], "threads": THREADS})
    settings = GatewaySettings(database=spec["database"], backend_timeout_s=START_TIMEOUT_S)
    server(create_app(ModelServer(config, Registry.from_settings()), settings), port=spec["port"]).run()


if __name__ == "__main__":
    serve_gateway(json.loads(sys.argv[1]))
