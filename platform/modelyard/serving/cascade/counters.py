"""What a cascade has done since it started."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass
class Counters:
    """Of one cascade. Each input of `predict` counts by itself, and each call for text."""

    answered: int = 0
    """Answers given, by whichever model."""
    sent_up: int = 0
    """Answered by the large model."""
    unsure: int = 0
    """Answered by the small model although it was unsure, because the large one could not be reached."""
    small_failed: int = 0
    """Sent up because the small model could not answer."""
    bytes_up: int = 0
    """Inputs and prompts that were sent up, whether or not an answer came back."""
    bytes_down: int = 0
    """Answers of the large model."""

    @property
    def share_up(self) -> float:
        """Share of the answers that came from the large model."""
        return self.sent_up / self.answered if self.answered else 0.0


_HELP = {
    "answered": "Answers of a cascade, by either model.",
    "sent_up": "Answers that came from the large model.",
    "unsure": "Unsure answers of the small model that stood because the large one could not be reached.",
    "small_failed": "Answers sent up because the small model could not answer.",
    "bytes_up": "Bytes of inputs and prompts sent to the large model.",
    "bytes_down": "Bytes of the large model's answers.",
}


class CascadeCollector(Collector):
    """Counters as Prometheus metrics `modelyard_cascade_*_total` with the label `model`; register it once."""

    def __init__(self, counters: Callable[[], Mapping[str, Counters]]) -> None:
        """`counters` gives those of each cascade by its name; called at each scrape."""
        self._counters = counters

    def collect(self) -> Iterable[Metric]:
        """The metrics now."""
        for field in fields(Counters):
            family = CounterMetricFamily(f"modelyard_cascade_{field.name}", _HELP[field.name], labels=["model"])
            for name, counters in self._counters().items():
                family.add_metric([name], getattr(counters, field.name))
            yield family
