"""Served models under load while parts of the cluster are killed and changed: python serve_and_break.py FOLDER PORT.

A cluster of its own: a head for the cloud, and one node of the edge site `north`. FOLDER is where keys, models and
journals go. Prints one JSON object of what was seen.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import ray
from ray.cluster_utils import Cluster
from tests.serving.models import register, tiny_llama

from modelyard.config import parse
from modelyard.security import KeyStore
from modelyard.serving.deployment import control
from modelyard.serving.deployment.config import ServingConfig
from modelyard.serving.deployment.routing import Share
from modelyard.serving.deployment.shares import ShareStore

PROMPT, TOKENS = "The quick brown", 12
CALLERS = 3


class Caller:
    """Asks in a loop, by threads, until told to stop; counts answers, failures and who answered."""

    def __init__(self, url: str, key: str, *, retries: int = 0, site: str | None = None, model: str = "gpt") -> None:
        headers = {"X-Modelyard-Site": site} if site else {}
        self._client = openai.OpenAI(
            base_url=url, api_key=key, max_retries=retries, timeout=90, default_headers=headers
        )
        self._model = model
        self._over = threading.Event()
        self.texts: Counter[str] = Counter()
        self.sites: Counter[str] = Counter()
        self.failures: list[str] = []
        self.last_s = time.monotonic()
        self.silence_s = 0.0
        """Longest time between two answers."""

    def ask(self) -> str:
        """One answer."""
        raw = self._client.completions.with_raw_response.create(
            model=self._model, prompt=PROMPT, max_tokens=TOKENS, temperature=0
        )
        self.sites[raw.headers.get("x-modelyard-site", "cloud")] += 1
        return str(raw.parse().choices[0].text)

    @contextmanager
    def calling(self) -> Iterator[Caller]:
        """Ask all the time during the body."""
        threads = [threading.Thread(target=self._loop) for _ in range(CALLERS)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._over.set()
            for thread in threads:
                thread.join(120)

    def _loop(self) -> None:
        while not self._over.is_set():
            try:
                self.texts[self.ask()] += 1
                now = time.monotonic()
                self.silence_s, self.last_s = max(self.silence_s, now - self.last_s), now
            except openai.OpenAIError as error:
                self.failures.append(f"{type(error).__name__}: {error}"[:300])


def until(claim: str, condition: Callable[[], Any], timeout_s: float = 120.0) -> float:
    """Seconds until it is true."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            raise AssertionError(f"never happened: {claim}")
        time.sleep(0.1)
    return time.monotonic() - began


def kill(name: str) -> int:
    """SIGKILL to the processes of Ray whose title holds `name`; how many there were."""
    killed = 0
    for process in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                process.kill()
                killed += 1
        except psutil.Error:
            continue
    return killed


def quiet(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Deploy, break, and tell."""
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    database = f"sqlite:///{folder / 'gateway.db'}"
    os.environ["MODELYARD_GATEWAY_DB"] = database
    register(tiny_llama(folder / "one", seed=0), "gpt")
    register(tiny_llama(folder / "two", seed=1), "gpt")
    register(tiny_llama(folder / "slow", seed=2, hidden_size=768, num_hidden_layers=12), "gpt")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8})
    edge = cluster.add_node(num_cpus=2, labels={"modelyard/tier": "edge", "modelyard/site": "north"})
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    model = {"reference": "models:/gpt/1", "engine": "transformers", "cache_mib": 64, "max_sequences": 8}
    config = parse(
        ServingConfig,
        {
            "port": port,
            "gateway": {"replicas": 2, "cpus": 0.1, "rollout": {"min_calls": 15, "max_latency_ratio": 3}},
            "models": [
                {"model": model},
                {"model": model, "placement": {"site": "north"}},
                {"model": {**model, "name": "sleepy"}, "min_replicas": 0, "max_replicas": 2, "zero_after_s": 2.0},
            ],
        },
    )
    control.up(config, quiet)
    seen: dict[str, Any] = {}
    key = KeyStore(database).create(tenant="test")
    url = f"http://127.0.0.1:{port}/v1"

    def caller(**options: Any) -> Caller:
        return Caller(url, key, **options)

    # where replicas run, and who answers
    now = control.current()
    head = ray.get_runtime_context().get_node_id()
    seen["cloud_on_head"] = set(now["gpt"].nodes) == {head}
    seen["site_on_its_node"] = head not in now["gpt@north"].nodes and len(now["gpt@north"].nodes) == 1
    plain, north = caller(), caller(site="north")
    until("the gateway answers", lambda: _answers(plain))
    first = plain.ask()
    north.ask()
    seen["answered_by"] = [next(iter(plain.sites)), next(iter(north.sites))]

    # a replica dies
    with caller().calling() as load:
        until("calls are answered", lambda: sum(load.texts.values()) > 10)
        seen["replicas_killed"] = kill("ServeReplica:gpt:Model")
        mark, enough = time.monotonic(), sum(load.texts.values()) + 20
        until("calls are answered again", lambda: load.last_s > mark and sum(load.texts.values()) > enough)
    seen["replica_killed"] = {"failures": load.failures, "texts": len(load.texts), "same": first in load.texts}
    seen["replica_silence_s"] = load.silence_s

    # the gateway's replicas and the proxy die; the client's own retries are what is left then
    for name, title in (("gateway_killed", "ServeReplica:gateway:Gateway"), ("proxy_killed", "ProxyActor")):
        with caller(retries=8).calling() as load:
            until("calls are answered", lambda load=load: sum(load.texts.values()) > 5)
            count = kill(title)
            mark = time.monotonic()
            until("calls are answered again", lambda load=load, mark=mark: load.last_s > mark + 1.0)
        seen[name] = {"killed": count, "failures": load.failures, "texts": len(load.texts)}
        seen[f"{name}_silence_s"] = load.silence_s

    # scale up and down, canary and promotion, under load
    with caller().calling() as load:
        control.scale("gpt", 2, 2, quiet)
        control.scale("gpt", 1, 1, quiet)
        until("one replica is left", lambda: control.current()["gpt"].running == 1)
    seen["scaled"] = {"failures": load.failures, "texts": len(load.texts)}
    with caller().calling() as load:
        control.canary("gpt", "models:/gpt/2", Share(40.0), database, quiet)
        until("both versions answer", lambda: len(load.texts) == 2)
        time.sleep(2.5)  # every gateway has looked
        before = Counter(load.texts)
        until("there are many", lambda: sum(load.texts.values()) > sum(before.values()) + 150)
        both = Counter(load.texts) - before
        seen["canary_withdrawn"] = ShareStore(database).shares()["gpt--canary"].withdrawn
        control.promote("gpt", database, quiet)
    second = next(text for text in both if text != first)
    seen["canary"] = {"failures": load.failures, "share": both[second] / sum(both.values())}
    last = caller()
    until("only the promoted version answers", lambda: last.ask() == second)
    seen["promoted"] = control.current()["gpt"].served.reference

    # a canary that is too slow goes by itself, and a shadow is never heard
    with caller().calling() as load:
        control.canary("gpt", "models:/gpt/3", Share(50.0), database, quiet)
        shares = ShareStore(database)
        until("the slow canary is withdrawn", lambda: shares.shares()["gpt--canary"].withdrawn)
        seen["withdrawn"] = shares.shares()["gpt--canary"].withdrawn
    seen["slow_canary"] = {"failures": load.failures}
    control.canary("gpt", "models:/gpt/3", Share(100.0, is_shadow=True), database, quiet)
    time.sleep(2.5)  # every gateway has looked
    with caller().calling() as load:
        until("the shadow is asked", lambda: shares.outcomes(["gpt--canary"], 60.0)["gpt--canary"].calls > 3)
    seen["shadow"] = {"failures": load.failures, "texts": list(load.texts) == [second]}
    control.rollback("gpt", database)

    # nothing runs until somebody asks
    until("the idle model is gone", lambda: control.current()["sleepy"].running == 0)
    began = time.monotonic()
    seen["woken"] = caller(model="sleepy").ask() == first
    seen["wake_s"] = time.monotonic() - began

    # the site's node is lost
    with caller(site="north").calling() as load:
        until("the site answers", lambda: load.sites["north"] > 5)
        cluster.remove_node(edge, allow_graceful=False)
        before = load.sites["cloud"]
        seen["failover_s"] = until("the cloud answers for it", lambda: load.sites["cloud"] > before + 5)
    seen["site_lost"] = {"failures": load.failures}

    seen["site_silence_s"] = load.silence_s
    print(json.dumps(seen), flush=True)
    ray.shutdown()
    cluster.shutdown()


def _answers(caller: Caller) -> bool:
    try:
        caller.ask()
    except openai.OpenAIError:
        return False
    return True


if __name__ == "__main__":
    main()
