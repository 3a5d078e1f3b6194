"""Which deployment a call goes to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.errors import ConfigError, NotFoundError, UnavailableError
from modelyard.serving.deployment.routing import Share, State, Target, Way, choose
from modelyard.serving.protocol import ServedModel


def target(name: str, **fields: object) -> Target:
    model = name.partition("@")[0].removesuffix("--canary")
    served = ServedModel(model, f"models:/{model}/1", "causal_lm", "transformers", 0)
    site = name.partition("@")[2].removesuffix("--canary") or None
    return Target(name, served, site=site, is_canary=name.endswith("--canary"), **fields)  # type: ignore[arg-type]


def names(way: Way) -> list[str]:
    return [each.application for each in way.targets]


FLEET = [target("gpt"), target("gpt@north"), target("gpt@south"), target("other")]


def test_a_caller_is_answered_at_his_site_then_in_the_cloud_then_elsewhere() -> None:
    assert names(choose(FLEET, {}, "gpt", site="south", draw=0.5)) == ["gpt@south", "gpt", "gpt@north"]


def test_without_a_site_the_cloud_comes_first() -> None:
    assert names(choose(FLEET, {}, "gpt", site=None, draw=0.5))[0] == "gpt"


def test_a_site_that_is_down_fails_over_to_the_cloud() -> None:
    fleet = [target("gpt"), target("gpt@north", state=State.DOWN)]
    assert names(choose(fleet, {}, "gpt", site="north", draw=0.5)) == ["gpt"]


def test_one_that_runs_is_before_one_that_starts_and_nobody_is_asked_for_ever() -> None:
    fleet = [target("gpt"), target("gpt@north", state=State.COMING)]
    assert names(choose(fleet, {}, "gpt", site="north", draw=0.5)) == ["gpt", "gpt@north"]
    alone = [target("gpt", state=State.COMING)]
    assert names(choose(alone, {}, "gpt", site=None, draw=0.5)) == ["gpt"], "a call waits for its replica"


def test_an_unknown_model_lists_the_nearest_and_a_dead_one_is_unavailable() -> None:
    with pytest.raises(NotFoundError, match="did you mean 'gpt'"):
        choose(FLEET, {}, "gtp", site=None, draw=0.0)
    with pytest.raises(UnavailableError):
        choose([target("gpt", state=State.DOWN)], {}, "gpt", site=None, draw=0.0)


@given(st.floats(0, 0.999), st.floats(0, 100))
def test_a_canary_gets_exactly_its_share_of_the_draws(draw: float, percent: float) -> None:
    fleet = [target("gpt"), target("gpt--canary")]
    way = choose(fleet, {"gpt--canary": Share(percent)}, "gpt", site=None, draw=draw)
    assert (names(way)[0] == "gpt--canary") == (draw * 100 < percent)
    assert "gpt" in names(way), "the stable one answers when the canary cannot"


def test_a_shadow_gets_a_copy_and_never_answers() -> None:
    fleet = [target("gpt"), target("gpt--canary")]
    way = choose(fleet, {"gpt--canary": Share(50, is_shadow=True)}, "gpt", site=None, draw=0.2)
    assert (names(way), way.shadow) == (["gpt"], fleet[1])


@pytest.mark.parametrize("share", [Share(100, withdrawn="it failed"), None])
def test_a_withdrawn_canary_and_one_without_a_share_get_nothing(share: Share | None) -> None:
    fleet = [target("gpt"), target("gpt--canary")]
    shares = {"gpt--canary": share} if share else {}
    assert names(choose(fleet, shares, "gpt", site=None, draw=0.0)) == ["gpt"]


def test_a_canary_that_is_down_gets_nothing() -> None:
    fleet = [target("gpt"), target("gpt--canary", state=State.DOWN)]
    assert names(choose(fleet, {"gpt--canary": Share(100)}, "gpt", site=None, draw=0.0)) == ["gpt"]


def test_callers_at_a_site_are_no_part_of_the_clouds_canary() -> None:
    fleet = [target("gpt"), target("gpt--canary"), target("gpt@north")]
    assert names(choose(fleet, {"gpt--canary": Share(100)}, "gpt", site="north", draw=0.0))[0] == "gpt@north"


def test_a_share_beyond_the_whole_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"percent=101 is outside 0\.\.100"):
        Share(101)


def test_a_call_that_failed_goes_to_the_one_that_failed_least_but_never_to_one_that_does_not_run() -> None:
    fleet = [target("gpt"), target("gpt@north", state=State.COMING), target("gpt@south")]
    way = choose(fleet, {}, "gpt", site="north", draw=0.5)

    def asked(**failures: int) -> str:
        return way.pick({name.replace("_", "@"): count for name, count in failures.items()}).application

    assert asked() == "gpt"
    assert asked(gpt=1) == "gpt@south"
    assert asked(gpt=1, gpt_south=1) == "gpt"
    assert asked(gpt=9, gpt_south=9) == "gpt", "north would have to start first"
