"""What the server counts, as Prometheus reads it. One registry a server."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from nexus_ext.multiplexer.api import Done, ModelStatus
from nexus_ext.plugins import plugins

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of requests and tokens; states of models are read when somebody asks."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "nexus_requests",
            "Requests that were answered.",
            ("path", "status"),
            registry=self.registry,
        )
        self._in_flight = Gauge(
            "nexus_requests_in_flight", "Requests that are being answered.", registry=self.registry
        )
        self._tokens = Counter(
            "nexus_tokens",
            "Tokens: of prompts, of prompts that were cached, generated.",
            ("model", "kind"),
            registry=self.registry,
        )
        self._seconds = Counter(
            "nexus_compute_seconds",
            "Time in queues, loading, on prompts and generating, summed over requests.",
            ("model", "kind"),
            registry=self.registry,
        )
        self._first = Histogram(
            "nexus_time_to_first_token_seconds",
            "From the start of a request to its first token.",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._memory = Gauge(
            "nexus_budget_bytes", "The memory budget.", ("kind",), registry=self.registry
        )
        self._models = Gauge(
            "nexus_model_bytes",
            "Memory that a model holds.",
            ("model", "kind"),
            registry=self.registry,
        )
        self._disabled = Gauge(
            "nexus_plugin_disabled",
            "Hooks that a plugin is not asked for any more, since it failed.",
            ("plugin", "hook"),
            registry=self.registry,
        )
        self._slots = Gauge(
            "nexus_model_requests",
            "Requests of a model that run or wait.",
            ("model", "kind"),
            registry=self.registry,
        )

    def began(self) -> None:
        self._in_flight.inc()

    def ended(self, path: str, status: int) -> None:
        self._in_flight.dec()
        self._requests.labels(path, str(status)).inc()

    def generated(self, model: str, done: Done) -> None:
        tokens, seconds = self._tokens, self._seconds
        tokens.labels(model, "prompt").inc(done.n_prompt_tokens)
        tokens.labels(model, "cached").inc(done.n_cached_tokens)
        tokens.labels(model, "generated").inc(done.n_tokens)
        seconds.labels(model, "queue").inc(done.queue_ns / 1e9)
        seconds.labels(model, "load").inc(done.load_ns / 1e9)
        seconds.labels(model, "prefill").inc(done.prefill_ns / 1e9)
        seconds.labels(model, "decode").inc(done.decode_ns / 1e9)
        self._first.labels(model).observe((done.queue_ns + done.load_ns + done.prefill_ns) / 1e9)

    def text(self, models: Sequence[ModelStatus], budget: tuple[int, int]) -> bytes:
        """Return all metrics in Prometheus' text format."""
        self._memory.labels("used").set(budget[0])
        self._memory.labels("total").set(budget[1])
        self._disabled.clear()
        for plugin, hook, _ in plugins().disabled():
            self._disabled.labels(plugin, hook).set(1)
        self._models.clear()
        self._slots.clear()
        for model in models:
            self._models.labels(model.name, "resident").set(model.resident_bytes)
            self._models.labels(model.name, "kv").set(model.kv_bytes)
            self._models.labels(model.name, "gpu").set(model.gpu_bytes)
            self._slots.labels(model.name, "running").set(model.n_running)
            self._slots.labels(model.name, "waiting").set(model.n_waiting)
        return generate_latest(self.registry)

    def names(self) -> set[str]:
        """Return the names of all metrics here."""
        return {metric.name for metric in self.registry.collect()}
