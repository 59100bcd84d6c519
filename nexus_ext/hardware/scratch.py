"""The file that a disk is measured on: the user's own large file, or a scratch file.

A scratch file is written only when the path is a directory or a file too small to measure, never
takes more than a quarter of the free space, holds bytes that no file system can compress or
deduplicate, and is removed whatever happens. One that a killed process left behind is removed by
the next probe of that directory.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from nexus_ext.errors import UsageError
from nexus_ext.units import MIB, format_bytes

_log = logging.getLogger("nexus_ext.hardware")

SMALLEST_TARGET_BYTES = 64 * MIB  # below this a fast disk is done before it is up to speed
_USABLE_BYTES = MIB  # a file below this gives nothing worth a number
_PREFIX = ".nexus-probe-"
_CHUNK_BYTES = 8 * MIB
_SYNC_EVERY_BYTES = 64 * MIB
_HINT = "Give an existing large file on that disk, best the model itself, or free some space."


@dataclass(frozen=True, slots=True)
class Target:
    """A file to measure a disk on."""

    path: str
    nbytes: int
    scratch: bool


@contextmanager
def probe_target(
    path: str,
    *,
    scratch_bytes: int,
    write_ns: int,
    free_bytes: Callable[[str], int] | None = None,
    clock: Callable[[], int] = time.monotonic_ns,
) -> Iterator[Target]:
    """Give the file to measure for `path`, an existing file or directory.

    A scratch file has `scratch_bytes`, less where space is short or where writing it takes longer
    than `write_ns`. Where none can be written, a small file is measured itself. UsageError when the
    path does not exist, cannot be read, or is a directory without room.
    """
    try:
        is_directory = os.path.isdir(path)
        nbytes = 0 if is_directory else os.stat(path).st_size
    except OSError as error:
        raise UsageError(
            f"{path!r} cannot be probed: {error.strerror}",
            hint="Give an existing file, best the model, or a directory.",
        ) from error
    if not os.access(path, os.R_OK):
        raise UsageError(f"{path!r} cannot be read by this user", hint="Check its permissions.")
    if not is_directory and nbytes >= SMALLEST_TARGET_BYTES:
        yield Target(path, nbytes, scratch=False)
        return
    directory = path if is_directory else os.path.dirname(path) or "."
    _remove_leftovers(directory)
    with ExitStack() as stack:
        try:
            size = scratch_size(directory, scratch_bytes, (free_bytes or _free_bytes)(directory))
            target = stack.enter_context(_scratch_file(directory, size, write_ns, clock))
        except UsageError as error:
            if nbytes < _USABLE_BYTES:
                raise
            # A small model in a read-only place must still run; its numbers are only noisier.
            _log.warning("the disk is measured on a small file: %s", error)
            target = Target(path, nbytes, scratch=False)
        yield target


def scratch_size(directory: str, wanted_bytes: int, free_bytes: int) -> int:
    """Return the size for a scratch file: a quarter of the free bytes at most, in whole MiB."""
    wanted_bytes = max(1, wanted_bytes // MIB) * MIB
    size = min(wanted_bytes, free_bytes // 4 // MIB * MIB)
    needed = min(wanted_bytes, SMALLEST_TARGET_BYTES)
    if size < needed:
        raise UsageError(
            f"the disk of {directory!r} has {format_bytes(free_bytes)} free, "
            f"and a scratch file for measuring it needs {format_bytes(4 * needed)} free",
            hint=_HINT,
        )
    return size


@contextmanager
def _scratch_file(
    directory: str, size: int, write_ns: int, clock: Callable[[], int]
) -> Iterator[Target]:
    path = os.path.join(directory, f"{_PREFIX}{os.getpid()}-{os.urandom(8).hex()}.tmp")
    # The name is unique, so removing it is right from before it exists: an interrupt between the
    # creation and the next statement leaves nothing behind.
    try:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(
                f"no scratch file can be written in {directory!r}: {error.strerror}", hint=_HINT
            ) from error
        try:
            _lock(fd)
            written = _fill(fd, directory, size, write_ns, clock)
            yield Target(path, written, scratch=True)
        finally:
            os.close(fd)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)


def _fill(fd: int, directory: str, size: int, write_ns: int, clock: Callable[[], int]) -> int:
    """Write up to `size` bytes, flush them to the device, and return how many there are."""
    noise = os.urandom(_CHUNK_BYTES)
    deadline = clock() + write_ns
    written = 0
    try:
        while written < size:
            # Each chunk is rotated by another odd distance, so that no two blocks are alike.
            turn = (written // _CHUNK_BYTES * 8191 + 1) % _CHUNK_BYTES
            chunk = memoryview(noise[turn:] + noise[:turn])[: size - written]
            written += os.write(fd, chunk)
            if written % _SYNC_EVERY_BYTES == 0:
                # Without this the time goes by in the last flush, after the deadline.
                os.fsync(fd)
                if clock() > deadline and written >= SMALLEST_TARGET_BYTES:
                    break
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or written < SMALLEST_TARGET_BYTES:
            raise UsageError(
                f"the scratch file in {directory!r} could not be written beyond "
                f"{format_bytes(written)}: {error.strerror}",
                hint=_HINT,
            ) from error
        _log.warning("a quota or a full disk ended the scratch file at %s", format_bytes(written))
        with suppress(OSError):
            os.fsync(fd)
    return written


def _free_bytes(directory: str) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def _lock(fd: int) -> None:
    # Held for as long as the file is in use: a scratch file that can be locked is a leftover.
    import fcntl  # absent on Windows

    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_leftovers(directory: str) -> None:
    import fcntl  # absent on Windows

    try:
        names = [name for name in os.listdir(directory) if name.startswith(_PREFIX)]
    except OSError:
        return  # creating a file there will fail too, and say why
    for name in names:
        path = os.path.join(directory, name)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            _log.debug("left alone: %s (%s)", path, error.strerror)
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
            _log.info("removed %s, which an earlier probe left behind", path)
        except OSError as error:
            _log.debug("left alone: %s (%s)", path, error.strerror)
        finally:
            os.close(fd)
