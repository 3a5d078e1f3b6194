"""How much work arrives: now, how surely, and when a replica started now would be ready."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import NormalDist

BIN_S = 10.0
"""Width of the bins that are forecast, seconds."""
_BANK = tuple((level, trend) for level in (0.05, 0.1, 0.2, 0.4) for trend in (0.0, 0.02, 0.1))
"""Weights of level and trend: memories of 200 down to 25 s, trends of none to 100 s. The data choose among them."""
_DAMPING = 0.98
"""Of the trend, for each bin: the upper end of what is usual (Hyndman & Athanasopoulos 2021: 0.8 to 0.98)."""
_DISCOUNT = 0.98
"""Of an error, for each bin: the last eight minutes decide which smoother speaks."""
_SLOTS = 96
"""Points of the cycle, a quarter of an hour apart on a day."""


@dataclass
class Smoother:
    """Holt's exponential smoothing of level and trend, the trend damped (Gardner & McKenzie 1985)."""

    level_weight: float
    trend_weight: float
    level: float = 0.0
    trend: float = 0.0
    error: float = 0.0
    """Discounted mean square of the errors made at the horizon."""
    pending: deque[float] = field(default_factory=deque)
    """Forecasts for bins that have not ended, the next bin first."""

    def forecast(self, bins: float) -> float:
        """So many bins ahead."""
        damped = _DAMPING * (1 - _DAMPING**bins) / (1 - _DAMPING)
        return float(max(0.0, self.level + self.trend * damped))

    def update(self, value: float, weight: float, horizon: int) -> None:
        """Take in a bin; `weight` is the share of it in the discounted error."""
        if len(self.pending) >= horizon:
            self.error += weight * ((value - self.pending.popleft()) ** 2 - self.error)
        before = self.level
        gain = max(self.level_weight, weight)  # the first bins are averaged
        self.level = gain * value + (1 - gain) * (self.level + _DAMPING * self.trend)
        self.trend = self.trend_weight * (self.level - before) + (1 - self.trend_weight) * _DAMPING * self.trend
        self.pending.append(self.forecast(horizon))


class Season:
    """The cycle of demand: for each point of it the mean demand there over the mean of all (Winters 1960)."""

    smoothing = 0.4

    def __init__(self, season_s: float) -> None:
        self.season_s = season_s
        self.mean = [0.0] * _SLOTS
        self.cycles = [0] * _SLOTS
        self.current: tuple[int, float, int] = (-1, 0.0, 0)
        """The point being filled: which, sum, bins."""

    def add(self, at_s: float, value: float) -> None:
        """A bin's demand."""
        slot = int(at_s / self.season_s * _SLOTS) % _SLOTS
        index, total, count = self.current
        if slot != index:
            if index >= 0 and count:
                old = self.mean[index]
                share = self.smoothing if self.cycles[index] else 1.0
                self.mean[index] = old + share * (total / count - old)
                self.cycles[index] += 1
            index, total, count = slot, 0.0, 0
        self.current = (index, total + value, count + 1)

    def factor(self, at_s: float) -> float:
        """Demand then over the mean demand; 1 until two cycles were seen."""
        overall = sum(self.mean) / _SLOTS
        if min(self.cycles) < 2 or overall <= 0:
            return 1.0
        place = at_s / self.season_s * _SLOTS - 0.5
        left, part = math.floor(place) % _SLOTS, place - math.floor(place)
        here = (1 - part) * self.mean[left] + part * self.mean[(left + 1) % _SLOTS]
        return max(0.05, here / overall)


class Forecast:
    """A bank of smoothers over bins without their season; the one with the least error at the horizon speaks."""

    def __init__(self, horizon_s: float, season_s: float | None) -> None:
        self.horizon = max(1, math.ceil(horizon_s / BIN_S))
        self.bank = [Smoother(level, trend) for level, trend in _BANK]
        self.season = Season(season_s) if season_s else None
        self.bins = 0
        self.noise = 0.0
        """Variance of a bin around the level, from successive differences (von Neumann 1941)."""
        self.last: float | None = None

    def add(self, at_s: float, value: float) -> None:
        """A bin that ended at `at_s`."""
        self.bins += 1
        weight = max(1 / self.bins, 1 - _DISCOUNT)
        plain = value / self.factor(at_s)
        if self.last is not None:
            self.noise += weight * ((plain - self.last) ** 2 / 2 - self.noise)
        self.last = plain
        for one in self.bank:
            one.update(plain, weight, self.horizon)
        if self.season:
            self.season.add(at_s - BIN_S / 2, value)

    @property
    def best(self) -> Smoother:
        """Whose error at the horizon is least."""
        return min(self.bank, key=lambda one: one.error)

    def factor(self, at_s: float) -> float:
        """The season's, 1 without one."""
        return self.season.factor(at_s) if self.season else 1.0

    def at(self, now_s: float, ahead_s: float) -> float:
        """Demand expected `ahead_s` from now."""
        return self.best.forecast(ahead_s / BIN_S) * self.factor(now_s + ahead_s)

    def level_error(self, now_s: float, ahead_s: float) -> float:
        """Standard deviation of what the level will be, without the noise of single bins around it."""
        best = self.best
        least = best.level_weight / (2 - best.level_weight) * self.noise
        return math.sqrt(max(best.error - self.noise, least)) * self.factor(now_s + ahead_s)


class Demand:
    """Work that arrives, in seconds of a replica per second, from counts at each tick."""

    def __init__(self, horizon_s: float, season_s: float | None) -> None:
        self.forecast = Forecast(horizon_s, season_s)
        self.start_s: float | None = None
        self.bin_end_s = 0.0
        self.bin_work = 0.0

    def add(self, now_s: float, work_s: float) -> None:
        """What arrived since the last call."""
        if self.start_s is None:
            self.start_s, self.bin_end_s = now_s, now_s + BIN_S
        while now_s >= self.bin_end_s:
            self.forecast.add(self.bin_end_s, self.bin_work / BIN_S)
            self.bin_end_s, self.bin_work = self.bin_end_s + BIN_S, 0.0
        self.bin_work += work_s

    def expected(self, now_s: float, ahead_s: float, share: float) -> float:
        """What must be reckoned with from now to then: the larger of the forecasts for both, and what the error of the
        later one does not exceed with a probability of `share`. In the first bin, what came so far over all of it.
        """
        if self.forecast.bins == 0:
            return self.bin_work / BIN_S
        level = max(self.forecast.at(now_s, 0.0), self.forecast.at(now_s, ahead_s))
        error = NormalDist().inv_cdf(share) * self.forecast.level_error(now_s, ahead_s)
        return max(0.0, level + error)

    def dispersion(self, work_s: float) -> float:
        """Variance of the arriving work over its mean and one request's work; 2 until there is history.

        2 is Poisson arrivals of exponential work. Within 1 (no less is believed of ten-second bins) and 4: what swings
        more is no noise around a level, and the backlog and the hold answer it.
        """
        level = self.forecast.best.level
        if self.forecast.bins < 6 or level <= 0 or work_s <= 0:
            return 2.0
        return min(4.0, max(1.0, self.forecast.noise * BIN_S / (level * work_s)))
