"""Tenants as a tree: what each may hold, what it has borrowed, and what it can get back.

Amounts are GPUs per pool (a worker's `gpus_per_worker`). A tenant's use is that of its whole subtree, and a limit
holds for the subtree. What a tenant holds above its guarantee is borrowed: it keeps it until somebody asks for what
*they* are guaranteed, and only the side of the tree that has borrowed is asked to give it back.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from modelyard.errors import ConfigError, nearest
from modelyard.scheduling.model import Tenant

SLACK = 1e-6
"""GPUs by which sums of fractions may be off."""


@dataclass(frozen=True)
class Limit:
    """A limit that stands in the way."""

    tenant: str
    """Whose limit it is: the job's tenant or one above it."""
    pool: str
    used: float
    limit: float


class Tree:
    """The tenants, checked. A name that is in no list stands under the root, with weight 1 and no quota."""

    def __init__(self, tenants: Iterable[Tenant] = ()) -> None:
        """Refuse a tree that cannot be: two of one name, unknown parents, cycles, guarantees beyond the parent's."""
        self.by_name: dict[str, Tenant] = {}
        for tenant in tenants:
            if tenant.name in self.by_name:
                raise ConfigError(f"tenant {tenant.name!r} is defined twice", "give each tenant one entry")
            self.by_name[tenant.name] = tenant
        for name in sorted(self.by_name):
            _check_amounts(self.by_name[name])
            self._check_parent(self.by_name[name])
        self._check_cycles()
        self.children: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self.by_name):
            if parent := self.by_name[name].parent:
                self.children[parent].append(name)
        for name in sorted(self.children):
            self._check_guarantees(self.by_name[name])
        self._paths: dict[str, tuple[str, ...]] = {}

    def tenant(self, name: str) -> Tenant:
        """The tenant of a name."""
        return self.by_name.get(name) or Tenant(name=name)

    def path(self, name: str) -> tuple[str, ...]:
        """The tenant and all above it, from itself to the top."""
        if name not in self._paths:
            self._paths[name] = tuple(self._upwards(name))
        return self._paths[name]

    def _upwards(self, name: str) -> Iterator[str]:
        current: str | None = name
        while current:
            yield current
            current = self.tenant(current).parent

    def _check_parent(self, tenant: Tenant) -> None:
        if tenant.parent is not None and tenant.parent not in self.by_name:
            known = ", ".join(sorted(self.by_name))
            raise ConfigError(
                f"tenant {tenant.name!r}: parent={tenant.parent!r} is no tenant; known: {known}",
                nearest(tenant.parent, self.by_name),
            )

    def _check_cycles(self) -> None:
        sound: set[str] = set()
        for start in sorted(self.by_name):
            walk: list[str] = []
            for name in self._upwards(start):
                if name in sound:
                    break
                if name in walk:
                    cycle = [*walk[walk.index(name) :], name]
                    raise ConfigError(
                        f"tenants are their own parents: {' -> '.join(cycle)}",
                        f"give one of them another parent, or none: {', '.join(sorted(set(cycle)))}",
                    )
                walk.append(name)
            sound.update(walk)

    def _check_guarantees(self, parent: Tenant) -> None:
        members = [self.by_name[name] for name in self.children[parent.name]]
        for pool in sorted({pool for child in members for pool in child.guaranteed}):
            asked = sum(child.guaranteed.get(pool, 0.0) for child in members)
            if asked > parent.guaranteed.get(pool, 0.0) + SLACK:
                each = ", ".join(f"{c.name}={c.guaranteed[pool]:g}" for c in members if c.guaranteed.get(pool))
                raise ConfigError(
                    f"tenant {parent.name!r}: guaranteed.{pool}={parent.guaranteed.get(pool, 0.0):g} is less than the "
                    f"{asked:g} GPUs of its children ({each})",
                    "raise the parent's guarantee or lower the children's",
                )


class Ledger:
    """What each tenant's subtree holds, while a decision is made."""

    def __init__(self, tree: Tree) -> None:
        """Start with nothing held."""
        self.tree = tree
        self._used: dict[tuple[str, str], float] = defaultdict(float)

    def charge(self, tenant: str, gpus: Mapping[str, float], sign: int = 1) -> None:
        """Add GPUs per pool to a tenant and all above it; `sign=-1` takes them off."""
        for name in self.tree.path(tenant):
            for pool, amount in gpus.items():
                self._used[name, pool] += sign * amount

    def used(self, tenant: str, pool: str) -> float:
        """GPUs of a pool that the tenant's subtree holds."""
        return self._used[tenant, pool]

    def blocking(self, tenant: str, pool: str, gpus: float) -> Limit | None:
        """The first limit, from the tenant upwards, that `gpus` more would break."""
        for name in self.tree.path(tenant):
            limit = self.tree.tenant(name).limit.get(pool)
            if limit is not None and self._used[name, pool] + gpus > limit + SLACK:
                return Limit(name, pool, self._used[name, pool], limit)
        return None

    def may_hold(self, tenant: str, pool: str, gpus: float) -> bool:
        """Whether `gpus` more stay within the limits of the tenant and all above it."""
        return self.blocking(tenant, pool, gpus) is None

    def headroom(self, tenant: str, pool: str) -> float:
        """GPUs that the tenant may still add; infinite without limits."""
        left = float("inf")
        for name in self.tree.path(tenant):
            limit = self.tree.tenant(name).limit.get(pool)
            if limit is not None:
                left = min(left, limit - self._used[name, pool])
        return max(left, 0.0)

    def borrowed(self, tenant: str, pool: str) -> float:
        """GPUs its subtree holds above what it is guaranteed."""
        return max(self._used[tenant, pool] - self.tree.tenant(tenant).guaranteed.get(pool, 0.0), 0.0)

    def is_guaranteed(self, tenant: str, pool: str, gpus: float) -> bool:
        """Whether `gpus` more are covered by what the tenant itself, or one above it, is guaranteed."""
        return any(
            guaranteed > 0 and self._used[name, pool] + gpus <= guaranteed + SLACK
            for name in self.tree.path(tenant)
            for guaranteed in [self.tree.tenant(name).guaranteed.get(pool, 0.0)]
        )

    def may_reclaim(self, claimant: str, holder: str, pool: str, gpus: float) -> bool:
        """Whether `gpus` that the claimant asks for may be taken from the holder.

        The guarantee that covers the claim must lie below the lowest tenant that both have above them (inside one
        guarantee, siblings settle by share and not by force), and every tenant on the holder's side must have
        borrowed.
        """
        above = set(self.tree.path(holder))
        own = [name for name in self.tree.path(claimant) if name not in above]
        shared = set(self.tree.path(claimant))
        theirs = [name for name in self.tree.path(holder) if name not in shared]
        covered = any(
            guaranteed > 0 and self._used[name, pool] + gpus <= guaranteed + SLACK
            for name in own
            for guaranteed in [self.tree.tenant(name).guaranteed.get(pool, 0.0)]
        )
        return covered and all(self.borrowed(name, pool) > SLACK for name in theirs) and bool(theirs)


def _check_amounts(tenant: Tenant) -> None:
    if not 0 < tenant.weight < math.inf:
        raise ConfigError(
            f"tenant {tenant.name!r}: weight={tenant.weight:g} is not above 0 and finite", "use 1 for an equal share"
        )
    for field, amounts in (("guaranteed", tenant.guaranteed), ("limit", tenant.limit)):
        for pool, amount in amounts.items():
            if not 0 <= amount < math.inf:
                raise ConfigError(
                    f"tenant {tenant.name!r}: {field}.{pool}={amount:g} is below 0 or not finite",
                    "use 0 or more" + ("; for no limit leave it out" if field == "limit" else ""),
                )
    for pool, amount in tenant.guaranteed.items():
        if amount > tenant.limit.get(pool, amount):
            raise ConfigError(
                f"tenant {tenant.name!r}: guaranteed.{pool}={amount:g} is above limit.{pool}={tenant.limit[pool]:g}",
                "raise the limit or lower the guarantee",
            )
