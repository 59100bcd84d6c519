"""OpenTelemetry spans for the requests of nexus_ext.

    pip install "nexus-otel[otlp]"
    OTEL_TRACES_EXPORTER=otlp OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318 nexus serve

In a program that sets up OpenTelemetry itself, spans go where its own spans go. What was asked and
answered is in no span.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nexus_ext.hooks import hookimpl

if TYPE_CHECKING:
    from nexus_ext.hooks import ModelInfo, RequestInfo

nexus_plugin_api = 1


@hookimpl
def nexus_model_loaded(info: ModelInfo) -> None:
    """Set up the exporter that the environment names, before the first request."""
    from nexus_otel.provider import set_up

    set_up()


@hookimpl
def nexus_request_done(info: RequestInfo) -> None:
    """Record a request that has ended, as a span and its phases."""
    from nexus_otel.spans import record

    record(info)
