"""What /metrics tells, in a registry of this server's own."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from isobatch._version import __version__
from isobatch.server.worker import Worker

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters, histograms, and gauges that look at the engines when they are asked.

    Args:
        workers: by the name of their model.
        fingerprints: of each.
    """

    def __init__(self, workers: Mapping[str, Worker], fingerprints: Mapping[str, str | None]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "isobatch_requests", "HTTP requests answered", ("path", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "isobatch_request_seconds",
            "From the request's first byte to the reply's last",
            ("path",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_piece_seconds = Histogram(
            "isobatch_time_to_first_token_seconds",
            "Of streamed replies",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter("isobatch_prompt_tokens", "Of finished requests", registry=self.registry)
        self.reply_tokens = Counter("isobatch_reply_tokens", "Of finished requests", registry=self.registry)
        info = Gauge("isobatch_info", "Always 1", ("version", "model", "fingerprint"), registry=self.registry)
        gauges = {
            name: Gauge(f"isobatch_{name}", said, ("model",), registry=self.registry)
            for name, said in {
                "ready": "Whether requests are accepted",
                "completions_in_flight": "Accepted and not over",
                "completions_running": "With memory of their own",
                "completions_waiting": "Without",
                "kv_blocks": "Of the KV cache",
                "kv_blocks_free": "Of the KV cache, held by no request",
                "drafted_tokens": "Guessed ahead and computed, since the start",
                "accepted_tokens": "Of these, said",
            }.items()
        }
        for model, worker in workers.items():
            info.labels(__version__, model, fingerprints[model] or "none").set(1)
            _watch(gauges, model, worker)

    def text(self) -> bytes:
        """All of it, in the text format of Prometheus."""
        return generate_latest(self.registry)


def _watch(gauges: Mapping[str, Gauge], model: str, worker: Worker) -> None:
    engine = worker.engine
    readers = {
        "ready": lambda: float(worker.state == "ready"),
        "completions_in_flight": lambda: float(worker.in_flight),
        "completions_running": lambda: float(engine.scheduler.num_running),
        "completions_waiting": lambda: float(engine.scheduler.num_waiting),
        "kv_blocks": lambda: float(engine.pool.num_blocks),
        "kv_blocks_free": lambda: float(engine.pool.num_free),
        "drafted_tokens": lambda: float(engine.drafted_tokens),
        "accepted_tokens": lambda: float(engine.accepted_tokens),
    }
    for name, read in readers.items():
        gauges[name].labels(model).set_function(read)
