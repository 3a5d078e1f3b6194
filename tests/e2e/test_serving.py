"""Models served on a cluster, under load, while its parts are killed and changed: no answer is lost."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `serve_and_break.py` saw, in one go: a cluster takes longer to start than to break."""
    folder = tmp_path_factory.mktemp("serving")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.e2e.serve_and_break", str(folder), str(port)]
    environment = {"MODELYARD_HOME": str(folder / "home"), "MODELYARD_STORE": str(folder / "home" / "store")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=570, check=False, env={**_environment(), **environment}
    )
    assert done.returncode == 0, done.stderr[-6000:]
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    result: dict[str, Any] = json.loads(line)
    return result


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def test_replicas_run_where_they_must_and_nowhere_else(seen: dict[str, Any]) -> None:
    assert (seen["cloud_on_head"], seen["site_on_its_node"]) == (True, True)


def test_a_caller_is_answered_at_his_site_and_told_so(seen: dict[str, Any]) -> None:
    assert seen["answered_by"] == ["cloud", "north"]


def test_no_call_is_lost_with_a_killed_replica_and_the_answers_stay_the_same(seen: dict[str, Any]) -> None:
    assert seen["replicas_killed"] == 1
    assert seen["replica_killed"] == {"failures": [], "texts": 1, "same": True}


@pytest.mark.parametrize("what", ["gateway_killed", "proxy_killed"])
def test_a_client_that_retries_loses_no_call_with_the_front_door(seen: dict[str, Any], what: str) -> None:
    assert seen[what]["killed"] >= 1
    assert (seen[what]["failures"], seen[what]["texts"]) == ([], 1)


def test_scaling_down_and_rolling_out_fail_no_call(seen: dict[str, Any]) -> None:
    assert seen["scaled"] == {"failures": [], "texts": 1}
    assert seen["canary"]["failures"] == []
    assert seen["promoted"] == "models:/gpt/2"


def test_a_canary_gets_about_its_share(seen: dict[str, Any]) -> None:
    assert seen["canary_withdrawn"] == ""
    assert 0.2 < seen["canary"]["share"] < 0.6, "40 % were asked for"


def test_a_slow_canary_is_withdrawn_by_itself_with_the_numbers(seen: dict[str, Any]) -> None:
    assert "the median time to the first token is" in seen["withdrawn"]
    assert seen["slow_canary"]["failures"] == []


def test_a_shadow_is_asked_and_never_heard(seen: dict[str, Any]) -> None:
    assert seen["shadow"] == {"failures": [], "texts": True}


def test_the_first_call_to_a_model_at_zero_waits_for_it(seen: dict[str, Any]) -> None:
    assert seen["woken"]


def test_a_lost_site_is_answered_for_by_the_cloud_without_a_failed_call(seen: dict[str, Any]) -> None:
    assert seen["site_lost"]["failures"] == []
