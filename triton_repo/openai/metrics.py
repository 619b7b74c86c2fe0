"""What the frontend counts, for Prometheus."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from triton_repo.openai.streams import Usage

LEFT = 499
"""The status under which requests are counted whose client has left; nobody is sent it."""


class Metrics:
    """Counters of one frontend."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "ngpt_openai_requests",
            "Requests by endpoint and status (499: the client left)",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self._open = Gauge("ngpt_openai_requests_open", "Requests that are being answered", registry=self._registry)
        self._first = Histogram(
            "ngpt_openai_first_piece_seconds", "Seconds from a streamed request to its first piece", registry=self._registry
        )
        self._took = Histogram(
            "ngpt_openai_request_seconds", "Seconds from a request to the end of its answer", registry=self._registry
        )
        self._tokens = Counter(
            "ngpt_openai_tokens",
            "Tokens of answers, and of their prompts, counted when an answer is complete",
            ["kind"],
            registry=self._registry,
        )
        for kind in ("prompt", "completion"):
            self._tokens.labels(kind)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)

    def begin(self, endpoint: str) -> Counted:
        """A request has come."""
        self._open.inc()
        return Counted(self, endpoint)

    def first(self, seconds: float) -> None:
        """The first piece of a stream is there."""
        self._first.observe(seconds)

    def end(self, endpoint: str, status: int, seconds: float, usage: Usage | None) -> None:
        """A request has been answered, or left."""
        self._open.dec()
        self._took.observe(seconds)
        self._requests.labels(endpoint, str(status)).inc()
        if usage is not None:
            self._tokens.labels("prompt").inc(usage.prompt)
            self._tokens.labels("completion").inc(usage.completion)


class Counted:
    """One request. It ends once, whatever ends it first."""

    def __init__(self, metrics: Metrics, endpoint: str) -> None:
        self._metrics, self._endpoint, self._start, self._ended = metrics, endpoint, time.monotonic(), False
        self.usage: Usage | None = None

    def first(self) -> None:
        """The first piece of a stream is there."""
        self._metrics.first(time.monotonic() - self._start)

    def end(self, status: int) -> None:
        """It has been answered, or left."""
        if not self._ended:
            self._ended = True
            self._metrics.end(self._endpoint, status, time.monotonic() - self._start, self.usage)
