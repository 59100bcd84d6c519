"""Damaged and hostile files give a FormatError that says what is wrong, and cost no memory."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexus_ext.errors import FormatError
from nexus_ext.formats import open_gguf
from nexus_ext.formats.bounded import HEADER_LIMIT_BYTES
from nexus_ext.formats.ggml_types import ggml_types
from nexus_ext.testing.synthetic import Tensor, Value, write_gguf
from nexus_ext.testing.synthetic.container import encode_header

ALLOCATION_LIMIT_BYTES = 4 << 20
F32, Q4_0 = 0, 2
U8, U32, BOOL, STRING, ARRAY = 0, 4, 7, 8, 9


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def pair(key: bytes, kind: int, payload: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def info(name: bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return string(name) + shape + struct.pack("<IQ", kind, offset)


ARCHITECTURE = pair(b"general.architecture", STRING, string(b"test"))


def gguf(
    *parts: bytes,
    n_tensors: int = 0,
    n_pairs: int = 0,
    magic: bytes = b"GGUF",
    version: bytes = b"\3\0\0\0",
    data: int = 4096,
) -> bytes:
    body = magic + version + struct.pack("<QQ", n_tensors, n_pairs) + b"".join(parts)
    return body + bytes(data)


def with_pairs(*pairs: bytes) -> bytes:
    return gguf(*pairs, n_pairs=len(pairs))


def with_tensors(*infos: bytes, data: int = 4096) -> bytes:
    return gguf(ARCHITECTURE, *infos, n_pairs=1, n_tensors=len(infos), data=data)


@contextmanager
def little_memory() -> Iterator[None]:
    ggml_types()  # the table is loaded once and is not the file's doing
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < ALLOCATION_LIMIT_BYTES
    finally:
        tracemalloc.stop()


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", r"at byte 0: the magic takes 4 bytes but the file ends after 0"),
    "foreign magic": (gguf(magic=b"GGML"), r"at byte 0: the magic is b'GGML'"),
    "version 1": (gguf(version=b"\1\0\0\0"), r"at byte 4: GGUF version 1 "),
    "version 4": (gguf(version=b"\4\0\0\0"), r"at byte 4: GGUF version 4 "),
    "version 0": (gguf(version=b"\0\0\0\0"), r"at byte 4: GGUF version 0 "),
    "big endian": (gguf(version=b"\0\0\0\3"), r"big endian, only little endian"),
    "2^63 tensors": (gguf(n_tensors=1 << 63), r"announces 9223372036854775808 tensors.*is 163"),
    "2^64-1 pairs": (gguf(n_pairs=2**64 - 1), r"announces 18446744073709551615 key-value pairs"),
    "more tensors than there are": (gguf(n_tensors=2, data=50), r"at byte 2\d: .*name"),
    "key of 2^62 bytes": (
        with_pairs(struct.pack("<Q", 1 << 62)),
        r"at byte 24: the key of pair 0 takes 4611686018427387904 bytes, the limit is 65535",
    ),
    "empty key": (with_pairs(pair(b"", U32, b"1234")), r"key of pair 0 is b''"),
    "key with a NUL": (with_pairs(pair(b"a\0b", U32, b"1234")), r"cannot be a name"),
    "key that is not UTF-8": (with_pairs(pair(b"\xff\xfe", U32, b"1234")), r"not UTF-8"),
    "key twice": (with_pairs(ARCHITECTURE, ARCHITECTURE), r"'general.architecture' occurs twice"),
    "unknown value type": (with_pairs(pair(b"k", 13, b"")), r"'k' has the value type 13.*is 12"),
    "string of 2^64-1 bytes": (
        with_pairs(pair(b"k", STRING, struct.pack("<Q", 2**64 - 1))),
        r"value of 'k' takes 18446744073709551615 bytes",
    ),
    "array of 2^61 numbers": (
        with_pairs(pair(b"k", ARRAY, array(U32, 1 << 61))),
        r"'k' of 2305843009213693952 elements takes 9223372036854775808 bytes",
    ),
    "array of 2^61 strings": (
        with_pairs(pair(b"k", ARRAY, array(STRING, 1 << 61))),
        r"'k' of 2305843009213693952 elements takes",
    ),
    "string in an array past the end": (
        with_pairs(pair(b"k", ARRAY, array(STRING, 2, string(b"a") + struct.pack("<Q", 1 << 40)))),
        r"'k' of 2 elements takes 1099511627776 bytes",
    ),
    "array of arrays": (with_pairs(pair(b"k", ARRAY, array(ARRAY, 1))), r"array of arrays"),
    "no architecture": (with_pairs(pair(b"k", U8, b"1")), r"'general.architecture' is None"),
    "alignment 0": (
        with_pairs(ARCHITECTURE, pair(b"general.alignment", U32, bytes(4))),
        r"general.alignment is 0, not a power of two",
    ),
    "alignment 48": (
        with_pairs(ARCHITECTURE, pair(b"general.alignment", U32, b"\x30\0\0\0")),
        r"general.alignment is 48, not a power of two",
    ),
    "alignment of the wrong type": (
        with_pairs(ARCHITECTURE, pair(b"general.alignment", BOOL, b"\1")),
        r"general.alignment has the type BOOL, it must be UINT32",
    ),
    "alignment past the end": (
        gguf(
            pair(b"general.alignment", U32, struct.pack("<I", 1 << 31)),
            info(b"t", (8,), F32, 0),
            n_pairs=1,
            n_tensors=1,
        ),
        r"padding to 2147483648 bytes takes",
    ),
    "empty tensor name": (with_tensors(info(b"", (8,), F32, 0)), r"name of a tensor is b''"),
    "tensor name of 64 bytes": (with_tensors(info(b"n" * 64, (8,), F32, 0)), r"64 bytes.*is 63"),
    "tensor twice": (
        with_tensors(info(b"t", (8,), F32, 0), info(b"t", (8,), F32, 32)),
        r"tensor 't' occurs twice",
    ),
    "five dimensions": (
        with_tensors(info(b"t", (1, 1, 1, 1, 1), F32, 0)),
        r"tensor 't' has 5 dimensions, the limit is 4",
    ),
    "extent 0": (with_tensors(info(b"t", (8, 0), F32, 0)), r"'t' has the shape \(8, 0\)"),
    "extents that overflow 64 bits": (
        with_tensors(info(b"t", (1 << 32, 1 << 32), F32, 0)),
        r"between 1 and 9223372036854775807",
    ),
    "extents whose product wraps to a small number": (
        with_tensors(info(b"t", (1 << 33, 1 << 31, 1, 1), F32, 0)),
        r"between 1 and 9223372036854775807",
    ),
    "unknown type": (with_tensors(info(b"t", (8,), 99, 0)), r"'t' has the unknown ggml type 99"),
    "removed type": (with_tensors(info(b"t", (8,), 4, 0)), r"'t' has the unknown ggml type 4"),
    "row that fills no block": (
        with_tensors(info(b"t", (48, 2), Q4_0, 0)),
        r"'t' has rows of 48 elements, not a multiple of the 32 in a block of Q4_0",
    ),
    "misaligned offset": (
        with_tensors(info(b"t", (8,), F32, 4)),
        r"'t' has the data offset 4, not a multiple of the alignment 32",
    ),
    "overlap": (
        with_tensors(info(b"a", (16,), F32, 0), info(b"b", (8,), F32, 32)),
        r"'b' has the data offset 32 and overlaps 'a', which ends at 64",
    ),
    "hole": (
        with_tensors(info(b"a", (8,), F32, 0), info(b"b", (8,), F32, 64)),
        r"'b' has the data offset 64, which leaves a hole of 32 bytes",
    ),
    "offset 2^64-32": (with_tensors(info(b"a", (8,), F32, 2**64 - 32)), r"leaves a hole of"),
    "tensor larger than the file": (
        with_tensors(info(b"a", (8,), F32, 0), info(b"b", (1 << 60,), F32, 32)),
        r"bytes are missing, from tensor 'b' at byte",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_with_what_is_wrong(name: str, tmp_path: Path) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with little_memory(), pytest.raises(FormatError, match=message) as caught:
        open_gguf(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    "make",
    [
        lambda size: with_pairs(pair(b"k", STRING, struct.pack("<Q", size))),
        lambda size: with_pairs(pair(b"k", ARRAY, array(U8, size))),
        lambda size: with_pairs(pair(b"k", ARRAY, array(STRING, 1, struct.pack("<Q", size)))),
        lambda size: gguf(
            pair(b"general.alignment", U32, struct.pack("<I", 1 << 31)),
            info(b"t", (8,), F32, 0),
            n_pairs=1,
            n_tensors=1,
        ),
    ],
    ids=["string", "array", "string in an array", "padding"],
)
def test_a_header_above_the_limit_is_refused_though_the_file_is_large_enough(
    make: Callable[[int], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "large.gguf"
    path.write_bytes(make(HEADER_LIMIT_BYTES + 1))
    with path.open("r+b") as file:
        file.truncate(16 << 30)  # a hole: takes no disk
    with little_memory(), pytest.raises(FormatError, match=f"limit of {HEADER_LIMIT_BYTES} bytes"):
        open_gguf(path)


PAIRS: dict[str, Value] = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.embedding_length": 32,
    "llama.attention.head_count": [4],
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.tokens": ["a", "b", "cd"],
    "general.quantized": True,
}
TENSORS = [
    Tensor("token_embd.weight", (32, 3), "Q4_0"),
    Tensor("blk.0.attn_norm.weight", (32,)),
    Tensor("blk.0.ffn_gate_exps.weight", (32, 4, 2), "F16"),
]
HEADER = encode_header(PAIRS, TENSORS)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    (path,) = write_gguf(tmp_path_factory.mktemp("good") / "m.gguf", PAIRS, TENSORS)
    return path.read_bytes()


def test_a_file_cut_off_anywhere_is_refused(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(FormatError):
            open_gguf(path)
    path.write_bytes(good)
    assert len(open_gguf(path).tensors) == 3


def test_a_cut_off_download_is_told_what_it_lacks(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(good[:-100])
    message = r"100 bytes are missing, from tensor 'blk\.0\.ffn_gate_exps\.weight' at byte"
    with pytest.raises(FormatError, match=message) as caught:
        open_gguf(path)
    assert "download" in caught.value.hint


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    flips=st.lists(
        st.tuples(st.integers(0, len(HEADER) - 1), st.integers(1, 255)), min_size=1, max_size=4
    ),
    extra=st.sampled_from([0, 100, 1 << 20]),
)
def test_flipped_bytes_never_raise_anything_but_format_error(
    flips: list[tuple[int, int]], extra: int, good: bytes, tmp_path: Path
) -> None:
    content = bytearray(good)
    for place, mask in flips:
        content[place] ^= mask
    path = tmp_path / "flipped.gguf"
    path.write_bytes(content)
    if extra:
        with path.open("r+b") as file:
            file.truncate(len(content) + extra)
    with little_memory():
        try:
            catalog = open_gguf(path)
        except FormatError as error:
            assert str(path.parent) in str(error)
        else:
            assert len(catalog.tensors) <= len(TENSORS)
            end = len(content) + extra
            assert all(t.offset + t.nbytes <= end for t in catalog.tensors)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(tail=st.binary(max_size=300), n_tensors=st.integers(0, 5), n_pairs=st.integers(0, 5))
def test_random_bytes_after_the_magic_never_raise_anything_but_format_error(
    tail: bytes, n_tensors: int, n_pairs: int, tmp_path: Path
) -> None:
    path = tmp_path / "random.gguf"
    path.write_bytes(gguf(tail, n_tensors=n_tensors, n_pairs=n_pairs, data=0))
    with little_memory(), pytest.raises(FormatError):
        open_gguf(path)
