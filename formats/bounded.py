"""A cursor over the first bytes of an untrusted file.

Reads the file from its start as far as the parser asks, and refuses any request that reaches
past the end of the file or past `HEADER_LIMIT_BYTES` before memory is set aside for it. Knows
numbers and strings, not what they mean.
"""

from __future__ import annotations

import io
import os
import stat
import struct
from types import TracebackType

from nexus_ext.errors import FormatError, ModelChanged, ReadFailed

# The largest header seen in the wild (a vocabulary of 256k tokens with merges and a tokenizer
# in JSON) is under 64 MiB.
HEADER_LIMIT_BYTES = 256 << 20
# Read ahead by this much: a header is mostly small pieces.
_CHUNK_BYTES = 256 << 10

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class BoundedReader:
    """Reads little-endian values one after the other; `offset` is where the next one starts."""

    def __init__(self, path: str, embedded: tuple[bytes, int] | None = None) -> None:
        """Read the file at `path`, or (first bytes, size) of a file that is kept in another."""
        self.path = path
        self.offset = 0
        self._buffer = bytearray()
        self._file: io.RawIOBase | None = None
        if embedded is not None:
            self._buffer += embedded[0]
            self.file_nbytes = embedded[1]
            return
        try:
            # Before open(): opening a pipe would wait for its other end.
            mode = os.stat(path).st_mode
            if stat.S_ISDIR(mode):
                raise FormatError(
                    f"{path}: is a folder",
                    hint="Name a model file; `nexus convert` makes one of a folder of safetensors.",
                )
            if not stat.S_ISREG(mode):
                raise FormatError(f"{path}: is not a regular file", hint="Name a model file.")
            self._file = file = open(path, "rb", buffering=0)
        except OSError as error:
            raise _read_failed(path, 0, error) from error
        self.file_nbytes = os.fstat(file.fileno()).st_size

    def __enter__(self) -> BoundedReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def remaining_bytes(self) -> int:
        """Bytes between the cursor and the end of the file."""
        return self.file_nbytes - self.offset

    def error(self, what: str, *, at: int | None = None, hint: str = "") -> FormatError:
        """Make the error that names this file and the offset of the offending value."""
        offset = self.offset if at is None else at
        return FormatError(f"{self.path}: at byte {offset}: {what}", hint=hint)

    def check(self, nbytes: int, what: str) -> None:
        """Refuse `what` if its `nbytes` do not lie between the cursor and the limits."""
        if nbytes > self.remaining_bytes:
            raise self.error(
                f"{what} takes {nbytes} bytes but the file ends after {self.remaining_bytes} more",
                hint="The file is damaged or was cut off: download it again.",
            )
        if self.offset + nbytes > HEADER_LIMIT_BYTES:
            raise self.error(
                f"{what} takes {nbytes} bytes, which puts the header above the limit of "
                f"{HEADER_LIMIT_BYTES} bytes"
            )

    def u32(self, what: str) -> int:
        """Read an unsigned 32-bit number."""
        self._need(4, what)
        (value,) = _U32.unpack_from(self._buffer, self.offset)
        self.offset += 4
        return int(value)

    def u64(self, what: str) -> int:
        """Read an unsigned 64-bit number."""
        self._need(8, what)
        (value,) = _U64.unpack_from(self._buffer, self.offset)
        self.offset += 8
        return int(value)

    def unpack(self, layout: struct.Struct, what: str) -> tuple[object, ...]:
        """Read what `layout` describes."""
        self._need(layout.size, what)
        values = layout.unpack_from(self._buffer, self.offset)
        self.offset += layout.size
        return values

    def string(self, what: str, *, limit_nbytes: int | None = None) -> bytes:
        """Read a string: a 64-bit length and its bytes."""
        start = self.offset
        nbytes = self.u64(what)
        if limit_nbytes is not None and nbytes > limit_nbytes:
            raise self.error(f"{what} takes {nbytes} bytes, the limit is {limit_nbytes}", at=start)
        self._need(nbytes, what)
        value = bytes(self._buffer[self.offset : self.offset + nbytes])
        self.offset += nbytes
        return value

    def skip(self, nbytes: int, what: str) -> None:
        """Step over `nbytes`, which become part of the header all the same."""
        self.check(nbytes, what)
        self.offset += nbytes

    def skip_strings(self, count: int, what: str) -> None:
        """Step over `count` strings without making an object of any."""
        self.check(count * 8, what)  # each has at least its length
        offset, buffer, unpack = self.offset, self._buffer, _U64.unpack_from
        filled = len(buffer)
        for _ in range(count):
            if offset + 8 > filled:
                self.offset = offset
                self._need(8, what)
                filled = len(buffer)
            (nbytes,) = unpack(buffer, offset)
            offset += 8
            if nbytes > filled - offset:
                self.offset = offset
                self.check(nbytes, what)
            offset += nbytes
        self.offset = offset

    def header(self, nbytes: int) -> bytes:
        """Return the first `nbytes` of the file."""
        self._fill(nbytes)
        return bytes(self._buffer[:nbytes])

    def _need(self, nbytes: int, what: str) -> None:
        if self.offset + nbytes > len(self._buffer):
            self.check(nbytes, what)
            self._fill(self.offset + nbytes)

    def _fill(self, end: int) -> None:
        """Have the first `end` bytes in the buffer; the caller has checked `end`."""
        while len(self._buffer) < end:
            start = len(self._buffer)
            if self._file is None:
                raise self.error(f"the embedded header has {start} bytes, {end} are needed")
            wanted = min(max(end, start + _CHUNK_BYTES), self.file_nbytes) - start
            try:
                piece = os.pread(self._file.fileno(), wanted, start)
            except OSError as error:
                raise _read_failed(self.path, start, error) from error
            if not piece:
                raise ModelChanged(
                    f"{self.path}: ended at byte {start} while it was read, but had "
                    f"{self.file_nbytes} bytes before",
                    hint="Wait until the file is complete and open it again.",
                    path=self.path,
                    offset=start,
                )
            self._buffer += piece


def _read_failed(path: str, offset: int, error: OSError) -> ReadFailed:
    return ReadFailed(
        f"{path}: cannot be read at byte {offset}: {error.strerror}",
        hint="Check that the file exists and that you may read it.",
        path=path,
        offset=offset,
        errno=error.errno or 0,
    )
