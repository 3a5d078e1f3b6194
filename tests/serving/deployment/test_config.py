"""What a serving file may say of its HTTP server."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelyard.config import parse
from modelyard.errors import ConfigError
from modelyard.serving.deployment.config import ServingConfig

MODELS = [{"model": {"reference": "models:/gpt/1"}}]


def test_a_certificate_and_its_key_turn_https_on() -> None:
    plain = parse(ServingConfig, {"models": MODELS})
    assert plain.http_options == {"host": "127.0.0.1", "port": 8000}
    closed = parse(ServingConfig, {"models": MODELS, "certificate": "~/node.crt", "certificate_key": "/k/node.key"})
    assert closed.http_options["ssl_certfile"] == str(Path.home() / "node.crt")
    assert closed.http_options["ssl_keyfile"] == "/k/node.key"


def test_one_of_them_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="certificate and certificate_key go together"):
        parse(ServingConfig, {"models": MODELS, "certificate": "~/node.crt"})
