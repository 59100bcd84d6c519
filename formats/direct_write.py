"""Append to a file past the page cache, in large pieces, behind the one who appends.

Writing through the page cache takes several times the processor: pages are found, cleared, filled
and written back, all of which competes with whoever makes the bytes. Knows nothing of what they
mean. The file may be written elsewhere through the page cache meanwhile, in other blocks.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

BLOCK_NBYTES: Final = 4096  # pieces begin and end at multiples of it
PIECE_NBYTES: Final = 4 << 20
_BUFFERS: Final = 4
_WRITERS: Final = 2
_O_DIRECT: Final = getattr(os, "O_DIRECT", 0)


class DirectAppender:
    """Appends to an open file from `end` on. Not for several threads at once.

    OSError of a write comes from a later call. Raises OSError at once where the file system has no
    such writes.
    """

    def __init__(self, path: str, descriptor: int, end: int) -> None:
        """`descriptor` is the same file, open for reading and writing through the page cache."""
        if not _O_DIRECT:
            raise OSError(errno.EINVAL, "this system has no O_DIRECT")
        self._buffered = descriptor
        self._direct = os.open(path, os.O_WRONLY | os.O_CLOEXEC | _O_DIRECT)
        self._pool = ThreadPoolExecutor(_WRITERS, thread_name_prefix="nexus-write")
        self._free = [mmap.mmap(-1, PIECE_NBYTES) for _ in range(_BUFFERS)]
        self._under_way: deque[tuple[Future[None], mmap.mmap]] = deque()
        self._piece = self._free.pop()
        self._start = end - end % BLOCK_NBYTES  # of the piece, in the file
        self._used = end - self._start
        self._piece[: self._used] = os.pread(descriptor, self._used, self._start)

    @property
    def end(self) -> int:
        """Where the next byte goes."""
        return self._start + self._used

    def append(self, data: bytes | memoryview, offset: int) -> None:
        """Write `data` at `offset`, which is `end` or lies behind it: between are zeros."""
        assert offset >= self.end
        while self.end < offset:
            room = min(offset - self.end, PIECE_NBYTES - self._used)
            self._take(bytes(room))
        view = memoryview(data)
        while len(view):
            room = PIECE_NBYTES - self._used
            self._take(view[:room])
            view = view[room:]

    def flush(self) -> None:
        """Have everything in the file. Behind its end, up to a whole block, are zeros."""
        keep = self._used % BLOCK_NBYTES
        last = bytes(self._piece[self._used - keep : self._used])
        if self._used:
            whole = self._used + -self._used % BLOCK_NBYTES
            self._piece[self._used : whole] = bytes(whole - self._used)
            start = self._start + self._used - keep
            self._hand_over(whole)
            self._start = start
            self._piece[:keep] = last
            self._used = keep
        while self._under_way:
            self._wait()

    def close(self) -> None:
        """Close what was opened here; what was not flushed is lost."""
        self._pool.shutdown()
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1

    def _take(self, data: bytes | memoryview) -> None:
        self._piece[self._used : self._used + len(data)] = data
        self._used += len(data)
        if self._used == PIECE_NBYTES:
            self._hand_over(PIECE_NBYTES)

    def _hand_over(self, nbytes: int) -> None:
        future = self._pool.submit(self._write, self._piece, nbytes, self._start)
        self._under_way.append((future, self._piece))
        self._start += nbytes
        self._used = 0
        if not self._free:
            self._wait()
        self._piece = self._free.pop()

    def _wait(self) -> None:
        future, piece = self._under_way.popleft()
        self._free.append(piece)
        future.result()

    def _write(self, piece: mmap.mmap, nbytes: int, offset: int) -> None:
        view = memoryview(piece)[:nbytes]
        descriptor = self._direct
        while len(view):
            try:
                done = os.pwrite(descriptor, view, offset)
            except OSError as error:
                if descriptor == self._buffered or error.errno != errno.EINVAL:
                    raise
                done = 0
            if not done or done % BLOCK_NBYTES:
                descriptor = self._buffered  # no such write there: then like any other
            view = view[done:]
            offset += done
