"""The codec gives back what it was given, says no to anything else, and is found by the hook."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numcodecs")

import nexus_codec_blosc
from nexus_codec_blosc.codec import BloscCodec, item_bytes

from nexus_ext import Llama
from nexus_ext.hooks import DoesNotFit, FormatError, NexusError
from nexus_ext.testing import (
    FakeEngine,
    check_codec,
    load_plugins,
    machine,
    use_plugins,
    write_llama,
)

if TYPE_CHECKING:
    from nexus_ext.plugins import Plugins

TINY = {"n_layers": 3, "n_embd": 64, "n_ff": 128, "n_heads": 4, "n_heads_kv": 2, "n_vocab": 320}
CODEC = BloscCodec()
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "TQ1_0", "MXFP4", "")


def there_and_back(raw: bytes, type_name: str) -> bytes:
    out = bytearray(len(raw))
    CODEC.decode(memoryview(CODEC.encode(memoryview(raw), type_name)), memoryview(out))
    return bytes(out)


@given(st.binary(max_size=3000), st.sampled_from(TYPES))
@settings(max_examples=150)
def test_what_is_encoded_decodes_to_the_same_bytes(raw: bytes, type_name: str) -> None:
    assert there_and_back(raw, type_name) == raw


@pytest.mark.parametrize("type_name", TYPES)
def test_larger_chunks_that_are_no_multiple_of_a_block(type_name: str) -> None:
    raw = random.Random(type_name).randbytes(200_001)
    assert there_and_back(raw, type_name) == raw


def test_items_are_the_blocks_of_ggml() -> None:
    assert [item_bytes(name) for name in ("F16", "Q8_0", "Q4_K", "nothing")] == [2, 34, 144, 1]


def test_weights_become_smaller_because_they_are_shuffled() -> None:
    weights = np.random.default_rng(0).normal(0, 0.02, 1 << 16).astype(np.float32)
    raw = memoryview(weights.tobytes())
    assert len(CODEC.encode(raw, "F32")) < 0.9 * len(raw)
    assert len(CODEC.encode(raw, "F32")) < 0.97 * len(CODEC.encode(raw, ""))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"\xff" * len(data),
        lambda data: data[:16] + bytes(len(data) - 16),
    ],
)
def test_what_is_no_chunk_is_refused(change) -> None:
    raw = bytes(range(256)) * 64
    data = change(CODEC.encode(memoryview(raw), "F32"))
    with pytest.raises(FormatError, match="blosc"):
        CODEC.decode(memoryview(data), memoryview(bytearray(len(raw))))


def test_a_chunk_of_another_size_is_refused() -> None:
    data = CODEC.encode(memoryview(bytes(1000)), "F32")
    for size in (0, 999, 1001, 1 << 20):
        with pytest.raises(FormatError, match="1000"):
            CODEC.decode(memoryview(data), memoryview(bytearray(size)))


@given(st.data())
@settings(max_examples=200)
def test_damaged_chunks_raise_or_decode_but_never_crash(data: st.DataObject) -> None:
    raw = bytes(range(256)) * 16
    stored = bytearray(CODEC.encode(memoryview(raw), "Q8_0"))
    for _ in range(data.draw(st.integers(1, 4))):
        stored[data.draw(st.integers(0, len(stored) - 1))] = data.draw(st.integers(0, 255))
    out = bytearray(len(raw))
    try:
        CODEC.decode(memoryview(stored), memoryview(out))
    except FormatError as error:
        assert "blosc" in str(error)


def test_the_codec_keeps_what_codecs_promise() -> None:
    report = check_codec(CODEC)
    assert max(report.ratios.values()) < 1.01


def test_a_model_becomes_an_nxf_that_is_verified_runs_the_same_and_comes_back(
    tmp_path: Path,
) -> None:
    [model] = write_llama(tmp_path / "tiny.gguf", **TINY)
    nxf, back = tmp_path / "tiny.nxf", tmp_path / "back.gguf"
    plugins = load_plugins(nexus_codec_blosc)
    engine = FakeEngine(plugins)
    done = engine.command("convert", model, nxf, "--codec", "blosc")
    assert done.status == 0, done.err
    assert b"blosc" in nxf.read_bytes()
    assert engine.command("convert", nxf, back).status == 0
    assert back.read_bytes() == model.read_bytes()
    assert _logits(nxf, plugins) == _logits(model, plugins)


def test_who_reads_it_without_the_plugin_is_told_what_is_missing(tmp_path: Path) -> None:
    [model] = write_llama(tmp_path / "tiny.gguf", **TINY)
    nxf = tmp_path / "tiny.nxf"
    engine = FakeEngine(load_plugins(nexus_codec_blosc))
    assert engine.command("convert", model, nxf, "--codec", "blosc").status == 0
    with pytest.raises(NexusError, match="blosc"):
        _logits(nxf, load_plugins())


def _logits(path: Path, plugins: Plugins) -> bytes:
    """Return the bits of the logits of a model, half of whose weights are streamed."""
    options = {"hardware": machine(), "n_ctx": 64, "n_threads": 2, "logits_all": True}
    with use_plugins(plugins):
        try:
            llm = Llama(str(path), weights=1, verbose=False, **options)
        except DoesNotFit as error:
            llm = Llama(str(path), weights=error.smallest_bytes, verbose=False, **options)
        try:
            llm.eval([1, 5, 6, 7])
            assert llm.nexus.stats().bytes_read > 0
            return bytes(llm.scores[: llm.n_tokens].tobytes())
        finally:
            llm.close()
