"""A gateway in front of a real model server, in a process of its own: python -m tests.serving.gateway.process.

    process.py DATABASE MODEL... [--threads N] [--settings JSON]

MODEL: `NAME[=ENGINE]`, in the registry of the environment. Prints `PORT n` when it answers. `/stats` shows, without a
key, what a test cannot see from outside: the engines' sequences and the memory of the process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Process:
    """One that runs."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def serving(database: str, *models: str, log: Path, threads: int = 1, **settings: Any) -> Iterator[Process]:
    """Start one, wait until it answers, and stop it at the end. Its log goes to `log`."""
    command = [sys.executable, "-m", __spec__.name, database, *models, "--threads", str(threads)]
    command += ["--settings", json.dumps(settings)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=out, text=True)
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("PORT ")), "")
        assert line, f"it ended before it answered: {log.read_text()[-3000:]}"
        yield Process(int(line.split()[1]), process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


async def main() -> None:
    """Answer until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("database")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--settings", type=json.loads, default={}, help="fields of GatewaySettings")
    options = parser.parse_args()

    import torch

    from modelyard.artifacts.registry import Registry
    from modelyard.serving.gateway import GatewaySettings, create_app
    from modelyard.serving.gateway.server import server
    from modelyard.serving.model_server import ModelServer
    from modelyard.serving.server_config import ModelConfig, ServerConfig

    torch.set_num_threads(options.threads)
    models = []
    for name, _, engine in (model.partition("=") for model in options.models):
        config = {"reference": f"models:/{name}", "engine": engine or "auto", "cache_mib": 256, "max_sequences": 64}
        models.append(ModelConfig.model_validate({**config, "name": f"{name}-{engine}" if engine else name}))
    model_server = ModelServer(ServerConfig(models=tuple(models), threads=options.threads), Registry.from_settings())
    await model_server.start()
    app = create_app(model_server, GatewaySettings(database=options.database, **options.settings))

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        engines = {name: asdict(found) for name, found in model_server.stats().items()}
        memory = psutil.Process().memory_info()
        tasks = len(asyncio.all_tasks())
        return {"pid": os.getpid(), "engines": engines, "rss_mib": memory.rss / 2**20, "tasks": tasks}

    serving = server(app, port=0)
    task = asyncio.ensure_future(serving.serve())
    while not serving.started and not task.done():
        await asyncio.sleep(0.01)
    print("PORT", serving.servers[0].sockets[0].getsockname()[1], flush=True)
    await task
    await model_server.close()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
