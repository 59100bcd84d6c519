"""Our own entropy coder: weights taken apart into planes, each range coded where that pays.

The loops are in native/codec_ans*.c, the format is in formats/SPEC.md. Here is only which bytes of
a block of each ggml type belong together.
"""

from __future__ import annotations

from typing import Any, Final

import nexus_ext._native as _native
from nexus_ext.errors import FormatError, NexusError, OutOfMemory

ffi = _native.ffi
lib = _native.lib

# ggml type -> (bytes of the words that are rotated, bytes of a block, planes as (offset, width)).
# Floats: exponents apart from mantissas; rotating puts all bits of an exponent into one byte.
# Quantized blocks: scales byte by byte, codes as they are packed.
_Layout = tuple[int, int, tuple[tuple[int, int], ...]]
LAYOUTS: Final[dict[str, _Layout]] = {
    "BF16": (2, 2, ((1, 1), (0, 1))),
    "F16": (2, 2, ((1, 1), (0, 1))),
    "F32": (4, 4, ((3, 1), (2, 1), (1, 1), (0, 1))),
    "F64": (0, 8, tuple((7 - i, 1) for i in range(8))),
    "I32": (0, 4, ((3, 1), (2, 1), (1, 1), (0, 1))),
    "Q4_0": (0, 18, ((0, 1), (1, 1), (2, 16))),
    "Q4_1": (0, 20, ((0, 1), (1, 1), (2, 1), (3, 1), (4, 16))),
    "Q5_0": (0, 22, ((0, 1), (1, 1), (2, 4), (6, 16))),
    "Q5_1": (0, 24, ((0, 1), (1, 1), (2, 1), (3, 1), (4, 4), (8, 16))),
    "Q8_0": (0, 34, ((0, 1), (1, 1), (2, 32))),
    "Q2_K": (0, 84, ((0, 16), (16, 64), (80, 1), (81, 1), (82, 1), (83, 1))),
    "Q3_K": (0, 110, ((0, 32), (32, 64), (96, 12), (108, 1), (109, 1))),
    "Q4_K": (0, 144, ((0, 1), (1, 1), (2, 1), (3, 1), (4, 12), (16, 128))),
    "Q5_K": (0, 176, ((0, 1), (1, 1), (2, 1), (3, 1), (4, 12), (16, 32), (48, 128))),
    "Q6_K": (0, 210, ((0, 128), (128, 64), (192, 16), (208, 1), (209, 1))),
    "IQ4_NL": (0, 18, ((0, 1), (1, 1), (2, 16))),
    "IQ4_XS": (0, 136, ((0, 1), (1, 1), (2, 2), (4, 4), (8, 128))),
    "MXFP4": (0, 17, ((0, 1), (1, 16))),
    "TQ1_0": (0, 54, ((0, 48), (48, 4), (52, 1), (53, 1))),
    "TQ2_0": (0, 66, ((0, 64), (64, 1), (65, 1))),
}
_BYTES: Final[_Layout] = (0, 1, ((0, 1),))


class AnsCodec:
    """Range coding of planes (interleaved rANS)."""

    name = "ans"

    def __init__(self) -> None:
        self._layouts = {name: _layout(layout) for name, layout in LAYOUTS.items()}
        self._bytes = _layout(_BYTES)

    def encode(self, raw: memoryview, type_name: str) -> bytes:
        """Return `raw` encoded; other types than those of LAYOUTS are taken as bytes."""
        capacity = lib.nx_ans_bound(len(raw))
        out, used = ffi.new("uint8_t[]", capacity), ffi.new("size_t *")
        layout = self._layouts.get(type_name, self._bytes)
        status = lib.nx_ans_encode(layout, ffi.from_buffer(raw), len(raw), out, capacity, used)
        if status == lib.NX_E_NOMEM:
            raise OutOfMemory(f"no memory to encode {len(raw)} bytes")
        if status != lib.NX_OK:
            raise NexusError(f"{len(raw)} bytes of {type_name} cannot be encoded")
        return bytes(ffi.buffer(out, used[0]))

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """Fill `out`; FormatError for anything that is no encoding of exactly so many bytes."""
        decode_by(int(lib.nx_ans_best()), stored, out)


def decode_by(path: int, stored: memoryview, out: memoryview) -> None:
    """Decode by one of the implementations: they give the same bytes. See `paths`."""
    target = ffi.from_buffer(out, require_writable=True)
    status = lib.nx_ans_decode_by(path, ffi.from_buffer(stored), len(stored), target, len(out))
    if status == lib.NX_E_NOMEM:
        raise OutOfMemory(f"no memory to decode {len(out)} bytes")
    if status != lib.NX_OK:
        raise FormatError(f"ans: {len(stored)} bytes are no encoding of {len(out)}")


def paths() -> dict[str, int]:
    """Return the implementations of the decoder that this machine can run, by name."""
    names = ("portable", "avx2", "avx512", "neon")
    return {name: i for i, name in enumerate(names) if lib.nx_ans_has(i)}


def _layout(layout: _Layout) -> Any:
    rotate, block, planes = layout
    value = ffi.new("nx_ans_layout *")
    value.rotate, value.block, value.n_planes = rotate, block, len(planes)
    for i, (offset, width) in enumerate(planes):
        value.offset[i], value.width[i] = offset, width
    return value
