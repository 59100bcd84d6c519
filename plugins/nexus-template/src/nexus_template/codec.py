"""A codec for NXF files: zlib, which is not good at weights, and short."""

from __future__ import annotations

import zlib

from nexus_ext.hooks import FormatError


class ZlibCodec:
    """One zlib stream a chunk. Has no state: it is called from several threads at once."""

    name = "x-template-zlib"  # written into files: a name that nobody else will take

    def encode(self, raw: memoryview, type_name: str) -> bytes:
        return zlib.compress(raw, level=1)

    def decode(self, stored: memoryview, out: memoryview) -> None:
        decoder = zlib.decompressobj()
        try:
            # Never more than was asked for, whatever the bytes say: they may be hostile.
            data = decoder.decompress(stored, len(out) + 1)
        except zlib.error as error:
            raise FormatError(f"{self.name}: {error}") from None
        if len(data) != len(out) or not decoder.eof or decoder.unused_data:
            raise FormatError(f"{self.name}: {len(stored)} bytes are no encoding of {len(out)}")
        out[:] = data
