"""The header of one GGUF file: key-value pairs and tensor infos, checked against the file.

Knows the encoding (versions 2 and 3, little endian) and what llama.cpp demands of it; knows
neither split models nor what keys and tensors mean. Every number is checked against the size of
the file before anything is sized by it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from nexus_ext.errors import FormatError
from nexus_ext.formats.bounded import BoundedReader
from nexus_ext.formats.ggml_types import GgmlType, ggml_types

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_KEY_NBYTES = 2**16 - 1  # by the specification
MAX_NAME_NBYTES = 63  # ggml keeps names in 64 bytes with the closing NUL
ALIGNMENT_KEY = "general.alignment"
# Arrays of numbers up to this length (per-layer values) are kept; longer ones (scores of
# tokens) and all arrays of strings are kept as their size only.
KEPT_ARRAY_ELEMENTS = 1024

_MAX_ELEMENTS = 2**63 - 1
# Bounds of the two counts in the header: what the file has room for, by the least that a pair
# (key of one byte, type, one byte) and a tensor info (name of one byte, no dimensions) can take,
# and far more than any model has.
_MIN_PAIR_NBYTES, _MAX_PAIRS = 14, 1 << 16
_MIN_INFO_NBYTES, _MAX_TENSORS = 25, 1 << 18


class ValueType(IntEnum):
    """The types of values in key-value pairs."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_CODES = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}


@dataclass(frozen=True, slots=True)
class ArraySize:
    """Stands for an array that was stepped over."""

    element: str
    length: int


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor info, its place checked to be inside the file."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int  # bytes from the start of the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What one file says before its weights."""

    path: str
    file_nbytes: int
    alignment: int
    metadata: dict[str, object]
    pairs: dict[str, bytes]  # key -> the pair as it is encoded, key included
    tensors: tuple[RawTensor, ...]
    encoded: bytes  # everything before the weights: [0, data_offset)

    @property
    def data_offset(self) -> int:
        return len(self.encoded)


def padded(nbytes: int, alignment: int) -> int:
    """Round up to a multiple of `alignment`, a power of two."""
    return (nbytes + alignment - 1) & ~(alignment - 1)


def read_header(path: str) -> Header:
    """Read and check the header of the GGUF file at `path`.

    Raises FormatError for anything that llama.cpp would refuse, ReadFailed if the file cannot
    be read.
    """
    with BoundedReader(path) as reader:
        return _read(reader)


def parse_header(name: str, encoded: bytes, file_nbytes: int) -> Header:
    """Read and check a header that is kept apart from its file of `file_nbytes`.

    `name` stands for the file in messages. Raises FormatError, also where `encoded` is too short.
    """
    with BoundedReader(name, (encoded, file_nbytes)) as reader:
        return _read(reader)


def _read(reader: BoundedReader) -> Header:
    n_tensors, n_pairs = _read_preamble(reader)
    metadata, spans = _read_pairs(reader, n_pairs)
    alignment = _alignment(reader, metadata)
    infos = [_read_info(reader) for _ in range(n_tensors)]
    end = reader.offset
    if n_tensors:
        reader.skip(padded(end, alignment) - end, f"the padding to {alignment} bytes")
    encoded = reader.header(reader.offset)
    tensors = _place(reader, infos, alignment)
    return Header(
        path=reader.path,
        file_nbytes=reader.file_nbytes,
        alignment=alignment,
        metadata=metadata,
        pairs={key: encoded[start:stop] for key, (start, stop) in spans.items()},
        tensors=tensors,
        encoded=encoded,
    )


def _read_preamble(reader: BoundedReader) -> tuple[int, int]:
    (magic,) = reader.unpack(struct.Struct("4s"), "the magic")
    if magic != MAGIC:
        raise reader.error(f"the magic is {magic!r}, not {MAGIC!r}", at=0, hint="Not a GGUF file.")
    version = reader.u32("the version")
    if version & 0xFFFF == 0 and version:
        raise reader.error(
            f"the version reads as 0x{version:08x}: the file is big endian, only little endian "
            "is supported",
            at=4,
            hint="Convert it with gguf-convert-endian of the gguf package.",
        )
    if version not in VERSIONS:
        raise reader.error(f"GGUF version {version} is none of {VERSIONS}", at=4)
    n_tensors = reader.u64("the number of tensors")
    n_pairs = reader.u64("the number of key-value pairs")
    for at, count, least, most, what in (
        (8, n_tensors, _MIN_INFO_NBYTES, _MAX_TENSORS, "tensors"),
        (16, n_pairs, _MIN_PAIR_NBYTES, _MAX_PAIRS, "key-value pairs"),
    ):
        limit = min(most, reader.remaining_bytes // least)
        if count > limit:
            raise reader.error(
                f"the header announces {count} {what}, the limit for a file of this size is "
                f"{limit}",
                at=at,
                hint="The file is damaged or was cut off: download it again.",
            )
    return n_tensors, n_pairs


def _read_pairs(
    reader: BoundedReader, n_pairs: int
) -> tuple[dict[str, object], dict[str, tuple[int, int]]]:
    metadata: dict[str, object] = {}
    spans: dict[str, tuple[int, int]] = {}
    for index in range(n_pairs):
        start = reader.offset
        key = _name(reader, f"the key of pair {index}", MAX_KEY_NBYTES)
        if key in metadata:
            raise reader.error(f"the key {key!r} occurs twice", at=start)
        metadata[key] = _read_value(reader, key)
        spans[key] = (start, reader.offset)
    return metadata, spans


def _read_value(reader: BoundedReader, key: str) -> object:
    at = reader.offset
    value_type = _value_type(reader, key)
    if key == ALIGNMENT_KEY and value_type is not ValueType.UINT32:
        raise reader.error(f"{key} has the type {value_type.name}, it must be UINT32", at=at)
    what = f"the value of {key!r}"
    if value_type is ValueType.STRING:
        return reader.string(what).decode("utf-8", errors="replace")
    if value_type is not ValueType.ARRAY:
        return reader.unpack(struct.Struct("<" + _CODES[value_type]), what)[0]
    at = reader.offset
    element = _value_type(reader, key)
    if element is ValueType.ARRAY:
        raise reader.error(f"{what} is an array of arrays, which llama.cpp does not read", at=at)
    length = reader.u64(f"the length of {key!r}")
    what = f"the array {key!r} of {length} elements"
    if element is ValueType.STRING:
        reader.skip_strings(length, what)
    elif length <= KEPT_ARRAY_ELEMENTS:
        return reader.unpack(struct.Struct(f"<{length}{_CODES[element]}"), what)
    else:
        reader.skip(length * struct.calcsize("<" + _CODES[element]), what)
    return ArraySize(element.name.lower(), length)


def _value_type(reader: BoundedReader, key: str) -> ValueType:
    at = reader.offset
    number = reader.u32(f"the type of {key!r}")
    try:
        return ValueType(number)
    except ValueError:
        raise reader.error(
            f"{key!r} has the value type {number}, the highest known is {max(ValueType):d}", at=at
        ) from None


def _alignment(reader: BoundedReader, metadata: dict[str, object]) -> int:
    value = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or value <= 0 or value & (value - 1):
        raise reader.error(f"{ALIGNMENT_KEY} is {value!r}, not a power of two")
    return value


def _read_info(reader: BoundedReader) -> RawTensor:
    """Read one tensor info; `offset` of the result still counts from the start of the data."""
    name = _name(reader, "the name of a tensor", MAX_NAME_NBYTES)
    what = f"the info of tensor {name!r}"
    at = reader.offset
    n_dims = reader.u32(what)
    if n_dims > MAX_DIMS:
        raise reader.error(
            f"tensor {name!r} has {n_dims} dimensions, the limit is {MAX_DIMS}", at=at
        )
    at = reader.offset
    # A tensor without dimensions is one number: ggml gives it the extents 1, 1, 1, 1.
    shape = tuple(reader.u64(what) for _ in range(n_dims)) or (1,)
    elements = 1
    for extent in shape:
        elements *= extent
        if not 0 < elements <= _MAX_ELEMENTS:
            raise reader.error(
                f"tensor {name!r} has the shape {shape}; the number of elements must be between "
                f"1 and {_MAX_ELEMENTS}",
                at=at,
            )
    at = reader.offset
    number = reader.u32(what)
    kind = ggml_types().get(number)
    if kind is None:
        raise reader.error(
            f"tensor {name!r} has the unknown ggml type {number}",
            at=at,
            hint="A newer gguf package may know it: pip install -U gguf",
        )
    if shape[0] % kind.block_elements:
        raise reader.error(
            f"tensor {name!r} has rows of {shape[0]} elements, not a multiple of the "
            f"{kind.block_elements} in a block of {kind.name}",
            at=at,
        )
    offset = reader.u64(what)
    return RawTensor(name, shape, kind, offset, elements // kind.block_elements * kind.block_nbytes)


def _place(reader: BoundedReader, infos: list[RawTensor], alignment: int) -> tuple[RawTensor, ...]:
    """Check that tensors follow each other without holes, as llama.cpp demands, and fit."""
    data_offset = reader.offset
    expected = 0
    placed: list[RawTensor] = []
    names: set[str] = set()
    for info in infos:
        what = f"tensor {info.name!r} has the data offset {info.offset}"
        if info.name in names:
            raise reader.error(f"the tensor {info.name!r} occurs twice")
        names.add(info.name)
        if info.offset % alignment:
            raise reader.error(f"{what}, not a multiple of the alignment {alignment}")
        if info.offset < expected:
            before = placed[-1].name
            raise reader.error(f"{what} and overlaps {before!r}, which ends at {expected}")
        if info.offset > expected:
            raise reader.error(
                f"{what}, which leaves a hole of {info.offset - expected} bytes that llama.cpp "
                f"does not accept; expected {expected}"
            )
        expected += padded(info.nbytes, alignment)
        placed.append(
            RawTensor(info.name, info.shape, info.type, data_offset + info.offset, info.nbytes)
        )
    cut = next((t for t in placed if t.offset + t.nbytes > reader.file_nbytes), None)
    if cut is not None:
        end = placed[-1].offset + placed[-1].nbytes
        raise FormatError(
            f"{reader.path}: the tensors end at byte {end} but the file has {reader.file_nbytes} "
            f"bytes: {end - reader.file_nbytes} bytes are missing, from tensor {cut.name!r} "
            f"at byte {cut.offset} on",
            hint="The download was cut off: resume it or download the file again.",
        )
    return tuple(placed)


def _name(reader: BoundedReader, what: str, limit_nbytes: int) -> str:
    at = reader.offset
    encoded = reader.string(what, limit_nbytes=limit_nbytes)
    if not encoded or b"\0" in encoded:
        raise reader.error(f"{what} is {encoded[:64]!r}, which cannot be a name", at=at)
    try:
        return encoded.decode("utf-8")
    except UnicodeDecodeError:
        raise reader.error(f"{what} is {encoded[:64]!r}, not UTF-8", at=at) from None
