"""From a request that has ended to spans: one for the request, one below it for each phase.

Names and attributes follow OpenTelemetry's conventions for generative AI where they have one; ours
begin with `nexus.`. There are counts, durations and names of models, and the class of an error: no
text of a prompt, of an answer or of an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from opentelemetry import trace
from opentelemetry.trace import SpanKind, Status, StatusCode

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider
    from opentelemetry.util.types import AttributeValue

    from nexus_ext.hooks import RequestInfo

SCOPE: Final = "nexus_otel"
PHASES: Final = ("queue", "load", "prefill", "decode")  # in the order in which they happen


def record(info: RequestInfo, provider: TracerProvider | None = None) -> None:
    """Write the spans of one request. Below the caller's own span if there is one."""
    tracer = trace.get_tracer(SCOPE, tracer_provider=provider)
    span = tracer.start_span(
        f"text_completion {_name(info)}",
        kind=SpanKind.INTERNAL,
        attributes=attributes(info),
        start_time=info.started_unix_ns,
    )
    if not span.is_recording():  # nobody exports, or this one is not sampled
        span.end()
        return
    inside = trace.set_span_in_context(span)
    begin = info.started_unix_ns
    for phase in PHASES:
        duration_ns: int = getattr(info, f"{phase}_ns")
        if duration_ns:
            child = tracer.start_span(f"nexus.{phase}", context=inside, start_time=begin)
            begin += duration_ns
            child.end(begin)
    if info.outcome == "error":
        span.set_attribute("error.type", error_class(info.error))
        span.set_status(Status(StatusCode.ERROR))
    span.end(max(info.ended_unix_ns, begin))


def attributes(info: RequestInfo) -> dict[str, AttributeValue]:
    """Return what is said of a request."""
    return {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "nexus_ext",
        "gen_ai.request.model": _name(info),
        "gen_ai.usage.input_tokens": info.n_prompt_tokens,
        "gen_ai.usage.output_tokens": info.n_tokens,
        "nexus.request.id": info.id,
        "nexus.request.outcome": info.outcome,
        "nexus.interface": info.interface,
        "nexus.cached_tokens": info.n_cached_tokens,
        "nexus.read_bytes": info.read_bytes,
        "nexus.model.fingerprint": info.model.fingerprint,
        "nexus.model.architecture": info.model.architecture,
        "nexus.model.resident_bytes": info.model.resident_bytes,
        "nexus.model.streamed_bytes_per_token": info.model.streamed_bytes_per_token,
    }


def error_class(error: str) -> str:
    """Return the class of "Class: text"; the text may quote what was asked."""
    name = error.partition(":")[0].strip()
    return name if name.isidentifier() else "_OTHER"


def _name(info: RequestInfo) -> str:
    """Return the name of the model; of a path only the file, folders may name people."""
    return (info.model_name or info.model.path).rpartition("/")[2]
