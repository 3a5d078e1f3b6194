"""Request traces: the Azure LLM inference traces, and a seeded generator."""

from __future__ import annotations

import csv
import math
import random
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import Field

from modelyard.config import Config
from modelyard.errors import DataError


@dataclass(frozen=True)
class Request:
    """One call: seconds from the start of the trace, tokens in, tokens out."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival."""

    name: str
    requests: tuple[Request, ...]

    @property
    def duration_s(self) -> float:
        """To the last arrival."""
        return self.requests[-1].arrival_s if self.requests else 0.0

    def part(self, start_s: float, end_s: float, name: str) -> Trace:
        """The requests from `start_s` until before `end_s`, its start being second 0."""
        chosen = (one for one in self.requests if start_s <= one.arrival_s < end_s)
        moved = (Request(one.arrival_s - start_s, one.prompt_tokens, one.output_tokens) for one in chosen)
        return Trace(name, tuple(moved))


def read_azure(path: Path) -> Trace:
    """A file of the Azure LLM inference traces of 2023 (`TIMESTAMP,ContextTokens,GeneratedTokens`; CC-BY 4.0,
    github.com/Azure/AzurePublicDataset; Patel et al., Splitwise, ISCA 2024).

    Raises:
        DataError: the file cannot be read, has other columns or a row that is none.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.DictReader(lines))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", "give the path of an Azure LLM inference trace") from error
    requests: list[Request] = []
    start: float | None = None
    for number, row in enumerate(rows, start=2):
        try:
            whole, _, fraction = row["TIMESTAMP"].partition(".")
            moment = datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")
            start = moment if start is None else start
            requests.append(Request(moment - start, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}, line {number}: {error}", "the columns are TIMESTAMP, ContextTokens, GeneratedTokens"
            ) from error
    if not requests:
        raise DataError(f"{path} holds no request", "give the path of an Azure LLM inference trace")
    return Trace(path.stem, tuple(sorted(requests, key=lambda one: one.arrival_s)))


class Burst(Config):
    """Requests on top of the others, evenly spread over a short time."""

    at_s: float = Field(ge=0)
    requests: int = Field(gt=0)
    over_s: float = Field(default=1.0, ge=0)


class Generator(Config):
    """Poisson arrivals whose rate swings by a sine, lognormal prompts and answers, bursts on top.

    Arrivals come by thinning (Lewis & Shedler 1979). Token counts are lognormal with the given median and sigma of
    the logarithm, at least 1 and at most 8,192. The same seed gives the same trace.
    """

    duration_s: float = Field(default=3600.0, gt=0)
    requests_per_s: float = Field(default=5.0, ge=0)
    """Mean over the cycle."""
    swing: float = Field(default=0.0, ge=0, le=1)
    """Height of the sine over the mean: 0.5 swings from half to one and a half."""
    cycle_s: float = Field(default=3600.0, gt=0)
    prompt_median: float = Field(default=1000.0, gt=0)
    prompt_sigma: float = Field(default=0.8, ge=0)
    output_median: float = Field(default=150.0, gt=0)
    output_sigma: float = Field(default=0.8, ge=0)
    bursts: tuple[Burst, ...] = ()
    seed: int = 0

    def trace(self) -> Trace:
        """Draw it."""
        chance = random.Random(self.seed)
        arrivals: list[float] = []
        highest = self.requests_per_s * (1 + self.swing)
        now_s = 0.0
        while highest > 0:
            now_s += chance.expovariate(highest)
            if now_s >= self.duration_s:
                break
            rate = self.requests_per_s * (1 - self.swing * math.cos(2 * math.pi * now_s / self.cycle_s))
            if chance.random() * highest < rate:
                arrivals.append(now_s)
        for burst in self.bursts:
            arrivals += [burst.at_s + burst.over_s * index / burst.requests for index in range(burst.requests)]
        requests = (
            Request(
                arrival_s,
                _tokens(chance, self.prompt_median, self.prompt_sigma),
                _tokens(chance, self.output_median, self.output_sigma),
            )
            for arrival_s in sorted(arrivals)
        )
        return Trace(f"generated, seed {self.seed}", tuple(requests))


def _tokens(chance: random.Random, median: float, sigma: float) -> int:
    return max(1, min(8192, round(median * math.exp(sigma * chance.gauss(0, 1)))))
