"""Figures of a server for Prometheus, in a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator

from .engine import Answer, Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts requests, tokens and times; the queue and the batches are the engine's."""

    def __init__(self, engine: Engine):
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self.registry = CollectorRegistry(auto_describe=True)
        more = {"registry": self.registry}
        self.requests = Counter("twigvlm_requests", "Requests that were answered", ("path", "status"), **more)
        self.prompt = Counter("twigvlm_prompt_tokens", "Tokens of prompts, visual ones included", **more)
        self.written = Counter("twigvlm_completion_tokens", "Tokens of answers", **more)
        self.drafted = Counter("twigvlm_drafted_tokens", "Tokens that the twig drafted", **more)
        self.accepted = Counter("twigvlm_accepted_tokens", "Drafted tokens that the base accepted", **more)
        times = {"buckets": SECONDS, **more}
        self.seconds = Histogram("twigvlm_request_seconds", "From a request to its whole answer", **times)
        self.first = Histogram("twigvlm_first_token_seconds", "From a request to its first token", **times)
        self.queued = Histogram("twigvlm_queue_seconds", "What a request waited for the model", **times)
        self.registry.register(_OfEngine(engine))

    def answered(self, answer: Answer, facts: dict, counts: dict[str, int], seconds: float) -> None:
        """One answer, as its reply tells it."""
        self.prompt.inc(counts["prompt_tokens"])
        self.written.inc(counts["completion_tokens"])
        self.drafted.inc(facts["drafted"])
        self.accepted.inc(facts["accepted"])
        self.seconds.observe(seconds)
        if facts["time_to_first_token"] is not None:
            self.first.observe(facts["time_to_first_token"])
        if answer.started is not None:
            self.queued.observe(answer.started - answer.asked)

    def text(self) -> tuple[bytes, str]:
        """What Prometheus reads, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class _OfEngine:
    """Read when they are asked for."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator:
        from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily

        yield GaugeMetricFamily("twigvlm_queue_waiting", "Requests that wait", value=self.engine.waiting)
        yield GaugeMetricFamily("twigvlm_queue_limit", "Requests that may wait", value=self.engine.max_queue)
        yield GaugeMetricFamily("twigvlm_running", "Requests that are being answered", value=self.engine.running)
        sizes, counted, rows = dict(self.engine.batches), 0, 0
        buckets = []
        for size in range(1, self.engine.max_batch + 1):
            counted += sizes.get(size, 0)
            rows += size * sizes.get(size, 0)
            buckets.append((f"{size}.0", counted))
        buckets.append(("+Inf", counted))
        yield HistogramMetricFamily(
            "twigvlm_batch_size", "Requests that were answered together", buckets, sum_value=rows
        )
