"""From traces to a file to a comparison, on the command line; and the hook, with and without it."""

from __future__ import annotations

import json
from pathlib import Path

import click
import nexus_predictor_markov as plugin
import numpy as np
import pytest
from click.testing import CliRunner, Result

from nexus_ext.hooks import ExpertPredictor, FormatError, ReadFailed, UsageError
from nexus_ext.routing import RoutingTrace, TracedLayer

TRAIN = ["markov", "train"]
EXTRA: list[str] = []


@pytest.fixture
def traces(tmp_path: Path) -> list[str]:
    """Two traces of one model, whose experts take turns."""
    paths = []
    for i, n_tokens in enumerate((400, 150)):
        numbers = np.arange(n_tokens)[:, None] + np.arange(2)
        layers = tuple(
            TracedLayer(layer, 6, 2, 1024, 1024, ((numbers + layer) % 6).astype(np.uint8).tobytes())
            for layer in range(3)
        )
        path = tmp_path / f"{i}.nxtrace"
        path.write_bytes(RoutingTrace("f", "test", (n_tokens,), layers).to_bytes())
        paths.append(str(path))
    return paths


def run(*arguments: str) -> Result:
    group = click.Group()
    plugin.nexus_register_commands(group)
    return CliRunner().invoke(group, arguments)


def test_train_and_evaluate(traces: list[str], tmp_path: Path) -> None:
    file = str(tmp_path / "x.learned")
    done = run(*TRAIN, *traces, "-o", file, *EXTRA)
    assert done.exit_code == 0, done.output
    assert file in done.output and "NEXUS_MARKOV" in done.output
    done = run("markov", "evaluate", file, traces[1])
    assert done.exit_code == 0 and "previous" in done.output and "hits" in done.output
    done = run("markov", "evaluate", file, traces[1], "--slots", "4", "--json")
    found = json.loads(done.output)
    assert found["slots"] == 4
    assert {one["predictor"] for one in found["scores"]} >= {"markov", "previous"}
    [ours] = [one for one in found["scores"] if one["predictor"] == "markov" and one["layer"] == 1]
    assert ours["slots"] > 0.9, "what takes turns can be told"


def test_files_are_not_overwritten_unasked(traces: list[str], tmp_path: Path) -> None:
    file = str(tmp_path / "x.learned")
    assert run(*TRAIN, traces[1], "-o", file, *EXTRA).exit_code == 0
    assert isinstance(run(*TRAIN, traces[1], "-o", file, *EXTRA).exception, UsageError)
    assert run(*TRAIN, traces[1], "-o", file, "--force", *EXTRA).exit_code == 0


def test_what_is_no_trace_and_what_is_no_(traces: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"text")
    for arguments in (
        [*TRAIN, str(other), "-o", "x"],
        ["markov", "evaluate", str(other), traces[0]],
    ):
        error = run(*arguments).exception
        assert isinstance(error, FormatError) and "other" in str(error)


def test_the_hook_predicts_by_the_file_that_is_named(
    traces: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NEXUS_MARKOV", raising=False)
    assert plugin.nexus_expert_predictor() is None
    file = str(tmp_path / "x.learned")
    assert run(*TRAIN, traces[0], "-o", file, *EXTRA).exit_code == 0
    monkeypatch.setenv("NEXUS_MARKOV", file)
    assert isinstance(plugin.nexus_expert_predictor(), ExpertPredictor)
    monkeypatch.setenv("NEXUS_MARKOV", file + ".gone")
    with pytest.raises(ReadFailed, match="gone"):
        plugin.nexus_expert_predictor()
