"""`nexus demo`: streams, accounts, and fails when anything differs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nexus_ext.cli.demo import MODEL, PROMPT
from nexus_ext.formats import open_gguf
from nexus_ext.runtime import verify
from nexus_ext.runtime.verify import Difference
from tests.cli_support import call, hardware_file


@pytest.fixture(scope="module")
def hardware(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(hardware_file(tmp_path_factory.mktemp("hardware")))


def test_the_bundled_model_is_free_to_pass_on() -> None:
    catalog = open_gguf(MODEL)
    assert catalog.metadata["general.license"] == "mit"
    assert "MIT" in (MODEL.parent / "README.md").read_text(encoding="utf-8")


def test_the_demo_streams_and_nothing_differs(hardware: str) -> None:
    done = call("demo", "-n", "12", "--hardware", hardware)
    assert done.status == 0, done.err
    assert PROMPT in done.out
    for words in ("budget", "resident", "streamed", "hit rate", "identical to stock llama.cpp"):
        assert words in done.out
    assert "DIFFERENT" not in done.out


def test_the_demo_has_json(hardware: str) -> None:
    fields = call("demo", "-n", "4", "--weights", "800K", "--hardware", hardware, "--json").json
    assert fields["identical"] and fields["same_tokens"]
    assert fields["resident_bytes"] <= fields["budget_bytes"] == 800 << 10
    assert fields["accounting"]["decode_stats"]["bytes_read"] > 0
    assert fields["comparison"]["n_values_different"] == 0
    assert fields["text"].startswith(PROMPT)


def test_a_difference_is_shown_and_fails(hardware: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = verify.verify_model

    def differing(*args: Any, **kwargs: Any) -> Any:
        right = found(*args, **kwargs)
        first = Difference("decode", 3, 7, 5, 0.25)
        comparison = replace(right.comparison, first=first, n_positions_different=1)
        return replace(right, comparison=comparison)

    monkeypatch.setattr(verify, "verify_model", differing)
    done = call("demo", "-n", "4", "--hardware", hardware)
    assert done.status == 1
    assert "DIFFERENT" in done.out and "5 logits of position 3" in done.err
    done = call("demo", "-n", "4", "--hardware", hardware, "--json")
    assert done.status == 1 and not done.json["identical"]


def test_a_budget_that_is_too_small_is_status_3(hardware: str) -> None:
    assert call("demo", "--weights", "10K", "--hardware", hardware).status == 3
