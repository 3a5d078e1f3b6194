"""The gateway's Prometheus metrics. Labels are models, routes and codes: no callers, nothing a caller can make up."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from modelyard.serving.gateway.audit import CallRecord

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)


class Metrics:
    """One set for each application, in a registry of its own."""

    def __init__(self) -> None:
        """All series start at zero."""
        self.registry = CollectorRegistry()

        self.requests = Counter(
            "modelyard_gateway_requests",
            "Calls that ended, by route, model and outcome.",
            ("route", "model", "status", "outcome"),
            registry=self.registry,
        )
        self.in_flight = Gauge("modelyard_gateway_in_flight", "Calls being answered.", registry=self.registry)
        self.first_token = Histogram(
            "modelyard_gateway_first_token_seconds",
            "From the request's first byte to the answer's first token.",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.between_tokens = Histogram(
            "modelyard_gateway_between_pieces_seconds",
            "Mean time between the pieces of one answer.",
            ("model",),
            buckets=_GAPS,
            registry=self.registry,
        )
        self.duration = Histogram(
            "modelyard_gateway_duration_seconds",
            "Whole calls.",
            ("route", "model"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.tokens = Counter(
            "modelyard_gateway_tokens", "Tokens, by model and kind.", ("model", "kind"), registry=self.registry
        )
        self.refusals = Counter(
            "modelyard_gateway_limit_refusals",
            "Calls refused by a limit: requests, tokens or quota.",
            ("limit",),
            registry=self.registry,
        )
        self.audit_failures = Counter(
            "modelyard_gateway_audit_failures", "Records the audit hook failed to keep.", registry=self.registry
        )

    def count(self, record: CallRecord) -> None:
        """Add one ended call."""
        model = record.model or ""
        self.requests.labels(record.route, model, str(record.status), record.outcome).inc()
        self.duration.labels(record.route, model).observe(record.duration_s)
        if record.prompt_tokens:
            self.tokens.labels(model, "prompt").inc(record.prompt_tokens)
        if record.completion_tokens:
            self.tokens.labels(model, "completion").inc(record.completion_tokens)
        if record.first_token_s is not None:
            self.first_token.labels(model).observe(record.first_token_s)

    def text(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self.registry)
