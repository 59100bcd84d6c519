"""Weights that a plugin's codec has encoded are streamed like any: decoded in C, or in Python."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nexus_ext.codecs import Codecs
from nexus_ext.errors import FormatError, ModelChanged, UsageError
from nexus_ext.formats import open_model
from nexus_ext.formats.nxf_convert import to_nxf
from nexus_ext.formats.nxf_layout import Rules
from nexus_ext.formats.sources import open_source
from nexus_ext.policies import NativePolicy
from nexus_ext.runtime.streamed_codecs import know_codec
from nexus_ext.testing.synthetic import write_llama
from tests.integration.streaming import Bits, logits, paged, prompt, stock
from tests.native_plugin import compiled, native

SMALL: dict[str, Any] = {"n_ctx": 128, "n_batch": 128, "n_ubatch": 64}
STREAMED = r"blk\.1\.ffn_up\.weight"

# The most frequent high byte of each pair is one bit; the other high bytes follow all low ones.
DECODE = """
int wrong = 0;
static int decode(void *user, const void *stored, size_t n_stored, void *raw, size_t n_raw) {
    (void)user;
    const uint8_t *in = stored, *bits = in + 1, *low = bits + (n_raw / 2 + 7) / 8;
    const uint8_t *high = low + n_raw / 2;
    uint8_t *out = raw;
    if (n_raw % 2 || n_stored < 1 + (n_raw / 2 + 7) / 8 + n_raw / 2) return 1;
    for (size_t i = 0; i < n_raw / 2; i++) {
        out[2 * i] = low[i];
        if (bits[i / 8] >> (7 - i % 8) & 1) out[2 * i + 1] = in[0];
        else if (high == in + n_stored) return 2;
        else out[2 * i + 1] = *high++;
    }
    out[0] ^= (uint8_t)wrong;
    return high == in + n_stored ? 0 : 3;
}
nxp_codec codec = {.head = NXP_HEAD(nxp_codec, NXP_CODEC, "mode"), .decode = decode};
nxp_codec other = {.head = NXP_HEAD(nxp_codec, NXP_CODEC, "other"), .decode = decode};
nxp_codec empty = {.head = NXP_HEAD(nxp_codec, NXP_CODEC, "mode")};
"""


class ModeCodec:
    """The codec in Python; `native` is its decoder in C, if it has one."""

    name = "mode"

    def __init__(self, native: NativePolicy | None = None) -> None:
        self.native = native
        self.decoded = 0

    def encode(self, raw: memoryview, type_name: str) -> bytes:
        pairs = np.frombuffer(raw, np.uint8)[: len(raw) // 2 * 2].reshape(-1, 2)
        if len(raw) % 2:
            return bytes(raw)
        low, high = pairs[:, 0], pairs[:, 1]
        mode = np.bincount(high, minlength=256).argmax()
        same = high == mode
        parts = (np.uint8([mode]), np.packbits(same), low, high[~same])
        return b"".join(part.tobytes() for part in parts)

    def decode(self, stored: memoryview, out: memoryview) -> None:
        self.decoded += 1
        n = len(out) // 2
        data = np.frombuffer(stored, np.uint8)
        n_bits = (n + 7) // 8
        same = np.unpackbits(data[1 : 1 + n_bits], count=n).astype(bool)
        low, high = data[1 + n_bits : 1 + n_bits + n], data[1 + n_bits + n :]
        if len(out) % 2 or len(low) != n or len(high) != n - same.sum():
            raise FormatError("mode: these bytes are no encoding")
        target = np.frombuffer(out, np.uint8).reshape(-1, 2)
        target[:, 0] = low
        target[same, 1] = data[0]
        target[~same, 1] = high


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("codec"), DECODE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bits]:
    """A model of which the codec has encoded what it can, and what stock says with it."""
    directory = tmp_path_factory.mktemp("encoded")
    gguf, nxf = directory / "model.gguf", directory / "model.nxf"
    dims: dict[str, Any] = {
        "n_layers": 3,
        "n_embd": 256,
        "n_ff": 512,
        "n_heads": 4,
        "n_heads_kv": 2,
    }
    write_llama(gguf, n_vocab=400, quant="BF16", **dims)
    source = open_source(gguf)
    try:
        to_nxf(source, nxf, rules=Rules("mode"), codecs=Codecs([ModeCodec()]))
    finally:
        source.close()
    chunks = open_model(nxf).chunks
    assert chunks is not None
    assert {c.codec for c in chunks.chunks_of("blk.1.ffn_up.weight").chunks} == {"mode"}
    with stock(gguf, **SMALL) as llm:
        return nxf, logits(llm, prompt(20, llm.n_vocab()))


Installed = Callable[[Any], None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    def install(*codecs: Any) -> None:
        found = SimpleNamespace(codecs=lambda: Codecs(codecs))
        monkeypatch.setattr("nexus_ext.runtime.streamed_codecs.plugins", lambda: found)

    return install


def streaming(nxf: Path) -> Any:
    return paged(nxf, "1G", pins=[(STREAMED, "nvme")], **SMALL)


@pytest.mark.parametrize("language", ["C", "Python"])
def test_what_a_plugin_s_codec_encoded_is_streamed(
    language: str, model: tuple[Path, Bits], library: ctypes.CDLL, installed: Installed
) -> None:
    nxf, bits = model
    codec = ModeCodec(native(library, "codec") if language == "C" else None)
    installed(codec)
    with streaming(nxf) as llm:
        n_vocab = llm.n_vocab()
        assert np.array_equal(logits(llm, prompt(20, n_vocab)), bits)
        llm.nexus.reset_stats()
        before = codec.decoded
        assert np.array_equal(logits(llm, prompt(20, n_vocab)), bits)
        stats = llm.nexus.stats()
        assert 0 < stats.stored_bytes < stats.raw_bytes
        assert stats.decode_s > 0
        assert (codec.decoded > before) == (language == "Python")


def test_a_codec_that_nothing_has_is_refused_by_name(
    model: tuple[Path, Bits], installed: Installed
) -> None:
    installed()
    with pytest.raises(UsageError, match="'mode'") as refused:
        streaming(model[0]).__enter__()
    assert "install" in refused.value.hint


@pytest.mark.parametrize(
    ("symbol", "wrong", "words"),
    [
        ("other", 0, "has the name 'other'"),
        ("empty", 0, "no function `decode`"),
        ("codec", 4, "other bytes than its function in Python"),
    ],
)
def test_a_codec_in_c_that_is_not_the_one_in_python_is_decoded_in_python(
    symbol: str,
    wrong: int,
    words: str,
    model: tuple[Path, Bits],
    library: ctypes.CDLL,
    installed: Installed,
    caplog: pytest.LogCaptureFixture,
) -> None:
    nxf, bits = model
    codec = ModeCodec(native(library, symbol))
    installed(codec)
    ctypes.c_int.in_dll(library, "wrong").value = wrong
    try:
        with streaming(nxf) as llm:
            before = codec.decoded
            assert np.array_equal(logits(llm, prompt(20, llm.n_vocab())), bits)
            assert codec.decoded > before
    finally:
        ctypes.c_int.in_dll(library, "wrong").value = 0
    assert words in caplog.text and "in Python decodes" in caplog.text


def test_a_codec_in_python_that_raises_fails_the_read_and_names_the_codec(
    model: tuple[Path, Bits], installed: Installed, caplog: pytest.LogCaptureFixture
) -> None:
    nxf, bits = model
    codec = ModeCodec()
    installed(codec)
    with streaming(nxf) as llm:
        tokens = prompt(20, llm.n_vocab())
        assert np.array_equal(logits(llm, tokens), bits)

        def broken(stored: memoryview, out: memoryview) -> None:
            raise LookupError("lost")

        codec.decode = broken  # type: ignore[method-assign]
        with pytest.raises((FormatError, ModelChanged), match="codec mode"):
            for _ in range(3):
                logits(llm, tokens)
        assert "lost" in caplog.text
        del codec.decode
        assert np.array_equal(logits(llm, tokens), bits)


def test_a_process_that_ends_with_a_model_open_ends(model: tuple[Path, Bits]) -> None:
    """Threads of the core may be inside Python, or about to go there."""
    code = f"""
import sys
sys.path.append({str(Path(__file__).resolve().parents[2])!r})
from types import SimpleNamespace
from nexus_ext import Llama
from nexus_ext.codecs import Codecs
from nexus_ext.runtime import streamed_codecs
from tests.integration.test_plugin_codecs import ModeCodec, SMALL
codecs = Codecs([ModeCodec()])
streamed_codecs.plugins = lambda: SimpleNamespace(codecs=lambda: codecs)
pins = [({STREAMED!r}, "nvme")]
llm = Llama({str(model[0])!r}, weights="1G", pins=pins, verbose=False, n_threads=1, **SMALL)
llm.eval([1, 2, 3])
import builtins
builtins.kept = llm  # not collected before the interpreter ends
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_models_may_be_opened_as_often_as_one_likes(
    model: tuple[Path, Bits], library: ctypes.CDLL, installed: Installed
) -> None:
    """Each time with new objects: the core has room for 32 codecs."""
    chunks = open_model(model[0]).chunks
    assert chunks is not None
    chunk = chunks.chunks_of("blk.1.ffn_up.weight").chunks[0]
    for _ in range(40):
        for codec in (ModeCodec(), ModeCodec(native(library, "codec"))):
            installed(codec)
            know_codec(open_model(model[0]), "blk.1.ffn_up.weight", chunk)
