"""A request becomes a span with its phases; what was asked and answered is in none of them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

pytest.importorskip("opentelemetry.sdk")

import nexus_otel
from nexus_otel import provider as setup
from nexus_otel.spans import attributes, error_class, record
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from nexus_ext import Llama
from nexus_ext.hooks import ModelInfo, RequestInfo
from nexus_ext.testing import assert_healthy, load_plugins, machine, use_plugins, write_llama

Exported = tuple[TracerProvider, InMemorySpanExporter]

TINY = {"n_layers": 3, "n_embd": 64, "n_ff": 128, "n_heads": 4, "n_heads_kv": 2, "n_vocab": 320}
START = 1_700_000_000_000_000_000
INFO = RequestInfo(
    model=ModelInfo("/home/ann/m.gguf", "f" * 32, "llama", 1000, 2000, "direct"),
    n_prompt_tokens=7,
    n_tokens=3,
    prefill_ns=300,
    decode_ns=400,
    read_bytes=6000,
    id="r1",
    interface="server",
    model_name="library/m",
    outcome="stop",
    n_cached_tokens=2,
    queue_ns=100,
    load_ns=200,
    started_unix_ns=START,
    ended_unix_ns=START + 1050,
)


@pytest.fixture
def exported() -> Exported:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider, exporter


def spans_of(info: RequestInfo, exported: Exported) -> list[ReadableSpan]:
    provider, exporter = exported
    record(info, provider)
    return list(exporter.get_finished_spans())


def test_a_request_is_a_span_and_its_phases_are_below_it_one_after_the_other(
    exported: Exported,
) -> None:
    *phases, request = spans_of(INFO, exported)
    assert request.name == "text_completion m"
    assert (request.start_time, request.end_time) == (START, START + 1050)
    assert request.parent is None and request.status.is_ok is not False
    times = {span.name: (span.start_time - START, span.end_time - START) for span in phases}
    assert times == {
        "nexus.queue": (0, 100),
        "nexus.load": (100, 300),
        "nexus.prefill": (300, 600),
        "nexus.decode": (600, 1000),
    }
    assert {span.parent.span_id for span in phases} == {request.context.span_id}


def test_attributes_are_counts_and_names_and_no_folder_is_told(exported: Exported) -> None:
    request = spans_of(replace(INFO, model_name=""), exported)[-1]
    assert request.attributes["gen_ai.request.model"] == "m.gguf"
    assert request.attributes["gen_ai.usage.input_tokens"] == 7
    assert request.attributes["gen_ai.usage.output_tokens"] == 3
    assert request.attributes["nexus.read_bytes"] == 6000
    assert request.attributes["nexus.cached_tokens"] == 2
    assert request.attributes["nexus.request.id"] == "r1"
    assert "ann" not in request.to_json()
    assert all(isinstance(value, (int, str)) for value in attributes(INFO).values())


def test_an_error_is_told_by_its_class_and_not_by_its_text(exported: Exported) -> None:
    failed = replace(INFO, outcome="error", error="ReadFailed: 'my secret' cannot be read")
    request = spans_of(failed, exported)[-1]
    assert request.status.status_code is trace.StatusCode.ERROR
    assert request.attributes["error.type"] == "ReadFailed"
    assert "secret" not in request.to_json()
    assert error_class("a prompt without a class") == "_OTHER"
    assert error_class("") == "_OTHER"


def test_the_span_of_a_caller_is_the_parent(exported: Exported) -> None:
    provider, exporter = exported
    with provider.get_tracer("app").start_as_current_span("work") as work:
        record(INFO, provider)
    request = next(s for s in exporter.get_finished_spans() if s.name.startswith("text"))
    assert request.parent.span_id == work.get_span_context().span_id


def test_what_is_not_sampled_costs_no_phases() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=ALWAYS_OFF)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    record(INFO, provider)
    record(INFO)  # nor where no provider is
    assert not exporter.get_finished_spans()


def test_phases_that_were_not_measured_have_no_span(exported: Exported) -> None:
    spans = spans_of(replace(INFO, queue_ns=0, load_ns=0), exported)
    assert [span.name for span in spans[:-1]] == ["nexus.prefill", "nexus.decode"]


def test_an_exporter_that_is_not_known_is_named_and_nothing_is_installed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert not setup.set_up({})
    assert not setup.set_up({"OTEL_TRACES_EXPORTER": "none"})
    assert not setup.set_up({"OTEL_TRACES_EXPORTER": "zipkin"})
    assert "'zipkin'" in caplog.text


def test_an_exporter_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, name, None)
    assert not setup.set_up({"OTEL_TRACES_EXPORTER": "otlp"})
    assert "nexus-otel[otlp]" in caplog.text


def test_console_writes_spans_to_stderr_at_the_end_and_a_provider_that_is_there_is_kept() -> None:
    """In a process of its own: a provider is set once."""
    code = """
import sys
sys.path[:0] = [PATHS]
from nexus_otel import provider, spans
from nexus_ext.hooks import ModelInfo, RequestInfo
environ = {"OTEL_TRACES_EXPORTER": "console"}
assert provider.set_up(environ) and not provider.set_up(environ)
model = ModelInfo("m.gguf", "f", "llama", 0, 0, None)
spans.record(RequestInfo(model, 1, 2, 3, 4, 5, started_unix_ns=1, ended_unix_ns=9))
"""
    paths = ", ".join(repr(p) for p in sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code.replace("PATHS", paths)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "text_completion m.gguf" in done.stderr and not done.stdout


def test_a_request_of_a_model_leaves_its_spans_and_nothing_of_its_text(
    tmp_path: Path,
    exported: Exported,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    provider, exporter = exported
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    plugins = load_plugins(nexus_otel)
    [path] = write_llama(tmp_path / "tiny.gguf", **TINY)
    with use_plugins(plugins):
        llm = Llama(str(path), hardware=machine(), n_ctx=64, verbose=False)
        tokens = list(islice(llm.generate([5, 6, 7, 8], temp=0.0), 3))
        llm.close()
    assert len(tokens) == 3
    assert_healthy(plugins)
    *phases, request = exporter.get_finished_spans()
    assert {span.name for span in phases} == {"nexus.prefill", "nexus.decode"}
    assert request.name == "text_completion tiny.gguf"
    assert request.attributes is not None
    assert request.attributes["gen_ai.usage.input_tokens"] == 4
    assert request.attributes["gen_ai.usage.output_tokens"] == 3
    assert request.attributes["nexus.interface"] == "python"
    assert all(isinstance(value, (int, str)) for value in request.attributes.values())
    assert str(tmp_path) not in request.to_json()
