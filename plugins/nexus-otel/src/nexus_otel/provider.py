"""The exporter that OTEL_TRACES_EXPORTER names, unless the program has set up its own."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Final

from opentelemetry import trace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.sdk.trace.export import SpanExporter

VARIABLE: Final = "OTEL_TRACES_EXPORTER"
SERVICE: Final = "nexus"

_log = logging.getLogger("nexus_otel")


def set_up(environ: Mapping[str, str] | None = None) -> bool:
    """Install a provider if one is asked for and none is there; tell whether one was installed."""
    environ = os.environ if environ is None else environ
    name = environ.get(VARIABLE, "").strip().lower()
    if name in ("", "none") or not isinstance(
        trace.get_tracer_provider(), trace.ProxyTracerProvider
    ):
        return False
    exporter = exporter_of(name)
    if exporter is None:
        return False
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = {} if "OTEL_SERVICE_NAME" in environ else {"service.name": SERVICE}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)  # flushed at the end of the process
    return True


def exporter_of(name: str) -> SpanExporter | None:
    """Return the exporter of this name; None, and a warning, if it is unknown or not installed."""
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter(out=sys.stderr)  # answers go to stdout
    if name == "otlp":
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError:
            _log.warning('%s=otlp: not installed: pip install "nexus-otel[otlp]"', VARIABLE)
            return None
        exporter: SpanExporter = OTLPSpanExporter()
        return exporter
    _log.warning('%s is %r; known are "otlp", "console" and "none"', VARIABLE, name)
    return None
