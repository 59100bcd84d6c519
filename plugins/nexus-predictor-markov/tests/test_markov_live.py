"""From a trace of a model to a run of it, whose every logit is that of stock llama.cpp."""

from __future__ import annotations

from pathlib import Path

import nexus_predictor_markov as plugin
import pytest
from nexus_predictor_markov.chain import train

from nexus_ext.routing import RoutingTrace
from nexus_ext.testing import (
    FakeEngine,
    MoeDims,
    assert_same_tokens,
    load_plugins,
    machine,
    write_moe,
)

TEXT = "One day a little girl found a box. She wanted to know what was in it. " * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "moe.gguf"
    [written] = write_moe(path, dims=MoeDims(n_layers=3, n_experts=16, n_used=3))
    return written


@pytest.fixture(scope="module")
def learned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was learned from a trace of the model."""
    folder = tmp_path_factory.mktemp("learned")
    traced, text = folder / "t.nxtrace", folder / "t.txt"
    text.write_text(TEXT, encoding="utf-8")
    hardware = folder / "hardware.json"
    hardware.write_text(machine().to_json(), encoding="utf-8")
    options = ("--prompt-file", text, "--ctx", "64", "--hardware", hardware)
    done = FakeEngine(load_plugins(plugin)).command("trace", model, "-o", traced, *options)
    assert done.status == 0, done.err
    trace = RoutingTrace.from_bytes(traced.read_bytes())
    train(trace).learned().write(folder / "x.learned")
    return folder / "x.learned"


def test_every_logit_is_that_of_stock_llama_cpp(
    model: Path, learned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXUS_MARKOV", str(learned))
    assert_same_tokens(model, load_plugins(plugin))
