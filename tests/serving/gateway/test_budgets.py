"""Limits hold over replicas and processes, cost little, and lose nothing that was not used."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelyard.errors import StorageError
from modelyard.security import Caller, TokenQuota
from modelyard.serving.gateway.budgets import Budgets
from modelyard.serving.gateway.errors import RateLimitError
from modelyard.serving.gateway.usage_store import UsageStore

FREE = TokenQuota()


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_800_000_000.5

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def budgets(database_file: str, clock: Clock) -> Budgets:
    return Budgets(UsageStore(database_file), clock=clock)


def caller(requests: int | None = None, tokens: int | None = None) -> Caller:
    return Caller(subject="key:a", tenant="t", requests_per_minute=requests, tokens_per_minute=tokens)


async def passed(budgets: Budgets, who: Caller, calls: int, tokens: int = 1, quota: TokenQuota = FREE) -> int:
    """How many of `calls` are let through, each settled with what it reserved."""
    count = 0
    for _ in range(calls):
        try:
            reservation = await budgets.reserve(who, quota, tokens)
        except RateLimitError:
            continue
        count += 1
        budgets.settle(reservation, tokens)
    return count


def test_a_minute_lets_exactly_its_limit_through(budgets: Budgets, clock: Clock) -> None:
    async def scenario() -> None:
        assert await passed(budgets, caller(requests=7), 20) == 7
        clock.now_s += 60.0
        assert await passed(budgets, caller(requests=7), 20) == 0  # the second in which they were used still counts
        clock.now_s += 1.0
        assert await passed(budgets, caller(requests=7), 20) == 7

    asyncio.run(scenario())


def test_a_refusal_says_when_to_come_back_and_that_is_true(budgets: Budgets, clock: Clock) -> None:
    async def scenario() -> None:
        await passed(budgets, caller(requests=2), 2)
        with pytest.raises(RateLimitError, match="limit 2, left 0") as caught:
            await budgets.reserve(caller(requests=2), FREE, 1)
        headers = caught.value.headers
        assert headers["x-ratelimit-remaining-requests"] == "0"
        clock.now_s += int(headers["retry-after"])
        assert await passed(budgets, caller(requests=2), 1) == 1

    asyncio.run(scenario())


def test_unused_tokens_go_back_and_overrun_ones_are_counted(budgets: Budgets) -> None:
    async def scenario() -> None:
        who = caller(tokens=1_000)
        first = await budgets.reserve(who, FREE, 900)
        with pytest.raises(RateLimitError, match="tokens per minute"):
            await budgets.reserve(who, FREE, 200)
        budgets.settle(first, 100)
        second = await budgets.reserve(who, FREE, 800)  # 100 used, 800 held
        budgets.settle(second, 950)  # the estimate was too low by 150
        with pytest.raises(RateLimitError):
            await budgets.reserve(who, FREE, 1)

    asyncio.run(scenario())


def test_a_call_that_reached_no_model_costs_a_request_and_no_tokens(budgets: Budgets) -> None:
    async def scenario() -> None:
        who = caller(requests=2, tokens=100)
        for _ in range(2):
            budgets.settle(await budgets.reserve(who, FREE, 100), None)
        with pytest.raises(RateLimitError, match="requests per minute"):
            await budgets.reserve(who, FREE, 100)

    asyncio.run(scenario())


def test_settling_twice_counts_once(budgets: Budgets) -> None:
    async def scenario() -> None:
        who = caller(tokens=100)
        held = await budgets.reserve(who, FREE, 60)
        budgets.settle(held, 60)
        budgets.settle(held, None)
        with pytest.raises(RateLimitError):
            await budgets.reserve(who, FREE, 60)

    asyncio.run(scenario())


def test_a_call_larger_than_the_limit_is_told_that_it_can_never_fit(budgets: Budgets) -> None:
    with pytest.raises(RateLimitError, match="can never fit") as caught:
        asyncio.run(budgets.reserve(caller(tokens=100), FREE, 101))
    assert caught.value.headers["x-should-retry"] == "false"
    assert "retry-after" not in caught.value.headers


def test_tenants_share_a_quota_over_all_their_keys(budgets: Budgets, clock: Clock) -> None:
    async def scenario() -> None:
        quota = TokenQuota(tokens_per_day=100, tokens_per_month=150)
        keys = [Caller(subject=f"key:{name}", tenant="t") for name in "ab"]
        assert await passed(budgets, keys[0], 9, tokens=20, quota=quota) == 5
        with pytest.raises(RateLimitError, match="quota of the tenant: tokens per day") as caught:
            await budgets.reserve(keys[1], quota, 20)
        assert caught.value.code == "insufficient_quota"
        assert await passed(budgets, Caller(subject="key:c", tenant="other"), 1, tokens=20, quota=quota) == 1
        clock.now_s += 86_400
        assert await passed(budgets, keys[1], 9, tokens=20, quota=quota) == 2  # then the month is used up

    asyncio.run(scenario())


def test_what_a_replica_leased_and_did_not_use_comes_back_to_the_others(database_file: str, clock: Clock) -> None:
    async def scenario() -> None:
        first, second = (Budgets(UsageStore(database_file), clock=clock) for _ in range(2))
        who = caller(requests=600)  # a slice is ten
        assert await passed(first, who, 1) == 1
        assert await passed(second, who, 600) == 590
        clock.now_s += 1.0
        await first.flush()
        assert await passed(second, who, 20) == 9

    asyncio.run(scenario())


def test_a_caller_who_leaves_while_waiting_loses_no_budget(budgets: Budgets) -> None:
    async def scenario() -> None:
        who, quota = Caller(subject="key:a", tenant="t"), TokenQuota(tokens_per_day=100)
        waiting = asyncio.ensure_future(budgets.reserve(who, quota, 100))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        async with asyncio.timeout(5):
            while await passed(budgets, who, 1, tokens=100, quota=quota) == 0:
                await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_nothing_passes_uncounted_when_the_store_fails(database_file: str, clock: Clock) -> None:
    budgets = Budgets(UsageStore(database_file), clock=clock)
    path = Path(database_file.removeprefix("sqlite:///"))
    for file in path.parent.glob("own.db*"):
        file.unlink()
    budgets._store._engine.dispose()
    with pytest.raises(StorageError):
        asyncio.run(budgets.reserve(caller(requests=5), FREE, 1))


def test_two_processes_together_let_exactly_the_limit_through(database_file: str) -> None:
    UsageStore(database_file).close()
    command = [sys.executable, "-m", "tests.serving.gateway.replica", database_file, "400", "10"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    replicas = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    try:
        for replica in replicas:
            assert replica.stdout.readline() == "ready\n"
        for replica in replicas:
            replica.stdin.write("go\n")
            replica.stdin.flush()
        counts = [int(replica.communicate(timeout=60)[0]) for replica in replicas]
    finally:
        for replica in replicas:
            replica.kill()
            replica.wait(timeout=10)
    assert sum(counts) == 90
    assert min(counts) > 0, "both were asked at the same time"


def test_a_limited_call_costs_less_than_two_milliseconds(database_file: str) -> None:
    async def median_s(who: Caller) -> float:
        budgets = Budgets(UsageStore(database_file))
        seconds = []
        for _ in range(200):
            before = time.perf_counter()
            budgets.settle(await budgets.reserve(who, TokenQuota(10**9, 10**9), 50), 40)
            seconds.append(time.perf_counter() - before)
        await budgets.close()
        return sorted(seconds)[100]

    often = Caller(subject="key:often", tenant="t", requests_per_minute=60_000, tokens_per_minute=10**8)
    assert asyncio.run(median_s(often)) < 0.000_5
    seldom = Caller(subject="key:seldom", tenant="u", requests_per_minute=300, tokens_per_minute=10**6)
    assert asyncio.run(median_s(seldom)) < 0.005  # each call asks the database; double the figure for a busy machine
