"""Metrics of plugins, rendered one plugin at a time: what one breaks, the others do not miss."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from nexus_ext.plugin_registry import show
from nexus_ext.plugins import Rubbish, plugins
from nexus_ext.policies import MetricsCollector

HOOK: Final = "nexus_metrics"


def plugin_metrics(taken: Iterable[str]) -> bytes:
    """Return the metrics of all plugins in Prometheus' text format.

    `taken` are names of metrics that are there already. A plugin that raises, returns what is no
    metric, or takes the name of another is disabled.
    """
    names = set(taken)
    texts = []
    for plugin, collector in plugins().collect(HOOK, _accept):
        render = functools.partial(_render, collector, frozenset(names))
        nothing: tuple[bytes, set[str]] = (b"", set())
        text, added = plugins().guarded(plugin, HOOK, render, nothing)
        names |= added
        texts.append(text)
    return b"".join(texts)


def _accept(answer: object) -> MetricsCollector:
    if not isinstance(answer, MetricsCollector) or not callable(answer.collect):
        raise Rubbish(f"returned {show(answer)}, which has no collect()")
    return answer


def _render(collector: MetricsCollector, names: frozenset[str]) -> tuple[bytes, set[str]]:
    metrics = list(collector.collect())
    added = set()
    for metric in metrics:
        if not isinstance(metric, Metric):
            raise Rubbish(f"returned {show(metric)}, which is no metric")
        if metric.name in names or metric.name in added:
            raise Rubbish(f"has the metric {metric.name!r}, which exists")
        added.add(metric.name)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Fixed(metrics))
    return generate_latest(registry), added


class _Fixed(Collector):
    """Metrics that were collected already."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics
