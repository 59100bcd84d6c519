"""Sensitivities that were measured before are taken from the cache, if they are whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from nexus_ext.errors import FormatError
from nexus_ext.quality.importance import ImportanceMatrix
from nexus_ext.runtime import allocation, sensitivity, sensitivity_cache
from nexus_ext.testing.synthetic import write_llama
from tests.stories import STORIES

MATRIX = "blk.1.ffn_down.weight"


def test_what_was_measured_is_kept_and_what_is_broken_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NEXUS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sensitivity, "_MAX_PROBES", 2)
    measured: list[int] = []

    def divergences(weights: object, groups: Sequence[object], *_: object, **__: object) -> object:
        measured.append(len(groups))
        return [0.5] * len(groups)

    monkeypatch.setattr(allocation, "measure_divergences", divergences)
    [source] = write_llama(
        tmp_path / "f16.gguf",
        n_layers=2,
        n_embd=256,
        n_ff=512,
        n_heads=4,
        n_heads_kv=2,
        n_vocab=512,
        quant="F16",
    )
    imatrix = ImportanceMatrix({}, 0)

    def known(text: bytes = STORIES) -> allocation.Measured:
        return allocation.measure(str(source), imatrix, text, types=("Q3_K", "Q8_0"))

    first = known()
    assert len(measured) == 1 and first.sensitivities[MATRIX].divergence_per_error > 0
    assert known() == first and len(measured) == 1
    assert known(STORIES + b"more").n_weights == first.n_weights and len(measured) == 2
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2
    for broken in (
        b"",
        b"{",
        b'{"nexus_sensitivity": 2}',
        b'{"nexus_sensitivity": 1, "tensors": {}}',
    ):
        for file in files:
            file.write_bytes(broken)
        caplog.clear()
        n = len(measured)
        assert known() == first and len(measured) == n + 1
        assert "the stored sensitivities are ignored" in caplog.text
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    monkeypatch.setenv("NEXUS_CACHE_DIR", str(blocked))
    assert known() == first
    assert "the sensitivities are not stored" in caplog.text
    data = json.loads(
        files[0].read_text() if files[0].stat().st_size > 100 else files[1].read_text()
    )
    data["tensors"][MATRIX]["errors"]["Q3_K"] = float("nan")
    with pytest.raises(FormatError, match="is no error and no divergence"):
        sensitivity_cache._parsed(json.dumps(data), "f", list(first.sensitivities))
