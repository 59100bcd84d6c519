"""The binary form of a routing trace: what is written is read, and nothing else is."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from nexus_ext.errors import FormatError
from nexus_ext.routing import RoutingTrace, TracedLayer

TRACE = RoutingTrace(
    fingerprint="f" * 32,
    architecture="qwen3moe",
    passes=(2, 1),
    layers=(
        TracedLayer(0, 4, 2, 1000, 4096, bytes((0, 1, 2, 3, 3, 0))),
        TracedLayer(2, 300, 1, 500, 4096, struct.pack("<3H", 299, 0, 256)),
    ),
    disk_bytes_s=1e9,
    compute_s=0.01,
)
DATA = TRACE.to_bytes()


def signed(body: bytes) -> bytes:
    """`body` with a checksum that is right, so that what lies behind it is looked at."""
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


def with_header(**changes: object) -> bytes:
    (size,) = struct.unpack_from("<I", DATA, 12)
    header = {**json.loads(DATA[16 : 16 + size]), **changes}
    text = json.dumps(header).encode()
    return signed(DATA[:12] + struct.pack("<I", len(text)) + text + DATA[16 + size : -8])


def with_layer(**changes: object) -> bytes:
    (size,) = struct.unpack_from("<I", DATA, 12)
    layers = json.loads(DATA[16 : 16 + size])["layers"]
    return with_header(layers=[{**layers[0], **changes}, layers[1]])


def test_what_is_written_is_read() -> None:
    assert RoutingTrace.from_bytes(DATA) == TRACE
    assert RoutingTrace.from_bytes(replace(TRACE, passes=(), layers=()).to_bytes()).n_tokens == 0


def test_the_bytes_of_version_1_do_not_change() -> None:
    assert DATA[:12] == b"NXTRACE\0\x01\0\0\0"
    assert xxhash.xxh3_64_intdigest(DATA[:-8]) == struct.unpack("<Q", DATA[-8:])[0]
    assert DATA[:-8].endswith(
        struct.pack("<2I", 2, 1) + bytes((0, 1, 2, 3, 3, 0)) + struct.pack("<3H", 299, 0, 256)
    )


def test_sizes_are_those_of_the_layers() -> None:
    assert TRACE.n_tokens == 3
    assert TRACE.token_bytes == 2 * 1000 + 500
    assert TRACE.expert_bytes == 4 * 1000 + 300 * 500
    assert TRACE.layers[1].numbers().tolist() == [[299], [0], [256]]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        DATA[:20],
        DATA[:-1],
        DATA + b"\0",
        b"GGUF" + DATA[4:],
        signed(DATA[:8] + b"\x02" + DATA[9:-8]),
        signed(DATA[:12] + b"\xff\xff\xff\xff" + DATA[16:-8]),
        signed(DATA[:-8] + b"\0"),
        signed(DATA[:-9]),
        signed(DATA[:-10] + b"\xff\xff"),
        with_header(n_tokens=4),
        with_header(n_passes=1),
        with_header(n_passes=True),
        with_header(n_tokens=1 << 60),
        with_header(layers={}),
        with_header(layers=[1]),
        with_header(more=1),
        with_header(fingerprint=1),
        with_header(disk_bytes_s=-1),
        with_header(compute_s="fast"),
        with_header(compute_s=float("nan")),
        with_header(disk_bytes_s=1 << 2000),
        with_layer(n_experts=3),
        with_layer(n_experts=0),
        with_layer(n_used=5),
        with_layer(n_used=1),
        with_layer(record_bytes=0),
        with_layer(layer=2),
        with_layer(layer=3),
        with_layer(slot_bytes=1.5),
    ],
)
def test_anything_else_is_refused_with_a_hint(data: bytes) -> None:
    with pytest.raises(FormatError, match=r"^here: ") as caught:
        RoutingTrace.from_bytes(data, source="here")
    assert "nexus trace" in caught.value.hint


@given(st.data())
def test_damage_is_a_format_error_and_nothing_else(data: st.DataObject) -> None:
    damaged = bytearray(DATA)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(DATA) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(damaged[: data.draw(st.integers(0, len(DATA)))])
    for mutated in (bytes(damaged), cut, signed(bytes(damaged[:-8])), signed(cut)):
        if mutated != DATA:
            try:
                # Where the checksum was made again, a changed number may be a good one.
                found = RoutingTrace.from_bytes(mutated)
            except FormatError:
                continue
            assert RoutingTrace.from_bytes(found.to_bytes()) == found


@given(st.binary(max_size=200))
def test_rubbish_is_a_format_error(rubbish: bytes) -> None:
    with pytest.raises(FormatError):
        RoutingTrace.from_bytes(rubbish)
    with pytest.raises(FormatError):
        RoutingTrace.from_bytes(signed(DATA[:12] + struct.pack("<I", len(rubbish)) + rubbish))
