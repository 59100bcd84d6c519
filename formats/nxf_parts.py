"""The files of an NXF while it is written: one main file, and shards.

Knows where bytes go and what a failing system says; what they mean is up to `nxf_writer`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import xxhash

from nexus_ext.errors import NexusError, WriteFailed
from nexus_ext.formats.direct_write import DirectAppender
from nexus_ext.formats.nxf_file import read_nxf
from nexus_ext.formats.nxf_header import ENTRY_NBYTES, MAGIC, PREAMBLE, VERSION, header_nbytes

SUFFIX: Final = ".part"
# What is written goes to the disk after so much, and not all at the end: reading goes on meanwhile.
_FLUSH_NBYTES: Final = 64 << 20


class Part:
    """One file of the set; `end` is where the next chunk may start."""

    def __init__(self, path: str, start: int, *, keep: bool) -> None:
        """Open the file at `path`, with what it holds if `keep`; WriteFailed if that cannot be."""
        self.path = path
        self.end = start
        self._not_flushed = 0
        self._flushing: Future[None] | None = None
        self._flusher: ThreadPoolExecutor | None = None
        self._appender: DirectAppender | None = None
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if keep else os.O_TRUNC)
        try:
            self.descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            raise write_failed(path, error) from error

    def write_behind(self) -> None:
        """From now on have what is appended past the page cache, where the file system can."""
        # Where it cannot, writing through the page cache is as good as it gets.
        with contextlib.suppress(OSError):
            self._appender = DirectAppender(self.path, self.descriptor, self.end)

    def write_no_longer_behind(self) -> None:
        """Have what was appended in the file; its memory is given back."""
        try:
            if self._appender is not None:
                self._appender.flush()
        except OSError as error:
            raise write_failed(self.path, error) from error
        self._stop()

    def append(self, data: bytes | memoryview, offset: int) -> None:
        """Write a chunk at `offset`, at `end` or behind it."""
        if self._appender is None:
            self.write(data, offset)
            return
        try:
            self._appender.append(data, offset)
        except OSError as error:
            raise write_failed(self.path, error) from error

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        view = memoryview(data)
        try:
            while len(view):
                done = os.pwrite(self.descriptor, view, offset)
                view = view[done:]
                offset += done
                self._not_flushed += done
            if self._not_flushed >= _FLUSH_NBYTES:
                self._flush()
        except OSError as error:
            raise write_failed(self.path, error) from error

    def _flush(self) -> None:
        """Have what was written so far go to the disk, behind the writing."""
        if self._flusher is None:
            self._flusher = ThreadPoolExecutor(1, thread_name_prefix="nexus-flush")
        self._wait()  # no more than twice as much waits for the disk
        self._flushing = self._flusher.submit(os.fsync, self.descriptor)
        self._not_flushed = 0

    def _wait(self) -> None:
        """Wait for what is on its way to the disk. The system tells of a failure only once."""
        if self._flushing is not None:
            flushing, self._flushing = self._flushing, None
            flushing.result()

    def complete(self) -> None:
        """Cut the file behind its last chunk and have all of it on the disk."""
        try:
            self._wait()
            self.write_no_longer_behind()
            os.ftruncate(self.descriptor, self.end)
            os.fsync(self.descriptor)
        except OSError as error:
            raise write_failed(self.path, error) from error

    def close(self) -> None:
        """Close the file; what was written stays."""
        if self._appender is not None:
            # Whatever is missing then is written again: the next attempt looks at every chunk.
            with contextlib.suppress(OSError):
                self._appender.flush()
        self._close()

    def _stop(self) -> None:
        if self._appender is not None:
            self._appender.close()
            self._appender = None

    def _close(self) -> None:
        self._stop()
        if self._flusher is not None:
            self._flusher.shutdown()
            self._flusher = self._flushing = None
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def discard(self) -> None:
        """Close the file and remove it."""
        self._close()
        unlink(self.path)


def write_failed(path: str, error: OSError) -> WriteFailed:
    """Return what an error of the system means for the one who writes `path`."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return WriteFailed(
        f"{path}: cannot be written: {error.strerror}",
        hint="Free some space, or write to another disk." if full else "",
        path=path,
        errno=error.errno or 0,
    )


def encode_header(
    text: bytes, gguf: bytes, table: bytes, file_nbytes: int, alignment: int
) -> bytes:
    """Return a whole header, with its hash: descriptor, GGUF headers, chunk table, padding."""
    n_chunks = len(table) // ENTRY_NBYTES
    size = header_nbytes(len(text), len(gguf), n_chunks, alignment)
    body = PREAMBLE.pack(MAGIC, VERSION, 0, size, len(text), n_chunks, file_nbytes, 0, 0)
    body += text + gguf
    body += bytes(-len(body) % ENTRY_NBYTES) + table
    body += bytes(size - len(body))
    digest = xxhash.xxh3_64_intdigest(body)
    return body[: PREAMBLE.size - 8] + digest.to_bytes(8, "little") + body[PREAMBLE.size :]


def carrier_descriptor(index: int) -> bytes:
    """Return the descriptor of a shard."""
    return b'{"shard":{"index":%d}}' % index


def shards_of(path: str) -> list[str]:
    """Return the names of the shards of the file that is about to be replaced, if it is an NXF."""
    try:
        return [shard.name for shard in read_nxf(path).nxf.shards]
    except NexusError:
        return []  # whatever it is, it has no shards of ours


def sync_folder(folder: str) -> None:
    """Have the names in a directory on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unlink(path: str) -> None:
    """Remove a file that may not be there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
