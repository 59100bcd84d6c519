"""The authors' kit: checks of codecs, and traces that are recorded or drawn."""

from __future__ import annotations

import zlib

import pytest

from nexus_ext.codecs.ans import AnsCodec
from nexus_ext.errors import FormatError, UsageError
from nexus_ext.routing import RoutingTrace, repeats
from nexus_ext.testing import RECORDED, check_codec, recorded_trace, synthetic_trace


class Zlib:
    """A codec with one mistake, or with none."""

    name = "x-zlib"

    def __init__(self, mistake: str = "") -> None:
        self.mistake = mistake

    def encode(self, raw: memoryview, type_name: str) -> bytes:
        if self.mistake == "loses a byte" and len(raw) == 4097:
            raw = raw[:-1]
        stored = zlib.compress(raw, 1)
        return bytearray(stored) if self.mistake == "not bytes" else stored  # type: ignore[return-value]

    def decode(self, stored: memoryview, out: memoryview) -> None:
        decoder = zlib.decompressobj()
        try:
            data = decoder.decompress(stored)
        except zlib.error as error:
            raise self.error(error) from None
        if self.mistake == "fills what it can":
            out[: len(data)] = data[: len(out)]
            return
        if len(data) != len(out) or not decoder.eof:
            raise FormatError("wrong size")
        out[:] = data

    def error(self, error: Exception) -> Exception:
        return ValueError("bad") if self.mistake == "another error" else FormatError(str(error))


def test_codecs_that_keep_their_promises_pass() -> None:
    assert check_codec(AnsCodec()).ratios["BF16"] < 0.75
    assert set(check_codec(Zlib()).ratios) >= {"F32", "Q4_K", "TQ2_0"}


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        ("loses a byte", "4097 bytes of F32"),
        ("not bytes", "encode returned bytearray"),
        ("fills what it can", "decode to 4095 without an error"),
        ("another error", "ValueError instead of FormatError"),
    ],
)
def test_codecs_that_do_not_are_told_why(mistake: str, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        check_codec(Zlib(mistake))


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_traces_are_those_of_a_trained_model(name: str) -> None:
    trace = recorded_trace(name)
    assert trace.n_tokens >= 500 and len(trace.layers) == 6
    assert {(layer.n_experts, layer.n_used) for layer in trace.layers} == {(32, 4)}
    assert 4 / 32 < repeats(trace) < 0.5  # more than chance
    assert RoutingTrace.from_bytes(trace.to_bytes()) == trace


def test_a_trace_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match="no recorded trace 'x'"):
        recorded_trace("x")


def test_drawn_traces_have_the_statistics_that_are_asked_for() -> None:
    assert synthetic_trace(50, 8, 2, seed=1) == synthetic_trace(50, 8, 2, seed=1)
    assert synthetic_trace(50, 8, 2, seed=1) != synthetic_trace(50, 8, 2, seed=2)
    assert abs(repeats(synthetic_trace(400, 64, 4, reuse=0.5)) - 0.53) < 0.05
    large = synthetic_trace(10, 300, 2, n_layers=1)
    assert RoutingTrace.from_bytes(large.to_bytes()) == large
    with pytest.raises(UsageError, match="9 of 8"):
        synthetic_trace(1, 8, 9)
