"""How much work arrives: now, how surely, and when a replica started now would be ready."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

BIN_S = 10.0
"""Width of the bins that are forecast, seconds."""
_BANK = tuple((level, trend) for level in (0.05, 0.1, 0.2, 0.4) for trend in (0.0, 0.02, 0.1))
_DAMPING = 0.98
_DISCOUNT = 0.98
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


class Peaks:
    """The fleet that the swings of the last half hour call for, without a model of them.

    A queueing formula knows nothing of bursts that come in rows. So the past is played through with fleets that were a
    multiple of the demand's level, as known one cold start earlier: which multiple would have kept all but a share of
    the work from waiting too long? A level of short memory follows ramps, one of long memory bridges the quiet between
    bursts; the one with the smallest fleet speaks.
    """

    cell_s = 4.0
    history_s = 1800.0
    memories_s = np.array([60.0, 180.0, 600.0, 1800.0])
    least_s = 120.0
    """Before so much history there is no answer."""
    multiples = np.geomspace(1.0, 30.0, 60)

    def __init__(self, horizon_s: float) -> None:
        count = int(self.history_s / self.cell_s)
        self.loads: deque[float] = deque(maxlen=count)
        self.known: deque[list[float]] = deque(maxlen=count)
        """Of each cell, the levels that a fleet ready by then was started for."""
        self.cells = 0
        self.settled_s = self.memories_s[0] + horizon_s  # the levels before were of too little
        self.coming = deque([[0.0] * len(self.memories_s)] * (1 + math.ceil(horizon_s / self.cell_s)))
        self.sums = np.zeros(len(self.memories_s))
        self.weights = np.zeros(len(self.memories_s))

    def add(self, load: float) -> None:
        """Mean load of a cell."""
        keep = np.exp(-self.cell_s / self.memories_s)
        self.cells += 1
        known = self.coming.popleft()
        if self.cells * self.cell_s > self.settled_s:
            self.loads.append(load)
            self.known.append(known)
        self.sums = keep * self.sums + (1 - keep) * load
        self.weights = keep * self.weights + (1 - keep)
        self.coming.append(self.levels.tolist())

    @property
    def levels(self) -> np.ndarray:
        """Averages that forget, one for each memory."""
        return self.sums / np.maximum(self.weights, 1e-9)

    def fleet(self, wait_s: float, share: float) -> tuple[float, int]:
        """Least multiple with which at most 1 - `share` of the work would have waited longer, and of which level."""
        if len(self.loads) * self.cell_s < self.least_s:
            return 0.0, 0
        known = np.array(self.known)
        fleets = known[:, :, None] * self.multiples
        backlog, late = np.zeros((2, *fleets.shape[1:]))
        for load, fleet in zip(self.loads, fleets, strict=True):
            late += load * (backlog > fleet * wait_s)
            backlog = np.maximum(0.0, backlog + (load - fleet) * self.cell_s)
        enough = late <= (1 - share) * sum(self.loads)
        enough[:, -1] = True
        least = self.multiples[np.argmax(enough, axis=1)]
        chosen = int(np.argmin(least * known.mean(axis=0) + np.where(enough[:, :-1].any(axis=1), 0.0, np.inf)))
        return float(least[chosen]), chosen


class Demand:
    """Work that arrives, in seconds of a replica per second, from counts at each tick."""

    windows_s = (2.0, 5.0, 10.0, 20.0, 40.0)
    memory_s = 3600.0
    """Of how bursts last."""

    def __init__(self, horizon_s: float, season_s: float | None) -> None:
        self.forecast = Forecast(horizon_s, season_s)
        self.peaks = Peaks(horizon_s)
        self.ticks: deque[tuple[float, float, float]] = deque()
        """When, work and requests."""
        self.start_s: float | None = None
        self.bin_end_s = self.cell_end_s = 0.0
        self.bin_work = self.cell_work = 0.0
        self.bursts: deque[tuple[float, float]] = deque()
        """When, and how far above the level."""
        self.horizon_s = horizon_s
        self.lasted, self.seen = 20.0, 20.0
        """What was left of bursts after the horizon, and bursts, squares in levels; one of a few seconds to begin."""

    def add(self, now_s: float, work_s: float, requests: float) -> None:
        """What arrived since the last call."""
        if self.start_s is None:
            self.start_s, self.bin_end_s, self.cell_end_s = now_s, now_s + BIN_S, now_s + Peaks.cell_s
        while now_s >= self.cell_end_s:
            self._end_cell()
        while now_s >= self.bin_end_s:
            self.forecast.add(self.bin_end_s, self.bin_work / BIN_S)
            self.bin_end_s, self.bin_work = self.bin_end_s + BIN_S, 0.0
        self.bin_work += work_s
        self.cell_work += work_s
        if requests > 0:
            self.ticks.append((now_s, work_s, requests))
        while self.ticks and self.ticks[0][0] <= now_s - self.windows_s[-1]:
            self.ticks.popleft()

    def _end_cell(self) -> None:
        load, level = self.cell_work / Peaks.cell_s, float(self.peaks.levels[2])
        if level > 0:
            keep = math.exp(-Peaks.cell_s / self.memory_s)
            while self.bursts and self.bursts[0][0] <= self.cell_end_s - self.horizon_s:
                height = self.bursts.popleft()[1]
                self.lasted = keep * self.lasted + height * max(0.0, min(height, load / level - 1))
                self.seen = keep * self.seen + height * height
            height = self.burst(self.cell_end_s) / level - 1
            if height > 0:
                self.bursts.append((self.cell_end_s, height))
        self.peaks.add(load)
        self.cell_end_s, self.cell_work = self.cell_end_s + Peaks.cell_s, 0.0

    @property
    def persistence(self) -> float:
        """Share of a burst that is left, on average, when a replica started for it is ready."""
        return self.lasted / self.seen

    def burst(self, now_s: float) -> float:
        """The load that is there for sure: the largest of the last seconds' means, each less two standard errors.

        Rises at the tick of a burst and not by the noise of a steady load. The error is reckoned from the number of
        requests, sqrt(2 / n) for Poisson arrivals of exponential work, so that more work never counts for less.
        """
        highest, work, requests = 0.0, 0.0, 0.0
        waiting = list(self.ticks)
        for window_s in self.windows_s:
            while waiting and waiting[-1][0] > now_s - window_s:
                _, more, count = waiting.pop()
                work, requests = work + more, requests + count
            if requests > 0:
                highest = max(highest, work / window_s * (1 - 2 * math.sqrt(2 / requests)))
        return highest

    def expected(self, now_s: float, ahead_s: float, share: float) -> float:
        """What must be reckoned with from now to then: the level that is not exceeded with a probability of `share` by
        the forecast, or what bursts like the present one leave over when a replica is ready.
        """
        if self.forecast.bins == 0:
            return self.burst(now_s)
        now = self.forecast.at(now_s, 0.0)
        level = max(now, self.forecast.at(now_s, ahead_s))
        surplus = max(0.0, self.burst(now_s) - now)
        error = NormalDist().inv_cdf(share) * self.forecast.level_error(now_s, ahead_s)
        return max(0.0, level + max(error, surplus * self.persistence))

    def dispersion(self, work_s: float) -> float:
        """Variance of the arriving work over its mean and one request's work; 2 until there is history."""
        level = self.forecast.best.level
        if self.forecast.bins < 6 or level <= 0 or work_s <= 0:
            return 2.0
        return min(4.0, max(1.0, self.forecast.noise * BIN_S / (level * work_s)))
