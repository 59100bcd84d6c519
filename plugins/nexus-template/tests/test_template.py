"""What this plugin decides, adds and sees; and that a model computes the same with it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from nexus_template.codec import ZlibCodec

from nexus_ext.plugins import Plugins
from nexus_ext.routing import RoutingTrace
from nexus_ext.testing import FakeEngine, assert_same_tokens, check_codec, scripted_server

GIB = 1 << 30


def test_every_hook_is_found_and_in_use(nexus_plugins: Plugins) -> None:
    (record,) = (r for r in nexus_plugins.list_plugins() if r.name == "template")
    assert record.error == ""
    assert {
        "nexus_cache_policy",
        "nexus_expert_predictor",
        "nexus_io_policy",
        "nexus_placement_solver",
    } <= set(record.decides)


def test_tensors_are_kept_in_memory_by_name_where_they_fit(
    nexus_engine: FakeEngine, tiny_dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = tiny_dense.stat().st_size // 2
    without = nexus_engine.plan(tiny_dense, weights_bytes=half)
    assert without == FakeEngine().plan(tiny_dense, weights_bytes=half)  # the built-in's
    streamed = sorted(name for name, tier in without.tiers.items() if tier == "nvme")[0]
    monkeypatch.setenv("NEXUS_TEMPLATE_KEEP", f"^{streamed}$")
    assert nexus_engine.plan(tiny_dense, weights_bytes=half).tiers[streamed] == "ram"
    monkeypatch.setenv("NEXUS_TEMPLATE_KEEP", ".")  # all of it cannot be kept
    assert nexus_engine.plan(tiny_dense, weights_bytes=half) == without


def test_only_what_fits_twice_goes_through_the_page_cache(nexus_engine: FakeEngine) -> None:
    def mode(streamed_bytes: int, limit_bytes: int | None = None) -> str:
        return nexus_engine.io_mode(
            streamed_bytes=streamed_bytes,
            resident_bytes=GIB,
            available_bytes=5 * GIB,
            limit_bytes=limit_bytes,
        )

    assert mode(2 * GIB) == "buffered"
    assert mode(2 * GIB + 1) == "direct"
    assert mode(2 * GIB, limit_bytes=3 * GIB) == "direct"


def test_recency_decides_in_small_caches(
    nexus_engine: FakeEngine, routing_trace: RoutingTrace
) -> None:
    small = nexus_engine.cache(routing_trace, share=0.2)
    large = nexus_engine.cache(routing_trace, share=0.5)
    assert (small.policy, large.policy) == ("lru", "adaptive")
    assert small.chosen.hit_rate < large.chosen.hit_rate < large.belady.hit_rate


def test_small_caches_are_not_filled_with_guesses(
    nexus_engine: FakeEngine, routing_trace: RoutingTrace
) -> None:
    assert nexus_engine.predictor(routing_trace, share=0.1).predictor == "none"
    assert nexus_engine.predictor(routing_trace, share=0.5).predictor == "auto"


def test_the_codec_gives_back_what_it_got() -> None:
    report = check_codec(ZlibCodec())
    assert report.ratios["F32"] < 1.0


def test_the_command_adds_up(nexus_engine: FakeEngine, tiny_dense: Path) -> None:
    sizes = nexus_engine.command("template", tiny_dense, "--json").json
    assert sizes["ffn"] == max(sizes.values())
    shown = nexus_engine.command("template", tiny_dense)
    assert shown.status == 0
    assert shown.out.splitlines()[0].split() == [f"{sizes['ffn']:,}", "ffn"]


def test_a_model_that_is_not_there_is_an_error_with_a_status(nexus_engine: FakeEngine) -> None:
    result = nexus_engine.command("template", "no-such-model.gguf")
    assert result.status != 0
    assert "no-such-model.gguf" in result.err


def test_what_happens_is_logged(
    nexus_engine: FakeEngine, tiny_dense: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nexus_template")
    with nexus_engine.model(tiny_dense, weights_bytes=tiny_dense.stat().st_size // 2) as model:
        model.request(n_tokens=8)
    text = caplog.text
    assert "loaded" in text and "8 tokens, 1000.0 a second" in text and "closed" in text


def test_the_server_shows_what_it_counts(nexus_plugins: Plugins) -> None:
    with scripted_server(nexus_plugins, answer="twelve bytes") as client:
        before = client.get("/template").json()["tokens"]
        body = {"model": "scripted", "prompt": "hello"}
        assert client.post("/v1/completions", json=body).status_code == 200
        assert nexus_plugins.wait_for_observers()  # the server tells them in a thread of its own
        assert client.get("/template").json()["tokens"] == before + 12
        assert 'nexus_template_tokens_total{outcome="stop"}' in client.get("/metrics").text


@pytest.mark.parametrize("kind", ["tiny_dense", "tiny_moe"])
def test_a_model_computes_the_same_with_it(
    kind: str, nexus_plugins: Plugins, request: pytest.FixtureRequest
) -> None:
    same = assert_same_tokens(request.getfixturevalue(kind), nexus_plugins)
    assert same.read_bytes > 0
