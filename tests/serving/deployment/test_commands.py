"""What `modelyard serve` and `modelyard keys` make of their arguments, without a cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from modelyard import cluster
from modelyard.cli.keys import keys
from modelyard.cli.serve import serve
from modelyard.config import parse
from modelyard.errors import ConfigError, InputError, WaitTimeoutError
from modelyard.security import KeyStore
from modelyard.security.keys import key_id
from modelyard.serving.deployment import control
from modelyard.serving.deployment.config import ModelApp, ServingConfig
from modelyard.serving.deployment.discovery import Deployed
from modelyard.serving.protocol import ServedModel

GPT = {"model": {"reference": "models:/tiny-gpt/1"}}


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "serving.yaml"
    path.write_text("port: 8100\nmodels:\n  - model: {reference: models:/tiny-gpt/1}\n")
    return str(path)


def test_options_beside_a_file_are_obeyed_and_those_left_out_leave_it_alone(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployed: list[ServingConfig] = []
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(control, "up", lambda config, say: deployed.append(config))
    for options in ([], ["--port", "8200", "--host", "localhost", "--open"]):
        result = CliRunner().invoke(serve, ["up", file, "--detach", *options])
        assert result.exit_code == 0, result.exception
    plain, changed = deployed
    assert plain.gateway is not None
    assert changed.gateway is not None
    assert (plain.host, plain.port, plain.gateway.settings.open_access) == ("127.0.0.1", 8100, False)
    assert (changed.host, changed.port, changed.gateway.settings.open_access) == ("localhost", 8200, True)


@pytest.mark.parametrize("option", [["--engine", "openvino"], ["--cpus", "2"]])
def test_options_that_a_file_says_for_each_model_are_refused_beside_it(
    file: str, option: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("it went on"))
    result = CliRunner().invoke(serve, ["up", file, *option])
    assert isinstance(result.exception, InputError)
    assert option[0] in str(result.exception)


def test_a_model_cannot_take_the_gateways_name() -> None:
    with pytest.raises(ConfigError, match="'gateway' is the name of the gateway's own application"):
        parse(ServingConfig, {"models": [{"model": {"reference": "models:/a/1", "name": "gateway"}}]})


def test_one_mistake_in_a_model_is_one_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(ServingConfig, {"models": [{**GPT, "min_replica": 1}]})
    assert caught.value.problem == "config: models.0.min_replica: unknown key; did you mean 'min_replicas'?"
    with pytest.raises(ConfigError, match="name at least one model"):
        parse(ServingConfig, {"models": []})


def test_another_port_than_that_of_the_serve_that_runs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    running = {"http_options": {"host": "127.0.0.1", "port": 8100}, "applications": {}}
    monkeypatch.setattr(control, "_details", lambda: running)
    monkeypatch.setattr(control, "RayCluster", lambda: pytest.fail("it went on"))
    with pytest.raises(ConfigError, match=r"listens on 127\.0\.0\.1:8100 already, not on 127\.0\.0\.1:8200"):
        control.up(parse(ServingConfig, {"models": [GPT], "port": 8200}), lambda _: None)


def test_who_waits_for_a_replica_is_told_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    app = parse(ModelApp, {**GPT, "start_timeout_s": 0.01})
    served = ServedModel("tiny-gpt", "models:/tiny-gpt/1", "causal_lm", "transformers", 0)
    full = 'more than 30s to be scheduled. Resources required: {"CPU": 1.0}, available: {"CPU": 0.5}'
    now = Deployed(app, served, "UPDATING", "", 0, 1, 1, ())
    monkeypatch.setattr(control, "current", lambda: {"tiny-gpt": replace(now, message=full)})
    said: list[str] = []
    with pytest.raises(WaitTimeoutError):
        control._wait(app, said.append)
    assert said == [f"tiny-gpt: updating, 0 of 1 running, 1 starting; {full}"]


def test_a_key_is_revoked_by_itself_and_by_its_id() -> None:
    for by_id in (True, False):
        key = KeyStore().create(tenant="vision")
        identity = key_id(key)
        assert identity is not None
        result = CliRunner().invoke(keys, ["revoke", identity if by_id else key])
        assert result.exit_code == 0, result.exception
        assert result.output == f"key {identity} is revoked\n"


def test_nobody_is_let_in_without_a_key_from_elsewhere() -> None:
    settings = {"settings": {"open_access": True}}
    with pytest.raises(ConfigError, match=r"everyone on 0\.0\.0\.0"):
        parse(ServingConfig, {"host": "0.0.0.0", "gateway": settings, "models": [GPT]})


@pytest.mark.parametrize("placement", [{"resources": {"A": -1}}, {"site": "a b/@"}])
def test_a_placement_that_means_nothing_is_refused_by_its_field(placement: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"placement\.{next(iter(placement))}"):
        parse(ServingConfig, {"models": [{**GPT, "placement": placement}]})
