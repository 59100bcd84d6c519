"""Zstandard, for archives: general, slower to decode than weights can be computed with."""

from __future__ import annotations

import threading
from typing import Any, Final

from nexus_ext.codecs import wrong_size
from nexus_ext.errors import FormatError, UsageError

LEVEL: Final = 3


class ZstdCodec:
    """One frame a chunk, by the `zstandard` package."""

    name = "zstd"

    def __init__(self) -> None:
        try:
            import zstandard
        except ImportError:
            raise UsageError(
                "the codec 'zstd' needs the package zstandard",
                hint='pip install "nexus_ext[zstd]"',
            ) from None
        self._zstandard: Any = zstandard
        self._own = threading.local()  # its objects must not be shared by threads

    def encode(self, raw: memoryview, type_name: str) -> bytes:
        """Return one frame that says its decoded size."""
        if not hasattr(self._own, "compressor"):
            self._own.compressor = self._zstandard.ZstdCompressor(level=LEVEL)
        encoded: bytes = self._own.compressor.compress(raw)
        return encoded

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """Fill `out`; FormatError for anything that is not a frame of exactly so many bytes."""
        if not hasattr(self._own, "decompressor"):
            self._own.decompressor = self._zstandard.ZstdDecompressor()
        try:
            size = self._zstandard.frame_content_size(stored)
            if size != len(out):  # also -1, unknown: then nothing bounds what it grows to
                raise wrong_size(self.name, size, len(out))
            decoder = self._own.decompressor.decompressobj()
            decoded = decoder.decompress(stored)
        except self._zstandard.ZstdError as error:
            raise FormatError(f"zstd: {error}") from None
        if len(decoded) != len(out) or not decoder.eof or decoder.unused_data:
            raise wrong_size(self.name, len(decoded), len(out))
        out[:] = decoded
