"""Which deployment answers a call: pure decisions over what is deployed, healthy and shared out."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelyard.errors import ConfigError, NotFoundError, UnavailableError, nearest
from modelyard.serving.protocol import ServedModel


class State(enum.IntEnum):
    """How near a deployment is to an answer; less is nearer."""

    RUNNING = 0
    """A replica runs."""
    COMING = 1
    """One is started, or would be by a call, which then waits for it."""
    DOWN = 2
    """None could be started."""


@dataclass(frozen=True)
class Target:
    """One deployment of a model: the stable one, its canary, or that of a site."""

    application: str
    served: ServedModel
    site: str | None = None
    """The edge site it is pinned to; None in the cloud."""
    is_canary: bool = False
    state: State = State.RUNNING

    @property
    def model(self) -> str:
        """What callers ask for."""
        return self.served.name


@dataclass(frozen=True)
class Share:
    """What a canary gets of its model's calls."""

    percent: float
    """0 to 100; the rest goes to the stable deployment."""
    is_shadow: bool = False
    """It gets copies of that share, and its answers are thrown away."""
    withdrawn: str = ""
    """Why it was taken out, when it was; it then gets nothing."""

    def __post_init__(self) -> None:
        if not 0 <= self.percent <= 100:
            raise ConfigError(f"percent={self.percent:g} is outside 0..100", "choose a share of the calls in percent")


@dataclass(frozen=True)
class Way:
    """Where a call goes: the first target that works; `shadow` gets a copy whose answer nobody waits for."""

    targets: tuple[Target, ...]
    shadow: Target | None = None

    def pick(self, failures: Mapping[str, int]) -> Target:
        """The one to ask now, given how often each application has failed in this call.

        One that runs comes before one that would have to start, whatever has failed; then the one that failed least.
        """
        return min(self.targets, key=lambda target: (target.state, failures.get(target.application, 0)))


def choose(targets: Sequence[Target], shares: Mapping[str, Share], model: str, *, site: str | None, draw: float) -> Way:
    """The way of one call.

    A running deployment at the caller's site comes first, then the cloud's, then whatever other site serves the model;
    behind them those that are starting, in the same order. In the cloud a canary is first for its share.

    Args:
        targets: all that is deployed.
        shares: what canaries get, by application.
        site: where the caller is at home.
        draw: a number in [0, 1), uniform over calls.

    Raises:
        NotFoundError: nobody serves a model of that name.
        UnavailableError: nothing that serves it is up.
    """
    mine = [target for target in targets if target.model == model]
    if not mine:
        raise NotFoundError(f"there is no model {model!r}", nearest(model, {target.model for target in targets}))
    if all(target.state is State.DOWN for target in mine):
        raise UnavailableError(f"nothing that serves {model!r} is running", "see modelyard serve status")
    first, shadow = None, None
    for canary in (target for target in mine if target.is_canary and target.state is State.RUNNING):
        share = shares.get(canary.application, Share(0.0))
        if not share.withdrawn and draw * 100 < share.percent:
            first, shadow = (first, canary) if share.is_shadow else (canary, shadow)
    stable = [target for target in mine if not target.is_canary]
    if first is not None and site is not None and any(t.site == site and t.state is State.RUNNING for t in stable):
        first = None  # the site answers its own callers

    def rank(target: Target) -> tuple[State, int, str]:
        near = 0 if site is not None and target.site == site else 1 if target.site is None else 2
        return (target.state, near, target.application)

    ordered = sorted((target for target in stable if target.state is not State.DOWN), key=rank)
    return Way(tuple([first, *ordered] if first is not None else ordered), shadow)
