"""Configs, placement checks and the batching of streams, without a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from modelyard.cluster import FakeCluster, Node, NodeGroup
from modelyard.config import parse
from modelyard.errors import CapacityError, ConfigError
from modelyard.serving.deployment.check import check_placement
from modelyard.serving.deployment.config import Placement, ServingConfig
from modelyard.serving.deployment.discovery import deployed, user_config
from modelyard.serving.deployment.replica import batched
from modelyard.serving.deployment.routing import State
from modelyard.serving.protocol import Piece, ServedModel

GPT = {"model": {"reference": "models:/tiny-gpt@production"}}


def node(name: str, cpus: float = 4, **labels: str) -> Node:
    labels = {f"modelyard/{key}": value for key, value in labels.items()}
    return Node(name, {"CPU": cpus}, {"CPU": 0.0}, labels)


def test_the_cloud_keeps_off_the_edges_nodes_and_a_site_keeps_to_its_own() -> None:
    cloud, north, south = node("c"), node("n", tier="edge", site="north"), node("s", tier="edge", site="south")
    assert [each.matches(Placement().selector) for each in (cloud, north, south)] == [True, False, False]
    assert [each.matches(Placement(site="north").selector) for each in (cloud, north, south)] == [False, True, False]


def test_a_busy_node_is_no_reason_to_refuse_but_labels_that_match_nothing_are() -> None:
    cluster = FakeCluster([node("a", pool="l4")])
    check_placement(cluster, "gpt", Placement(pool="l4", cpus=4), 1)
    with pytest.raises(CapacityError) as caught:
        check_placement(cluster, "gpt", Placement(pool="a100"), 1)
    assert "no node matches" in str(caught.value)
    assert "labels in this cluster: modelyard/pool=l4" in str(caught.value)


def test_replicas_that_never_fit_are_refused_with_the_sizes_of_the_nodes() -> None:
    with pytest.raises(
        CapacityError, match=r"3 replica\(s\) of 3 CPU never fit: 2 matching node\(s\) with 4 CPU hold 2"
    ):
        check_placement(FakeCluster([node("a"), node("b")]), "gpt", Placement(cpus=3), 3)
    check_placement(FakeCluster([node("a")], [NodeGroup("cpu", {"CPU": 8}, 2)]), "gpt", Placement(cpus=3), 3)


def test_two_models_of_one_name_are_refused_and_sites_are_no_clash() -> None:
    with pytest.raises(ConfigError, match="two models are named 'tiny-gpt'"):
        parse(ServingConfig, {"models": [GPT, GPT]})
    config = parse(ServingConfig, {"models": [GPT, {**GPT, "placement": {"site": "north"}}]})
    assert [each.application for each in config.models] == ["tiny-gpt", "tiny-gpt@north"]


def test_what_a_deployment_carries_is_found_again_and_others_are_left_alone() -> None:
    app = parse(ServingConfig, {"models": [{**GPT, "min_replicas": 0}]}).models[0]
    served = ServedModel("tiny-gpt", "models:/tiny-gpt/1", "causal_lm", "openvino", 5, 256, frozenset({"seed"}))

    def details(states: list[str], status: str = "HEALTHY") -> Any:
        mine = {
            "deployment_config": {"user_config": user_config(app, served)},
            "replicas": [{"state": state, "node_id": f"n{n}"} for n, state in enumerate(states)],
            "status": status,
            "message": "",
            "target_num_replicas": 1,
        }
        foreign = {"deployment_config": {"user_config": {"theirs": 1}}}
        return {"applications": {"tiny-gpt": {"deployments": {"Model": mine, "Other": foreign}}}}

    (found,) = deployed(details(["RUNNING", "STOPPING"])).values()
    assert (found.app, found.served, found.running, found.nodes) == (app, served, 1, ("n0",))
    assert found.target.state is State.RUNNING
    assert deployed(details([]))["tiny-gpt"].target.state is State.COMING, "a call would wake it"
    assert deployed(details([], "DEPLOY_FAILED"))["tiny-gpt"].target.state is State.DOWN


async def spaced(*gaps_s: float) -> AsyncIterator[Piece]:
    for number, gap_s in enumerate(gaps_s):
        await asyncio.sleep(gap_s)
        yield Piece(0, str(number))


def collected(source: AsyncIterator[Piece], interval_s: float) -> list[str]:
    async def collect() -> list[str]:
        return ["".join(piece.text for piece in together) async for together in batched(source, interval_s)]

    return asyncio.run(collect())


def test_the_first_piece_travels_at_once_and_close_ones_together() -> None:
    assert collected(spaced(0.0, 0.01, 0.0, 0.0), 0.2) == ["0", "123"]
    assert "".join(collected(spaced(*[0.001] * 50), 0.01)) == "".join(map(str, range(50))), "nothing is lost"


def test_the_first_text_does_not_wait_behind_the_piece_that_says_the_call_is_accepted() -> None:
    async def accepted_then_text() -> AsyncIterator[Piece]:
        yield Piece(0, "")
        async for piece in spaced(0.01, 0.01):
            yield piece

    assert collected(accepted_then_text(), 0.2) == ["", "0", "1"]


def test_an_error_arrives_behind_the_pieces_before_it() -> None:
    async def failing() -> AsyncIterator[Piece]:
        yield Piece(0, "a")
        raise CapacityError("full")

    async def collect() -> list[str]:
        seen = []
        stream = batched(failing(), 0.01)
        seen += [piece.text for piece in await anext(stream)]
        with pytest.raises(CapacityError):
            await anext(stream)
        return seen

    assert asyncio.run(collect()) == ["a"]


def test_who_stops_listening_ends_the_source() -> None:
    ended = []

    async def endless() -> AsyncIterator[Piece]:
        try:
            while True:
                yield Piece(0, "x")
                await asyncio.sleep(0.001)
        finally:
            ended.append(True)

    async def listen() -> None:
        stream = batched(endless(), 0.01)
        await anext(stream)
        await stream.aclose()

    asyncio.run(listen())
    assert ended == [True]
