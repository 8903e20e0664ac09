"""Numbers for Prometheus."""

from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Watched(Protocol):
    @property
    def waiting(self) -> int: ...

    @property
    def busy(self) -> int: ...


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("flacuna_requests", "Answered requests", ["path", "status"], registry=registry)
        self.prompt_tokens = Counter("flacuna_prompt_tokens", "Tokens of prompts", registry=registry)
        self.shared_tokens = Counter(
            "flacuna_shared_prompt_tokens", "Tokens of prompts that were in a cache already", registry=registry
        )
        self.new_tokens = Counter("flacuna_new_tokens", "Generated tokens", registry=registry)
        self.failures = Counter("flacuna_failed_turns", "Computations that failed", registry=registry)
        self.first_token = Histogram(
            "flacuna_first_token_seconds", "From a request to its first token", registry=registry, buckets=_SECONDS
        )
        self._waiting = Gauge("flacuna_waiting_requests", "Answers that wait for a row", registry=registry)
        self._busy = Gauge("flacuna_busy_rows", "Rows in use", registry=registry)

    def watch(self, scheduler: Watched) -> None:
        self._waiting.set_function(lambda: scheduler.waiting)
        self._busy.set_function(lambda: scheduler.busy)

    def text(self) -> bytes:
        return generate_latest(self._registry)
