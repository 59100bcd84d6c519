"""Read a SentencePiece model (tokenizer.model): pieces, scores, and how texts are prepared.

The file is a protocol buffer. The few fields that matter are read here, with every length checked
against the file, instead of through a library that parses it unchecked. Field numbers are those of
sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from nexus_ext.errors import FormatError

_MAX_PIECES = 1 << 21
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_BPE = 2
_MODEL_NAMES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_TYPES = range(1, 7)  # normal, unknown, control, user defined, unused, byte: as ggml numbers them


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """The vocabulary of a model of the kind "bpe", the only one that llama.cpp computes so."""

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    add_space_prefix: bool
    normalizer: str  # "identity" for Llama
    bos_id: int  # -1 for none
    eos_id: int
    unk_id: int
    pad_id: int


def parse_sentencepiece(path: str, data: bytes) -> SentencePieceModel:
    """Parse the bytes of a tokenizer.model. FormatError for what is none, or of another kind."""
    pieces: list[bytes] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, int] = {}
    normalizer_name, prefix = "", True
    for number, value in _fields(path, memoryview(data)):
        if number == 1:
            piece, score, kind = _piece(path, value, len(pieces))
            pieces.append(piece)
            scores.append(score)
            types.append(kind)
            if len(pieces) > _MAX_PIECES:
                raise FormatError(f"{path}: has more than {_MAX_PIECES} pieces")
        elif number == 2:
            trainer = {n: v for n, v in _fields(path, _message(path, value)) if isinstance(v, int)}
        elif number == 3:
            for inner, item in _fields(path, _message(path, value)):
                if inner == 1 and isinstance(item, memoryview):
                    normalizer_name = bytes(item).decode("utf-8", "replace")
                if inner == 3 and isinstance(item, int):
                    prefix = bool(item)
    if not pieces:
        raise FormatError(f"{path}: has no pieces: it is no SentencePiece model")
    kind = trainer.get(3, 1)
    if kind != _MODEL_BPE:
        raise FormatError(
            f"{path}: is a SentencePiece model of the kind {_MODEL_NAMES.get(kind, kind)!r}; "
            "llama.cpp tokenizes these architectures by 'bpe' only"
        )
    return SentencePieceModel(
        pieces=tuple(pieces),
        scores=tuple(scores),
        types=tuple(types),
        add_space_prefix=prefix,
        normalizer=normalizer_name,
        bos_id=_signed(trainer.get(41, 1)),
        eos_id=_signed(trainer.get(42, 2)),
        unk_id=_signed(trainer.get(40, 0)),
        pad_id=_signed(trainer.get(43, -1)),
    )


def _piece(path: str, value: int | memoryview, index: int) -> tuple[bytes, float, int]:
    text, score, kind = b"", 0.0, 1
    for number, item in _fields(path, _message(path, value)):
        if number == 1 and isinstance(item, memoryview):
            text = bytes(item)
        elif number == 2 and isinstance(item, memoryview) and len(item) == 4:
            (score,) = struct.unpack("<f", item)
        elif number == 3 and isinstance(item, int):
            kind = item
    if kind not in _TYPES:
        raise FormatError(f"{path}: piece {index} has the type {kind}, not 1 to 6")
    if not text:
        raise FormatError(f"{path}: piece {index} is empty")
    if score != score:
        raise FormatError(f"{path}: piece {index} has no number as its score")
    return text, score, kind


def _message(path: str, value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise FormatError(f"{path}: is no SentencePiece model: a number where a message should be")
    return value


def _fields(path: str, data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, value): numbers as int, everything else as its bytes."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(path, data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(path, data, at)
            yield number, value
            continue
        if wire == _BYTES:
            nbytes, at = _varint(path, data, at)
        elif wire in (_FIXED32, _FIXED64):
            nbytes = 4 if wire == _FIXED32 else 8
        else:
            raise FormatError(f"{path}: is no SentencePiece model: wire type {wire}")
        if nbytes > end - at:
            raise FormatError(f"{path}: is no SentencePiece model, or was cut off")
        yield number, data[at : at + nbytes]
        at += nbytes


def _varint(path: str, data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & ((1 << 64) - 1), at
        shift += 7
    raise FormatError(f"{path}: is no SentencePiece model, or was cut off")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
