"""Blosc 1 chunks, as numcodecs has them: any reader of Blosc can decode them.

What a ggml type is made of says which bytes are alike: byte k of every block, or bit k. Blosc puts
them side by side ("shuffles" them), so that zstd sees exponents apart from mantissas and scales
apart from codes, and finds what repeats. Which of the two is better depends on the weights: each
chunk is encoded in every way, and the smallest is kept.
"""

from __future__ import annotations

import struct
from typing import Any, Final

from nexus_ext.hooks import FormatError

LEVEL: Final = 5  # of zstd: more makes weights hardly smaller
MOST_ITEM_BYTES: Final = 255
# version, version of the codec, flags, item size (a byte each), decoded, block and stored bytes
HEADER: Final = struct.Struct("<4xIII")
MOST_BYTES: Final = (1 << 31) - 1 - 16  # Blosc counts in 32 bits, and adds a header


class BloscCodec:
    """One Blosc chunk for a chunk. Threads share nothing."""

    name = "blosc"

    def __init__(self) -> None:
        from numcodecs import blosc

        # Several threads decode at once, each its own chunk: Blosc's own would only be in the way.
        blosc.use_threads = False
        self._blosc: Any = blosc

    def encode(self, raw: memoryview, type_name: str) -> bytes:
        """Return one chunk; `type_name` says how long the items are that are shuffled."""
        blosc, n = self._blosc, len(raw)
        if n > MOST_BYTES:
            raise FormatError(f"blosc: {n} bytes are more than a chunk can hold")
        size = item_bytes(type_name)
        if size > MOST_ITEM_BYTES:
            size = 1
        ways = [(blosc.NOSHUFFLE, 1), (blosc.SHUFFLE, size), (blosc.BITSHUFFLE, size)]
        encoded = [
            blosc.compress(raw, b"zstd", LEVEL, shuffle, typesize=typesize)
            for shuffle, typesize in ways
        ]
        smallest: bytes = min(encoded, key=len)
        return smallest

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """Fill `out`; FormatError for anything that is not a chunk of exactly so many bytes."""
        if len(stored) < HEADER.size:
            raise FormatError(f"blosc: {len(stored)} bytes are less than a header")
        n_decoded, _, n_stored = HEADER.unpack_from(stored)
        if n_stored != len(stored):
            raise FormatError(f"blosc: {len(stored)} bytes, the chunk says {n_stored}")
        if n_decoded != len(out):
            raise FormatError(f"blosc: decodes to {n_decoded} bytes, {len(out)} are expected")
        if not len(out):
            return
        try:
            self._blosc.decompress(stored, out)
        except (RuntimeError, ValueError) as error:
            raise FormatError(f"blosc: {error}") from None


def item_bytes(type_name: str) -> int:
    """Return the bytes of a block of a ggml type; 1 for a type that is not known."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        return int(GGML_QUANT_SIZES[GGMLQuantizationType[type_name]][1])
    except KeyError:
        return 1
