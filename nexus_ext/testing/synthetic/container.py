"""Write GGUF files, whole or split, with random or no weights.

A second implementation of the encoding, apart from the product's: what one writes the other has
to read. Weights are written by repeating a small pattern with vectored writes, so a file costs
neither memory nor time beyond that of the disk.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from nexus_ext.testing.synthetic.blocks import WEIGHT_STD, block_elements, nbytes_of, pattern

_IOV_LIMIT = 512
_LARGE_TENSOR_NBYTES = 16 << 20
_STRING, _ARRAY = 8, 9
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class Typed:
    """A value with a GGUF type number of its own; plain values get the usual type."""

    type: int
    value: int | float


Value = bool | int | float | str | Typed | Sequence[str] | Sequence[int] | Sequence[float]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to write; `fill` is "random", or for F32 "ones", "minus ones", "hundredths" or
    "zeros"."""

    name: str
    shape: tuple[int, ...]  # ggml order
    type_name: str = "F32"
    fill: str = "random"
    std: float = WEIGHT_STD  # of random values; another one for F32 only

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.type_name, self.shape)


def write_gguf(
    path: str | os.PathLike[str],
    pairs: dict[str, Value],
    tensors: Sequence[Tensor],
    *,
    alignment: int = 32,
    split: int | None = None,
    seed: int = 0,
    version: int = 3,
    sparse: bool = False,
) -> list[Path]:
    """Write a model and return its files in order.

    With `split`, "x.gguf" becomes "x-00001-of-0000N.gguf" and so on. With `sparse`, weights are
    holes in the file (they read as zeros and cost no disk).
    """
    path = Path(path)
    common: dict[str, Value] = {} if alignment == 32 else {"general.alignment": alignment}
    if split is None:
        _write_one(path, {**pairs, **common}, tensors, alignment, seed, version, sparse)
        return [path]
    paths = []
    for part in range(split):
        mine = tensors[len(tensors) * part // split : len(tensors) * (part + 1) // split]
        numbers: dict[str, Value] = {
            "split.no": Typed(2, part),
            "split.count": Typed(2, split),
            "split.tensors.count": Typed(5, len(tensors)),
        }
        part_path = path.with_name(f"{path.stem}-{part + 1:05d}-of-{split:05d}.gguf")
        own = {**(pairs if part == 0 else {}), **common, **numbers}
        _write_one(part_path, own, mine, alignment, seed, version, sparse)
        paths.append(part_path)
    return paths


def encode_header(
    pairs: dict[str, Value], tensors: Sequence[Tensor], *, alignment: int = 32, version: int = 3
) -> bytes:
    """Return everything that comes before the weights."""
    out = bytearray(b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)))
    for key, value in pairs.items():
        out += _string(key) + _value(value)
    offset = 0
    for tensor in tensors:
        dims = tensor.shape
        kind = int(GGMLQuantizationType[tensor.type_name])
        out += _string(tensor.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        out += struct.pack("<IQ", kind, offset)
        offset += -(-tensor.nbytes // alignment) * alignment
    out += bytes(-len(out) % alignment)
    return bytes(out)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, Typed):
        return struct.pack("<I" + _CODES[value.type], value.type, value.value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, (bool, int, float)):
        kind = _kind(value)
        return struct.pack("<I" + _CODES[kind], kind, value)
    if value and isinstance(value[0], str):
        head = struct.pack("<IIQ", _ARRAY, _STRING, len(value))
        return head + b"".join(_string(str(item)) for item in value)
    kind = _kind(value[0]) if value else 4
    kind = 5 if kind == 4 else kind  # arrays of integers are signed, as converters write them
    head = struct.pack("<IIQ", _ARRAY, kind, len(value))
    return head + struct.pack(f"<{len(value)}{_CODES[kind]}", *value)


def _kind(value: object) -> int:
    return 7 if isinstance(value, bool) else 4 if isinstance(value, int) else 6


def _write_one(
    path: Path,
    pairs: dict[str, Value],
    tensors: Sequence[Tensor],
    alignment: int,
    seed: int,
    version: int,
    sparse: bool,
) -> None:
    header = encode_header(pairs, tensors, alignment=alignment, version=version)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        _write_all(descriptor, [memoryview(header)])
        if sparse:
            end = len(header)
            for tensor in tensors:
                end += -(-tensor.nbytes // alignment) * alignment
            os.ftruncate(descriptor, end)
            return
        large = any(tensor.nbytes > _LARGE_TENSOR_NBYTES for tensor in tensors)
        for tensor in tensors:
            _write_weights(descriptor, tensor, seed, large)
            _write_all(descriptor, [memoryview(bytes(-tensor.nbytes % alignment))])
    finally:
        os.close(descriptor)


def _write_weights(descriptor: int, tensor: Tensor, seed: int, large: bool) -> None:
    """Repeat the pattern of the type, each tensor from a block of its own on."""
    start = 0
    if tensor.fill == "random" and tensor.std != WEIGHT_STD:
        if tensor.type_name != "F32":
            raise ValueError(f"{tensor.name}: only F32 can have another spread")
        rng = np.random.default_rng((seed, zlib.crc32(tensor.name.encode())))
        values = rng.normal(0.0, tensor.std, tensor.nbytes // 4).astype(np.float32)
        source = memoryview(values.tobytes())
    elif tensor.fill == "random":
        source = memoryview(pattern(tensor.type_name, seed, large))
        block_nbytes = nbytes_of(tensor.type_name, (block_elements(tensor.type_name),))
        n_blocks = len(source) // block_nbytes
        start = zlib.crc32(tensor.name.encode()) % n_blocks * block_nbytes
    else:
        if tensor.type_name != "F32":
            raise ValueError(f"{tensor.name}: only F32 can be filled with {tensor.fill}")
        number = {"ones": 1.0, "minus ones": -1.0, "hundredths": 0.01, "zeros": 0.0}[tensor.fill]
        source = memoryview(struct.pack("<f", number) * min(tensor.nbytes // 4, 1 << 18))
    left = tensor.nbytes
    views: list[memoryview] = []
    while left:
        view = source[start : start + left]
        views.append(view)
        left -= len(view)
        start = 0
        if len(views) == _IOV_LIMIT or not left:
            _write_all(descriptor, views)
            views = []


def _write_all(descriptor: int, views: list[memoryview]) -> None:
    views = [view for view in views if len(view)]
    while views:
        written = os.writev(descriptor, views)
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if written:
            views[0] = views[0][written:]
