"""What is refused at once: names that do not exist, and jobs that could never start."""

from __future__ import annotations

import pytest
from tests.scheduling.builders import job, node, snapshot

from modelyard.errors import CapacityError, ConfigError, InputError
from modelyard.scheduling.admission import check_request
from modelyard.scheduling.model import Tenant

NODES = [node("a", 8), node("b", 4), node("c", 16, pool="l4", draining=True)]
TENANTS = [Tenant(name="vision"), Tenant(name="small", limit={"a100": 2, "l4": 3})]


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        (
            job("j", pools=("a10",)),
            ConfigError,
            "pools names 'a10', which is no pool; known: a100, l4\n  -> did you mean",
        ),
        (job("j", tenant="vison"), ConfigError, "tenant='vison' is no tenant; known: small, vision\n  -> did you mean"),
        (job("j", 17), CapacityError, "the largest pool 'l4' holds 16 when empty\n  -> lower min_workers to 16"),
        (job("j", 17), CapacityError, "or set span_pools=True: all its pools together hold 28"),
        (job("j", 29, span_pools=True), CapacityError, "all its pools together 28\n  -> lower min_workers to 28"),
        (
            job("j", 13, pools=("a100",)),
            CapacityError,
            "min_workers=13 workers with GPU=1 never fit; the largest pool 'a100'",
        ),
        (job("j", 3, gpus=8, pools=("a100",)), CapacityError, "holds 1 when empty"),
        (job("j", gpus=32), CapacityError, "no node holds one worker with resources GPU=32; the most on one node"),
        (job("j", 4, tenant="small"), CapacityError, "tenant 'small' may hold at most 3 in pool 'l4'"),
        (job("j", 4, tenant="small"), CapacityError, "lower min_workers to 3"),
    ],
)
def test_it_is_refused_with_the_value_the_limit_and_what_to_do(
    asked: object, error: type[InputError], says: str
) -> None:
    with pytest.raises(error) as caught:
        check_request(asked.request, NODES, TENANTS)  # type: ignore[attr-defined]
    assert says in str(caught.value)


def test_what_fits_is_let_in_even_while_its_nodes_drain() -> None:
    check_request(job("j", 16).request, NODES, TENANTS)
    check_request(job("j", 3, tenant="small").request, NODES, TENANTS)
    check_request(job("j", tenant="default").request, NODES, TENANTS)


def test_the_tenants_of_a_snapshot_are_used_and_without_any_each_is_welcome() -> None:
    with pytest.raises(ConfigError, match="known: small, vision"):
        check_request(job("j", tenant="who").request, snapshot(NODES, (), TENANTS))
    check_request(job("j", tenant="who").request, snapshot(NODES, ()))
