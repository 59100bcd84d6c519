"""Read byte ranges of a file: through the page cache, past it, or as a mapping.

Knows files only. What is asked for must be there: a file that ends before is an error.
"""

from __future__ import annotations

import mmap
import os
import threading
from typing import Final, Literal

from nexus_ext.errors import ModelChanged, ReadFailed

Mode = Literal["buffered", "direct", "mmap"]
Buffer = bytearray | mmap.mmap
DIRECT_ALIGNMENT: Final = 4096
_NOWAIT: Final = getattr(os, "RWF_NOWAIT", 0)
_SAMPLES: Final = 64
_O_DIRECT: Final = getattr(os, "O_DIRECT", 0)


def is_cold(path: str) -> bool:
    """Tell whether little of a file is in the page cache; False where the system does not say."""
    if not _NOWAIT:
        return False
    page = bytearray(DIRECT_ALIGNMENT)
    cold = 0
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        nbytes = os.fstat(descriptor).st_size
        for number in range(_SAMPLES):
            try:
                os.preadv(descriptor, [page], nbytes * number // _SAMPLES, _NOWAIT)
            except BlockingIOError:
                cold += 1
    except OSError:
        return False  # a file system that does not answer
    finally:
        os.close(descriptor)
    return cold > _SAMPLES * 3 // 4


class FileReader:
    """An open file. Safe to use from several threads."""

    def __init__(self, path: str, mode: Mode = "buffered") -> None:
        """Open `path`; a file system that refuses direct reads is read through the page cache."""
        self.path = path
        self.mode: Mode = mode
        self._map: mmap.mmap | None = None
        self._own = threading.local()  # .bounce: page-aligned memory, as direct reads want it
        try:
            self._descriptor = self._open(mode)
        except OSError as error:
            raise self._failed(0, error) from error
        self.nbytes = os.fstat(self._descriptor).st_size
        if mode == "mmap" and self.nbytes:
            self._map = mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ)

    def _open(self, mode: Mode) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        if mode == "direct" and _O_DIRECT:
            try:
                return os.open(self.path, flags | _O_DIRECT)
            except OSError:
                self.mode = "buffered"
        return os.open(self.path, flags)

    def close(self) -> None:
        """Close the file; a mapping goes with the last view of it."""
        os.close(self._descriptor)
        self._map = None

    def view(self, offset: int, nbytes: int, buffer: Buffer | None = None) -> memoryview:
        """Return `nbytes` from `offset` on: of the mapping, or read into `buffer` (or a new one).

        A direct read returns a view of `buffer` if that is a mapping with room for two blocks of
        DIRECT_ALIGNMENT more, else one that is valid until the next read by this thread.
        """
        if offset < 0 or offset + nbytes > self.nbytes:
            raise self._short(offset)
        if self._map is not None:
            return memoryview(self._map)[offset : offset + nbytes]
        if self.mode == "direct":
            return self._direct(offset, nbytes, buffer)
        if buffer is None or len(buffer) < nbytes:
            buffer = bytearray(nbytes)
        view = memoryview(buffer)[:nbytes]
        self._fill(view, offset, nbytes)
        return view

    def _direct(self, offset: int, nbytes: int, buffer: Buffer | None) -> memoryview:
        start = offset & ~(DIRECT_ALIGNMENT - 1)
        span = -(-(offset + nbytes - start) // DIRECT_ALIGNMENT) * DIRECT_ALIGNMENT
        if not isinstance(buffer, mmap.mmap) or len(buffer) < span:
            buffer = getattr(self._own, "bounce", None)
            if buffer is None or len(buffer) < span:
                buffer = self._own.bounce = mmap.mmap(-1, max(span, 1 << 20))
        self._fill(memoryview(buffer)[:span], start, offset + nbytes - start)
        return memoryview(buffer)[offset - start : offset - start + nbytes]

    def _fill(self, view: memoryview, offset: int, needed: int) -> None:
        """Read into `view` until `needed` bytes are there (a direct read may end at the end)."""
        done = 0
        while done < needed:
            try:
                got = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise self._failed(offset + done, error) from error
            if not got:
                raise self._short(offset + done)
            done += got
            if self.mode == "direct" and done < needed and done % DIRECT_ALIGNMENT:
                raise self._short(offset + done)

    def _short(self, offset: int) -> ModelChanged:
        return ModelChanged(
            f"{self.path}: ends before byte {offset}, which was there when it was opened",
            hint="The file is not what it was: open it again.",
            path=self.path,
            offset=offset,
        )

    def _failed(self, offset: int, error: OSError) -> ReadFailed:
        return ReadFailed(
            f"{self.path}: cannot be read at byte {offset}: {error.strerror}",
            hint="Check the disk and the file.",
            path=self.path,
            offset=offset,
            errno=error.errno or 0,
        )
