"""SHA-256 of the files that are converted, from the bytes that the conversion reads anyway.

What comes in the order of the files is hashed as it is handed over. The rest (headers, padding,
experts that are taken out of their order) is read from the files, not far behind the conversion, so
that it is still in the page cache where the conversion put it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Final

_PIECE_NBYTES: Final = 1 << 20
_BEHIND_NBYTES: Final = 32 << 20  # how far hashing stays back before it reads by itself
_SMALL_NBYTES: Final = 64 << 10  # padding and headers are read at once
_WAITING: Final = 32  # pieces between the conversion and the hash

Piece = tuple[int, int, memoryview, Callable[[], None], int]


class SourceDigest:
    """Hashes `paths` in a thread of its own."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._queue: queue.Queue[Piece | None] = queue.Queue(_WAITING)
        self._file = 0
        self._at = 0  # in that file: everything before is hashed
        self._before = 0  # bytes of the files before it
        self._digest = hashlib.sha256()
        self._digests: list[str] = []
        self._sizes = [os.stat(path).st_size for path in paths]
        self._buffer = bytearray(_PIECE_NBYTES)
        self._stopped = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="nexus-sha256", daemon=True)
        self._thread.start()

    def feed(
        self, file: int, offset: int, data: memoryview, done: int, release: Callable[[], None]
    ) -> None:
        """Hand over bytes of a file; `done`: how many bytes the conversion has read in all.

        `release` is called when `data` is not needed any more.
        """
        self._queue.put((file, offset, data, release, done))

    def stop(self) -> None:
        """End, whatever is left."""
        self._stopped = True
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=0.1)
            except queue.Full:
                continue
            break
        self._thread.join()

    def result(self) -> tuple[str, ...]:
        """Return the digests of all files; waits for them. Raises OSError of reading them."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return tuple(self._digests)

    # -- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while (piece := self._queue.get()) is not None:
            file, offset, data, release, done = piece
            if self._error is None and not self._stopped:
                self._guarded(functools.partial(self._take, file, offset, data, done))
            release()
        if self._error is None and not self._stopped:
            self._guarded(self._rest)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # raised by `result`; until then pieces must be given back
            self._error = error

    def _take(self, file: int, offset: int, data: memoryview, done: int) -> None:
        if self._file == len(self._paths):
            return
        if file == self._file + 1 and self._sizes[self._file] - self._at <= _SMALL_NBYTES:
            self._read_to(self._sizes[self._file])
            self._next_file()
        if file == self._file:
            if 0 < offset - self._at <= _SMALL_NBYTES:
                self._read_to(offset)
            if offset <= self._at < offset + len(data):
                self._digest.update(data[self._at - offset :])
                self._at = offset + len(data)
        while done - (self._before + self._at) > _BEHIND_NBYTES and not self._stopped:
            if self._at == self._sizes[self._file]:
                self._next_file()
            if self._file == len(self._paths):
                return
            self._read_to(min(self._at + _PIECE_NBYTES, self._sizes[self._file]))

    def _read_to(self, end: int) -> None:
        with open(self._paths[self._file], "rb", buffering=0) as file:
            file.seek(self._at)
            while self._at < end and not self._stopped:
                view = memoryview(self._buffer)[: min(end - self._at, _PIECE_NBYTES)]
                got = file.readinto(view)
                if not got:
                    raise OSError(f"{self._paths[self._file]}: ended at byte {self._at}")
                self._digest.update(view[:got])
                self._at += got

    def _next_file(self) -> None:
        self._digests.append(self._digest.hexdigest())
        self._digest = hashlib.sha256()
        self._before += self._sizes[self._file]
        self._file += 1
        self._at = 0

    def _rest(self) -> None:
        while self._file < len(self._paths) and not self._stopped:
            self._read_to(self._sizes[self._file])
            if not self._stopped:
                self._next_file()
