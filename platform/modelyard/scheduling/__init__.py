"""Who may use which accelerators, and when: queue, quotas, policies, leases."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelyard.scheduling.client import Lease, lease
    from modelyard.scheduling.model import Request, Tenant

__all__ = ["Lease", "Request", "Tenant", "lease"]

_HOMES = {"Lease": "client", "lease": "client", "Request": "model", "Tenant": "model"}


def __getattr__(name: str) -> Any:
    """Load a public name on first use: the policies need no database, and a simulation needs no client."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
