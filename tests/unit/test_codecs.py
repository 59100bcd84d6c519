"""Codecs give back what they got, refuse what they did not write, and come in by a hook."""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ext import hookimpl
from nexus_ext.codecs import Codec, Codecs, builtin
from nexus_ext.codecs.ans import LAYOUTS, AnsCodec, decode_by, paths
from nexus_ext.errors import FormatError, UsageError
from nexus_ext.formats.ggml_types import ggml_types
from nexus_ext.plugins import Plugins
from nexus_ext.testing.synthetic.blocks import WEIGHT_TYPES, pattern

ANS = AnsCodec()
N_BYTES = 200_000


def round_trip(raw: bytes, type_name: str) -> int:
    """Return the stored bytes; every path must decode them."""
    stored = memoryview(ANS.encode(memoryview(raw), type_name))
    for path in paths().values():
        out = bytearray(len(raw))
        decode_by(path, stored, memoryview(out))
        assert out == raw
    return len(stored)


@pytest.mark.parametrize("type_name", [*WEIGHT_TYPES, "F64", "I8", "unheard of"])
def test_every_type_comes_back(type_name: str) -> None:
    raw = pattern(type_name if type_name in WEIGHT_TYPES else "Q8_0", 0, False)[:N_BYTES]
    assert round_trip(raw, type_name) <= len(raw) + 300


def test_bfloat16_of_gaussian_weights_gets_smaller_by_30_percent() -> None:
    assert round_trip(pattern("BF16", 1, False), "BF16") < 0.70 * len(pattern("BF16", 1, False))


def test_float16_and_float32_lose_what_their_exponents_waste() -> None:
    assert round_trip(pattern("F16", 1, False), "F16") < 0.87 * len(pattern("F16", 1, False))
    assert round_trip(pattern("F32", 1, False), "F32") < 0.87 * len(pattern("F32", 1, False))
    halves = np.frombuffer(pattern("BF16", 1, False), "<u2")
    widened = (halves.astype("<u4") << 16).tobytes()  # F32 made of BF16: two bytes are zero
    assert round_trip(widened, "F32") < 0.36 * len(widened)


def test_layouts_are_those_of_the_blocks_of_ggml() -> None:
    known = {kind.name: kind for kind in ggml_types().values()}
    for name, (rotate, block, planes) in LAYOUTS.items():
        assert known[name].block_nbytes == block, name
        covered = sorted(i for offset, width in planes for i in range(offset, offset + width))
        assert covered == list(range(block)), name
        assert not rotate or block % rotate == 0


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=3000), st.sampled_from(sorted(LAYOUTS)))
def test_any_bytes_come_back(raw: bytes, type_name: str) -> None:
    round_trip(raw, type_name)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 5000))
def test_what_was_not_encoded_is_refused(stored: bytes, size: int) -> None:
    for path in paths().values():
        with pytest.raises(FormatError, match="are no encoding of"):
            decode_by(path, memoryview(b"\x02" + stored), memoryview(bytearray(size)))


def test_the_hash_of_the_core_is_xxh3() -> None:
    lib, ffi = (getattr(importlib.import_module("nexus_ext._native"), n) for n in ("lib", "ffi"))
    data = np.random.default_rng(0).bytes(70_000)
    for size in [*range(520), 1023, 1024, 1025, 2048, 4097, 65_536, 70_000]:
        found = lib.nx_xxh3_64(ffi.from_buffer(data), size)
        assert found == xxhash.xxh3_64_intdigest(data[:size]), size


def test_zstd_refuses_what_is_no_frame_of_the_size() -> None:
    pytest.importorskip("zstandard")
    codec = builtin().get("zstd")
    raw = bytes(1000)
    stored = codec.encode(memoryview(raw), "F32")
    out = bytearray(1000)
    codec.decode(memoryview(stored), memoryview(out))
    assert out == raw
    for wrong, size in (
        (stored, 999),
        (stored[:-1], 1000),
        (b"no frame", 8),
        (stored + b"x", 1000),
    ):
        with pytest.raises(FormatError, match="zstd"):
            codec.decode(memoryview(wrong), memoryview(bytearray(size)))


class Halves:
    """A codec for bytes that come in pairs of the same."""

    def __init__(self, name: str = "x-halves", spoils: str = "") -> None:
        self.name = name
        self.spoils = spoils  # what it does wrong

    def encode(self, raw: memoryview, type_name: str) -> bytes | str:
        if self.spoils == "encode raises":
            raise OSError("no")
        return "text" if self.spoils == "no bytes" else bytes(raw)[::2]

    def decode(self, stored: memoryview, out: memoryview) -> None:
        if self.spoils == "decode raises":
            raise KeyError("no")
        if self.spoils == "decode exits":
            raise SystemExit(3)
        if self.spoils != "does nothing":
            out[::2] = stored
            out[1::2] = stored


class Plugin:
    def __init__(self, codec: object) -> None:
        self._codec = codec

    @hookimpl
    def nexus_codec(self) -> Codec | None:
        return self._codec  # type: ignore[return-value]


def plugins_with(monkeypatch: pytest.MonkeyPatch, *codecs: object) -> Plugins:
    found = {f"p{i}": Plugin(codec) for i, codec in enumerate(codecs)}
    monkeypatch.setattr(EntryPoint, "load", lambda self: found[self.name])
    entries = [EntryPoint(name, "nowhere", "nexus_ext") for name in found]
    return Plugins(found=entries, environ={})


PAIRS = b"aabbccdd"


def test_a_plugin_adds_a_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    codecs = plugins_with(monkeypatch, Halves(), None).codecs()
    assert "x-halves" in codecs.names()
    codec, back = codecs.get("x-halves"), bytearray(len(PAIRS))
    stored = codec.encode(memoryview(PAIRS), "")
    codec.decode(memoryview(stored), memoryview(back))
    assert (stored, back) == (b"abcd", PAIRS)
    with pytest.raises(UsageError, match="no codec 'other'"):
        codecs.get("other")


@pytest.mark.parametrize(
    ("codec", "what"),
    [
        (Halves("ans"), "has the name 'ans', which 'nexus_ext' has"),
        (Halves("not a name"), "is no Codec"),
        (object(), "is no Codec"),
    ],
)
def test_a_plugin_that_would_change_the_meaning_of_files_is_disabled(
    codec: object, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = plugins_with(monkeypatch, codec)
    assert plugins.codecs().names() == Codecs().names()
    record = next(r for r in plugins.list_plugins() if r.name == "p0")
    assert record.disabled == ("nexus_codec",)
    assert what in record.error


@pytest.mark.parametrize(
    "spoils", ["encode raises", "no bytes", "decode raises", "decode exits", "does nothing"]
)
def test_a_codec_that_is_not_lossless_is_disabled_and_bytes_are_stored_as_they_are(
    spoils: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = plugins_with(monkeypatch, Halves(spoils=spoils))
    codec = plugins.codecs().get("x-halves")
    for _ in range(2):
        assert codec.encode(memoryview(PAIRS), "Q4_0") == PAIRS
    record = next(r for r in plugins.list_plugins() if r.name == "p0")
    assert record.disabled == ("nexus_codec",)


@pytest.mark.parametrize("spoils", ["decode raises", "decode exits"])
def test_whatever_a_codec_raises_while_decoding_is_a_format_error(
    spoils: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = plugins_with(monkeypatch, Halves(spoils=spoils)).codecs().get("x-halves")
    with pytest.raises(FormatError, match="the plugin 'p0' raised"):
        codec.decode(memoryview(b"abcd"), memoryview(bytearray(8)))
