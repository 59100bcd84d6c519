"""Predictors of first-party plugins read experts ahead, and change no bit."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nexus_ext.formats import open_model
from nexus_ext.placement.experts import groups, slot_bytes
from nexus_ext.routing import RoutingTrace, TracedLayer
from nexus_ext.testing import load_plugins, use_plugins
from nexus_ext.testing.synthetic import MoeDims, write_moe
from tests.bench.plugins_path import add_plugins
from tests.integration.test_experts import assert_equal, cached, core_model, reference

add_plugins()

from nexus_predictor_lstm.train import Settings  # noqa: E402
from nexus_predictor_lstm.train import train as train_lstm  # noqa: E402
from nexus_predictor_markov.chain import train as train_markov  # noqa: E402

DIMS = MoeDims(n_layers=3, n_experts=16, n_used=3)
TRAIN: dict[str, Callable[[RoutingTrace], Any]] = {
    "markov": train_markov,
    "lstm": lambda trace: train_lstm(trace, Settings(n_hidden=8, n_epochs=1)),
}


def a_trace(path: Path) -> RoutingTrace:
    """Decisions that the model has not made: whatever is predicted, results stay."""
    catalog = open_model(str(path))
    layers = []
    for i, parts in enumerate(groups(catalog.tensors)):
        numbers = [(t * (k + 1) + i) % 5 * 3 + k for t in range(200) for k in range(3)]
        record = sum(t.nbytes // t.n_experts for t in parts)
        assert parts[0].layer is not None
        layers.append(TracedLayer(parts[0].layer, 16, 3, record, slot_bytes(parts), bytes(numbers)))
    return RoutingTrace(catalog.fingerprint, catalog.shape.architecture, (200,), tuple(layers))


@pytest.mark.parametrize("name", TRAIN)
def test_experts_are_read_ahead_by_the_plugin_and_no_bit_changes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    write_moe(path, dims=DIMS)
    expected = reference(path)
    TRAIN[name](a_trace(path)).learned().write(tmp_path / "learned")
    monkeypatch.setenv(f"NEXUS_{name.upper()}", str(tmp_path / "learned"))
    follower = importlib.import_module(f"nexus_predictor_{name}.follower")
    asked: list[int] = []

    class Spy(follower.Follower):  # type: ignore[misc,name-defined]
        automatic = False  # always, so that there is something to see

        def predict(self, layer: int, n_tokens: int, n_used: int, limit: int) -> Sequence[int]:
            asked.append(layer)
            found: Sequence[int] = super().predict(layer, n_tokens, n_used, limit)
            return found

    monkeypatch.setattr(follower, "Follower", Spy)
    plugin = importlib.import_module(f"nexus_predictor_{name}")
    with use_plugins(load_plugins(plugin)), cached(path, 6) as llm:
        assert_equal(llm, expected, name)
        stats, use = core_model(llm).stats(), core_model(llm).predictor_plugin()
    assert (use.name, use.why) == (name, "")
    assert set(asked) == {1, 2}, "nothing is computed before the first layer"
    assert stats.prefetched > 0 and stats.prefetch_used > 0


def test_a_model_that_was_not_learned_is_left_to_the_builtin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    write_moe(one, dims=DIMS)
    write_moe(other, dims=MoeDims(n_layers=2, n_experts=16, n_used=3))
    TRAIN["markov"](a_trace(one)).learned().write(tmp_path / "learned")
    monkeypatch.setenv("NEXUS_MARKOV", str(tmp_path / "learned"))
    with (
        use_plugins(load_plugins(importlib.import_module("nexus_predictor_markov"))),
        cached(other, 6) as llm,
    ):
        assert core_model(llm).predictor_plugin().name == ""
        assert core_model(llm).prediction().state == "watching"
    assert "not used" in caplog.text
