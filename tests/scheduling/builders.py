"""Small worlds for the tests of the scheduler: nodes, jobs, a run of events, and what must hold of any decision."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

from hypothesis import strategies as st

from modelyard.cluster import Node
from modelyard.scheduling.forecast import expected_end
from modelyard.scheduling.model import (
    POOL_LABEL,
    TOPOLOGY_LABELS,
    Allocation,
    Decision,
    Job,
    PoolPower,
    Request,
    Snapshot,
    Tenant,
    pool_of,
)
from modelyard.scheduling.policies import _HOMES, KNOWN
from modelyard.scheduling.quota import Tree


def node(name: str, gpus: float = 8, pool: str = "a100", rack: str = "", zone: str = "", **fields: Any) -> Node:
    labels = {POOL_LABEL: pool} | dict(zip(TOPOLOGY_LABELS, (rack, zone), strict=True))
    total = {"GPU": float(gpus), "CPU": 64.0}
    return Node(node_id=name, total=total, free=total, labels={k: v for k, v in labels.items() if v}, **fields)


def job(name: str, workers: int | tuple[int, int] = 1, gpus: float = 1, at: float = 0, **fields: Any) -> Job:
    """A job; `fields` go to the request or to the job, whichever has them."""
    low, high = (workers, workers) if isinstance(workers, int) else workers
    of_job = {field.name for field in dataclasses.fields(Job)}
    asked = {key: value for key, value in fields.items() if key not in of_job}
    request = Request(job_id=name, min_workers=low, max_workers=high, resources={"GPU": gpus}, **asked)
    return Job(request=request, submitted_s=at, **{key: value for key, value in fields.items() if key in of_job})


def snapshot(nodes: Iterable[Node], jobs: Iterable[Job], tenants: Iterable[Tenant] = (), now: float = 0) -> Snapshot:
    return Snapshot(now_s=now, nodes=tuple(nodes), jobs=tuple(jobs), tenants=tuple(tenants))


def present_policies() -> list[str]:
    """The known policies whose modules are there."""
    found = []
    for name in KNOWN:
        try:
            importlib.import_module(f"modelyard.scheduling.policies.{_HOMES[name][0]}")
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("modelyard.scheduling.policies"):
                raise
            continue
        found.append(name)
    return found


def apply(seen: Snapshot, decision: Decision) -> Snapshot:
    """The snapshot after the decision was carried out."""
    jobs = []
    for one in seen.jobs:
        held = dict(decision.run.get(one.job_id, {}))
        changed = held != dict(one.allocation)
        jobs.append(
            dataclasses.replace(
                one,
                allocation=held,
                changed_s=seen.now_s if changed else one.changed_s,
                restarts=one.restarts + (1 if changed and held else 0),
            )
        )
    return dataclasses.replace(seen, jobs=tuple(jobs))


def end_next(seen: Snapshot) -> Snapshot:
    """Time goes on to the next expected end of a running job, and that job is gone. Others make progress."""
    ends = {one.job_id: expected_end(seen, one, one.allocation) for one in seen.jobs if one.is_running}
    known = sorted((end, name) for name, end in ends.items() if end is not None)
    if not known:
        return dataclasses.replace(seen, jobs=tuple(one for one in seen.jobs if not one.is_running))
    now, first = known[0]
    jobs = [advance(seen, one, now) for one in seen.jobs if one.job_id != first]
    return dataclasses.replace(seen, now_s=now, jobs=tuple(jobs))


def check(seen: Snapshot, decision: Decision) -> None:
    """What must hold of every decision of every policy."""
    _check_partition(seen, decision)
    _check_nodes(seen, decision)
    _check_quota(seen, decision)
    _check_power(seen, decision)


def advance(seen: Snapshot, one: Job, now: float) -> Job:
    """A job with the progress it has made at a later time."""
    end = expected_end(seen, one, one.allocation) if one.is_running else None
    if end is None or one.remaining is None:
        return one
    begin = max(seen.now_s, (one.changed_s or 0.0) + one.request.restart_s)
    share = max(now - begin, 0.0) / max(end - begin, 1e-9)
    return dataclasses.replace(one, done=one.done + one.remaining * min(share, 1.0))


def _check_partition(seen: Snapshot, decision: Decision) -> None:
    assert sorted([*decision.run, *decision.wait]) == sorted(one.job_id for one in seen.jobs), "lost or duplicated"
    for one in seen.jobs:
        if one.job_id in decision.wait:
            reason = decision.wait[one.job_id]
            assert all((reason.text, reason.remedy)), f"{one.job_id} waits without words: {reason}"
            continue
        held = decision.run[one.job_id]
        assert all(count >= 1 for count in held.values())
        assert one.request.min_workers <= sum(held.values()) <= one.request.max_workers, "not all or nothing"
        assert one.is_running or not one.is_held, "a held job was started"


def _check_nodes(seen: Snapshot, decision: Decision) -> None:
    used: dict[str, dict[str, float]] = {}
    for one in seen.jobs:
        held = decision.run.get(one.job_id, {})
        pools = {pool_of(seen.node_by_id[name]) for name in held}
        assert not one.request.pools or pools <= set(one.request.pools), "a pool that was not asked for"
        assert one.request.span_pools or len(pools) <= 1, "a gang over several pools"
        for name, count in held.items():
            assert seen.node_by_id[name].is_usable, f"{name} is dead or drains"
            for resource, amount in one.request.resources.items():
                total = used.setdefault(name, {})
                total[resource] = total.get(resource, 0.0) + amount * count
    for name, amounts in used.items():
        for resource, amount in amounts.items():
            assert amount <= seen.node_by_id[name].total.get(resource, 0.0) + 1e-6, f"{resource} of {name} exceeded"


def _check_quota(seen: Snapshot, decision: Decision) -> None:
    tree = Tree(seen.tenants)
    used: dict[tuple[str, str], float] = {}
    for one in seen.jobs:
        for name, count in decision.run.get(one.job_id, {}).items():
            for tenant in tree.path(one.request.tenant):
                key = (tenant, pool_of(seen.node_by_id[name]))
                used[key] = used.get(key, 0.0) + count * one.request.gpus_per_worker
    for (tenant, pool), amount in used.items():
        most = tree.tenant(tenant).limit.get(pool, float("inf"))
        within = [one for one in seen.jobs if tenant in tree.path(one.request.tenant)]
        assert amount <= max(most, _must_stay(seen, within, pool)) + 1e-6, f"limit of {tenant} in {pool}"


def _must_stay(seen: Snapshot, jobs: Iterable[Job], pool: str) -> float:
    """GPUs of a pool that jobs hold which nobody may stop, however low a limit has become."""
    return sum(
        count * one.request.gpus_per_worker
        for one in jobs
        for name, count in one.allocation.items()
        if not one.request.is_preemptible and pool_of(seen.node_by_id[name]) == pool
    )


def _check_power(seen: Snapshot, decision: Decision) -> None:
    if seen.power_cap_watts is None:
        return
    idle = sum(
        seen.power[pool].idle_watts * _gpus_of(nodes) for pool, nodes in seen.pools.items() if pool in seen.power
    )
    least = sum(_extra_watts(seen, one, one.allocation) for one in seen.jobs if not one.request.is_preemptible)
    drawn = sum(_extra_watts(seen, one, decision.run.get(one.job_id, {})) for one in seen.jobs)
    assert drawn <= max(seen.power_cap_watts - idle, least, 0.0) + 1e-6, "the power cap is exceeded"


def cap_of(seen: Snapshot, share: float) -> float:
    """A power cap: all accelerators idle, and `share` of what they could draw beyond that."""
    watts = 0.0
    for pool, nodes in seen.pools.items():
        if (power := seen.power.get(pool)) is not None:
            watts += _gpus_of(nodes) * (power.idle_watts + share * (power.busy_watts - power.idle_watts))
    return watts


def _gpus_of(nodes: Iterable[Node]) -> float:
    return sum(one.total.get("GPU", 0.0) for one in nodes)


def _extra_watts(seen: Snapshot, one: Job, held: Allocation) -> float:
    """Watts of an allocation beyond those of idle accelerators; a part of one draws as much as a whole."""
    each = math.ceil(one.request.resources.get("GPU", 0.0))
    found = 0.0
    for name, count in held.items():
        power = seen.power.get(pool_of(seen.node_by_id[name]))
        found += each * count * (power.busy_watts - power.idle_watts) if power else 0.0
    return found


TENANTS = (
    Tenant(name="research", guaranteed={"a100": 6}, limit={"a100": 12}),
    Tenant(name="vision", parent="research", guaranteed={"a100": 2}),
    Tenant(name="speech", parent="research", guaranteed={"a100": 2}, weight=2),
    Tenant(name="product", weight=2, limit={"l4": 6}),
)

TIGHTER = tuple(dataclasses.replace(one, guaranteed={}, limit={"a100": 3, "l4": 2}) for one in TENANTS)
"""The same tenants after their limits were lowered."""
POWER = {"a100": PoolPower(busy_watts=400, idle_watts=50), "l4": PoolPower(busy_watts=70, idle_watts=20)}


@st.composite
def clusters(draw: st.DrawFn) -> tuple[Node, ...]:
    """Up to ten nodes in up to three pools, racks and zones, some of them dead or draining."""
    found = []
    for number in range(draw(st.integers(1, 10))):
        pool = draw(st.sampled_from(["a100", "a100", "l4", "cpu"]))
        state = draw(st.sampled_from(["up", "up", "up", "up", "dead", "drains"]))
        made = node(
            f"n{number}",
            gpus=0 if pool == "cpu" else draw(st.sampled_from([1, 2, 4, 8])),
            pool=pool,
            rack=draw(st.sampled_from(["", "r1", "r2"])),
            zone=draw(st.sampled_from(["", "z1"])),
            alive=state != "dead",
            draining=state == "drains",
        )
        found.append(made)
    return tuple(found)


@st.composite
def jobs(draw: st.DrawFn, prefix: str = "j", at: float = 0.0, finite: bool = False) -> tuple[Job, ...]:
    """Up to twelve jobs of all kinds that wait."""
    found = []
    for number in range(draw(st.integers(0, 12))):
        low = draw(st.integers(1, 6))
        resources: dict[str, float] = draw(
            st.sampled_from([{"GPU": 1.0}, {"GPU": 2.0, "CPU": 8.0}, {"GPU": 0.5}, {"CPU": 3.0}, {"GPU": 4.0}])
        )
        request = Request(
            job_id=f"{prefix}{number}",
            tenant=draw(st.sampled_from(["vision", "speech", "product", "research", "unlisted"])),
            priority=draw(st.integers(-1, 3)),
            min_workers=low,
            max_workers=low + draw(st.integers(0, 6)),
            resources=resources,
            pools=draw(st.sampled_from([(), (), ("a100",), ("l4", "a100"), ("cpu",)])),
            span_pools=draw(st.booleans()),
            deadline_s=draw(st.sampled_from([None, 200.0, 2000.0])),
            work=draw(st.sampled_from([10.0, 500.0, 3000.0] if finite else [None, 10.0, 500.0, 3000.0])),
            is_preemptible=draw(st.booleans()),
        )
        held = not finite and draw(st.integers(0, 9)) == 0
        found.append(Job(request=request, submitted_s=at + draw(st.integers(0, 3)), is_held=held))
    return tuple(found)


def renamed(nodes: Sequence[Node], states: Sequence[str]) -> tuple[Node, ...]:
    """The same nodes with other states: up, dead or drains."""
    return tuple(
        dataclasses.replace(one, alive=state != "dead", draining=state == "drains")
        for one, state in zip(nodes, states, strict=True)
    )
