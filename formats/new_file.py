"""A file that appears under its name only when it is complete.

It is written beside its final place, under a name of its own, and renamed at the end. Whatever
ends the writing before that (an error, an interrupt) removes it; a kill leaves only the file under
the other name, which the next attempt removes. Knows nothing of what is written.
"""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from types import TracebackType
from typing import Any

from nexus_ext.errors import UsageError, WriteFailed
from nexus_ext.formats.direct_write import DirectAppender
from nexus_ext.units import format_bytes

# Left free on top of what is written, so that a conversion is not what fills a disk.
SPARE_NBYTES = 16 << 20
DIRECT_FROM_NBYTES = 64 << 20  # files from this size on are written past the page cache
_SUFFIX = ".part"


class NewFile:
    """Write a file of about `expected_nbytes`; as a context manager it vanishes unless committed.

    Raises UsageError when something is at `path` and `overwrite` is not set, WriteFailed when
    there is too little space or the system refuses to write.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, expected_nbytes: int, overwrite: bool = False
    ) -> None:
        self.path = os.fspath(path)
        self.part_path = self.path + _SUFFIX
        self.nbytes = 0  # written so far
        self._overwrite = overwrite
        self._descriptor = -1
        self._appender: DirectAppender | None = None
        self._large = expected_nbytes >= DIRECT_FROM_NBYTES
        refuse_existing(self.path, overwrite=overwrite)
        folder = os.path.dirname(os.path.abspath(self.path))
        if not os.path.isdir(folder):
            raise UsageError(
                f"{self.path}: the directory {folder} does not exist", hint="Create it first."
            )
        try:
            _remove(self.part_path)
        except OSError as error:
            raise self._failed(error) from error
        check_space(folder, expected_nbytes)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._descriptor = os.open(self.part_path, flags, 0o666)
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.discard()

    def write(self, data: bytes | bytearray | memoryview | Any) -> None:
        """Append `data`, anything that is a contiguous buffer."""
        view = memoryview(data).cast("B")
        try:
            if self._large:
                self._large = False
                # Where there are no such writes, the page cache is as good as it gets.
                with suppress(OSError):
                    self._appender = DirectAppender(self.part_path, self._descriptor, 0)
            if self._appender is not None:
                self._appender.append(view, self.nbytes)
                self.nbytes += len(view)
                return
            while len(view):
                done = os.write(self._descriptor, view)
                view = view[done:]
                self.nbytes += done
        except OSError as error:
            raise self._failed(error) from error

    def pad(self, alignment: int) -> None:
        """Append zeros up to the next multiple of `alignment`."""
        self.write(bytes(-self.nbytes % alignment))

    def commit(self) -> None:
        """Put the file, safe on the disk, under its final name."""
        try:
            if self._appender is not None:
                self._appender.flush()
                self._stop()
                os.ftruncate(self._descriptor, self.nbytes)
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
            if self._overwrite:
                os.replace(self.part_path, self.path)
            else:
                refuse_existing(self.path, overwrite=False)
                os.rename(self.part_path, self.path)
        except OSError as error:
            if isinstance(error, WriteFailed):
                raise
            raise self._failed(error) from error

    def discard(self) -> None:
        """Remove what was written, unless it was committed."""
        self._stop()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            _remove(self.part_path)

    def _stop(self) -> None:
        if self._appender is not None:
            self._appender.close()
            self._appender = None

    def _failed(self, error: OSError) -> WriteFailed:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return WriteFailed(
            f"{self.path}: cannot be written after {self.nbytes} bytes: {error.strerror}",
            hint="Free some space, or write to another disk." if full else "",
            path=self.path,
            errno=error.errno or 0,
        )


def replace_whole(path: str | os.PathLike[str], data: bytes, *, durable: bool = False) -> None:
    """Write a small file, in a directory that is made if need be. Raises OSError.

    Readers see the old file or the whole new one, also while several processes write it. `durable`:
    it is on the disk when this returns.
    """
    name = os.fspath(path)
    beside = f"{name}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    try:
        with open(beside, "xb") as stream:
            stream.write(data)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(beside, name)
    finally:
        _remove(beside)


def refuse_existing(path: str, *, overwrite: bool) -> None:
    """Raise UsageError if something is at `path` that may not be overwritten."""
    if os.path.isdir(path):
        raise UsageError(f"{path}: is a directory", hint="Name a file.")
    if os.path.lexists(path) and not overwrite:
        raise UsageError(
            f"{path}: exists already", hint="Name another file, or pass --force to overwrite it."
        )


def check_space(folder: str, nbytes: int) -> None:
    """Raise WriteFailed unless the file system of `folder` has room for `nbytes`."""
    free = shutil.disk_usage(folder).free
    if nbytes + SPARE_NBYTES > free:
        raise WriteFailed(
            f"{folder}: {format_bytes(nbytes)} are to be written, {format_bytes(free)} are free",
            hint="Free some space, or write to another disk.",
            path=folder,
            errno=errno.ENOSPC,
        )


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
