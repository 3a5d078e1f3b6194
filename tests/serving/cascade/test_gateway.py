"""Who answered a cascade's call, as callers of the gateway see it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from tests.serving.cascade.builders import calibration, population
from tests.serving.cascade.conftest import Shop
from tests.serving.gateway.backends import RuleBackend, answer_to
from tests.serving.gateway.running import Running, running

from modelyard.artifacts import Parent
from modelyard.errors import UnavailableError
from modelyard.serving.cascade.backend import CascadeBackend
from modelyard.serving.cascade.config import CascadeConfig
from modelyard.serving.cascade.records import Score
from modelyard.serving.gateway import GatewaySettings


@pytest.fixture
def cloud() -> RuleBackend:
    return RuleBackend()


@pytest.fixture
def gateway(cloud: RuleBackend) -> Iterator[Running]:
    """Cascades of which the small model is sure with exp(-0.25) = 0.78."""
    made = calibration(
        population(600, 0),
        score=Score(kind="mean_logprob"),
        small=Parent(reference="models:/tiny-gpt/1", digest="sha256:" + "a" * 64),
        large=Parent(reference="models:/tiny-plain/1", digest="sha256:" + "b" * 64),
    )
    cascades = [
        CascadeConfig(
            name=name, small="tiny-gpt", large="tiny-plain", calibration=made, threshold=threshold, small_site="plant-7"
        )
        for name, threshold in (("sure", 0.5), ("unsure", 0.9))
    ]
    digests = {made.small.reference: made.small.digest, made.large.reference: made.large.digest}
    backend = CascadeBackend(RuleBackend(), cascades, cloud=cloud, digest_of=digests.__getitem__)
    with running(backend, GatewaySettings(open_access=True)) as found:
        yield found


@pytest.mark.parametrize("is_streamed", [True, False])
def test_the_response_says_who_answered(gateway: Running, cloud: RuleBackend, is_streamed: bool) -> None:
    body = {"prompt": "a b", "max_tokens": 3, "stream": is_streamed}
    reply = gateway.ask("/v1/completions", {**body, "model": "sure"})
    assert (reply.status, reply.headers["x-modelyard-site"]) == (200, "plant-7")
    assert gateway.ask("/v1/completions", {**body, "model": "unsure"}).headers["x-modelyard-site"] == "cloud"
    cloud.error = UnavailableError("the link is cut")
    reply = gateway.ask("/v1/completions", {**body, "model": "unsure"})
    assert (reply.status, reply.headers["x-modelyard-site"]) == (200, "plant-7;unsure")
    if not is_streamed:
        assert reply.json()["choices"][0]["text"] == answer_to("a b", 3)
        assert reply.json()["usage"]["completion_tokens"] == 3
        assert reply.json()["choices"][0]["logprobs"] is None
    assert gateway.record_of(reply).site == "plant-7;unsure"


def test_each_prediction_says_who_made_it(shop: Shop) -> None:
    pictures = [png(pixels) for pixels in shop.held_out.pixels[:60]]
    config = CascadeConfig(
        name="digits",
        small="mlp",
        large="cnn",
        small_site="plant-7",
        threshold=0.9,
        calibration=calibration(small=shop.parent("mlp"), large=shop.parent("cnn")),
    )
    with running(CascadeBackend(shop.link, [config]), GatewaySettings(open_access=True)) as gateway:
        reply = gateway.ask("/v1/predict/digits", {"inputs": pictures})
    assert (reply.status, reply.headers["x-modelyard-site"]) == (200, "cloud,plant-7")
    outputs = [item["output"] for item in reply.json()["data"]]
    assert {output["site"] for output in outputs} == {"plant-7", "cloud"}
    right = [
        output["label"] == label for output, label in zip(outputs, shop.held_out.labels.tolist()[:60], strict=True)
    ]
    assert sum(right) > 54


def png(pixels: Any) -> str:
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    return base64.b64encode(held.getvalue()).decode()
