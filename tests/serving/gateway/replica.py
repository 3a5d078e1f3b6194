"""A gateway's limits in a process of their own: `python -m tests.serving.gateway.replica URL CALLS TOKENS`.

Prints how many of `CALLS` calls of `TOKENS` tokens were let through.
"""

from __future__ import annotations

import asyncio
import sys

from modelyard.security import Caller, TokenQuota
from modelyard.serving.gateway.budgets import Budgets
from modelyard.serving.gateway.errors import RateLimitError
from modelyard.serving.gateway.usage_store import UsageStore

CALLER = Caller(subject="key:shared", tenant="a", requests_per_minute=90, tokens_per_minute=100_000)


async def main(url: str, calls: int, tokens: int) -> None:
    """Ask as fast as it goes, eight at a time."""
    budgets = Budgets(UsageStore(url))
    passed = 0

    async def ask(number: int) -> None:
        nonlocal passed
        for _ in range(calls // 8):
            try:
                reservation = await budgets.reserve(CALLER, TokenQuota(), tokens)
            except RateLimitError:
                continue
            passed += 1
            budgets.settle(reservation, tokens)
            await asyncio.sleep(0.005)  # leaves the other process its turn

    print("ready", flush=True)
    sys.stdin.readline()
    await asyncio.gather(*(ask(number) for number in range(8)))
    await budgets.close()
    print(passed, flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
