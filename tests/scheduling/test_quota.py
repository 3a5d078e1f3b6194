"""Which trees of tenants are refused, and who may hold, borrow and reclaim."""

from __future__ import annotations

import pytest

from modelyard.errors import ConfigError
from modelyard.scheduling.model import Tenant
from modelyard.scheduling.quota import Ledger, Tree


@pytest.mark.parametrize(
    ("tenants", "says"),
    [
        (
            [Tenant(name="a", parent="b"), Tenant(name="b", parent="c"), Tenant(name="c", parent="a")],
            "a -> b -> c -> a",
        ),
        ([Tenant(name="a", parent="a")], "a -> a"),
        ([Tenant(name="vision"), Tenant(name="x", parent="visoin")], "known: vision, x\n  -> did you mean 'vision'?"),
        ([Tenant(name="a"), Tenant(name="a")], "'a' is defined twice"),
        (
            [Tenant(name="p", guaranteed={"l4": 3})]
            + [Tenant(name=n, parent="p", guaranteed={"l4": 2}) for n in ("a", "b")],
            "guaranteed.l4=3 is less than the 4 GPUs of its children (a=2, b=2)",
        ),
        ([Tenant(name="a", guaranteed={"l4": 3}, limit={"l4": 2})], "guaranteed.l4=3 is above limit.l4=2"),
        ([Tenant(name="a", weight=0)], "weight=0 is not above 0"),
        ([Tenant(name="a", limit={"l4": -1})], "limit.l4=-1 is below 0"),
    ],
)
def test_a_tree_that_cannot_be_is_refused_with_the_numbers(tenants: list[Tenant], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        Tree(tenants)
    assert says in str(error.value)


def ledger() -> Ledger:
    return Ledger(
        Tree(
            [
                Tenant(name="top", limit={"l4": 6}, guaranteed={"l4": 4}),
                Tenant(name="a", parent="top", guaranteed={"l4": 2}),
                Tenant(name="b", parent="top", limit={"l4": 5}),
                Tenant(name="other", guaranteed={"l4": 2}),
            ]
        )
    )


def test_use_counts_for_the_whole_branch() -> None:
    books = ledger()
    books.charge("a", {"l4": 3})
    books.charge("b", {"l4": 2})
    assert [books.used(name, "l4") for name in ("a", "b", "top", "other")] == [3, 2, 5, 0]
    books.charge("a", {"l4": 3}, -1)
    assert books.used("top", "l4") == 2


def test_a_limit_above_the_tenant_holds_too_and_is_named() -> None:
    books = ledger()
    books.charge("a", {"l4": 3})
    assert books.may_hold("b", "l4", 3)
    assert not books.may_hold("b", "l4", 4)
    assert books.headroom("b", "l4") == 3
    limit = books.blocking("b", "l4", 4)
    assert limit is not None
    assert (limit.tenant, limit.used, limit.limit) == ("top", 3, 6)
    assert books.may_hold("b", "a100", 1000), "no limit is given for that pool"
    assert books.may_hold("nobody", "l4", 1000), "a name in no list has no limit"


def test_what_is_held_above_the_guarantee_is_borrowed() -> None:
    books = ledger()
    books.charge("a", {"l4": 5})
    assert (books.borrowed("a", "l4"), books.borrowed("top", "l4"), books.borrowed("b", "l4")) == (3, 1, 0)


def test_a_claim_within_the_guarantee_takes_from_those_who_borrowed_and_from_nobody_else() -> None:
    books = ledger()
    books.charge("b", {"l4": 5})
    assert books.may_reclaim("other", "b", "l4", 2)
    assert not books.may_reclaim("other", "b", "l4", 3), "more than it is guaranteed"
    assert not books.may_reclaim("b", "other", "l4", 1)
    books.charge("b", {"l4": 1}, -1)
    assert not books.may_reclaim("other", "b", "l4", 2), "the branch holds just what it is guaranteed as a whole"
    assert books.may_reclaim("a", "b", "l4", 2), "between siblings the sibling's own guarantee counts"
    assert not books.may_reclaim("a", "a", "l4", 1)
