"""How fast a model's own file can be read cold just now, and the page cache of its files."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from dataclasses import dataclass
from typing import Final

from nexus_ext import core
from nexus_ext.hardware import HardwareProfile
from nexus_ext.hardware.disk import drop_page_cache
from nexus_ext.units import GIB

_log = logging.getLogger("nexus_ext.bench")

_PROBE_BYTES: Final = GIB
_PROBE_NS: Final = 500_000_000
_PAGE: Final = 4096
_LOWEST_BIT: Final = bytes(byte & 1 for byte in range(256))  # the others of mincore are reserved


@dataclass(frozen=True, slots=True)
class DiskSample:
    """One cold measurement of the disk."""

    bytes_s: float
    direct: bool


def disk_sample(
    files: list[str], hardware: HardwareProfile, record_bytes: int | None = None
) -> DiskSample:
    """Read the largest of `files` cold, for half a second or 1 GiB.

    In sequence, in the way that this disk likes best; or, with `record_bytes`, blocks of that size
    at random places, as many at a time. What the page cache has of it stays there, but where the
    file cannot be read directly.
    """
    path = max(files, key=os.path.getsize)
    points = [p for p in hardware.disk.points if p.pattern == "sequential"]
    best = max(points, key=lambda point: point.bytes_s)
    block = best.block_bytes if record_bytes is None else -(-record_bytes // _PAGE) * _PAGE
    block = min(block, os.path.getsize(path))
    for direct in (True, False):
        if not direct:
            drop_files([path])
        n_bytes, ns, was_direct, _ = core.read_disk(
            path, block, best.depth, record_bytes is not None, _PROBE_BYTES, _PROBE_NS
        )
        if was_direct:
            break
    else:
        drop_files([path])
    return DiskSample(n_bytes * 1e9 / max(ns, 1), was_direct)


def drop_files(files: list[str]) -> None:
    """Drop the page cache of `files`. Pages that were never written back are written first."""
    for path in files:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)  # a dirty page cannot be dropped
        except OSError as error:
            _log.debug("fsync(%s): %s", path, error.strerror)
        finally:
            os.close(fd)
        drop_page_cache(path)


def cached_bytes(files: list[str]) -> int | None:
    """Return how much of `files` the page cache holds; None where the system does not tell."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mincore"):
        return None
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    n_pages = 0
    for path in files:
        size = os.path.getsize(path)
        if size == 0:
            continue
        with open(path, "rb") as file:
            # Private and writable, or ctypes does not give the address of it; never touched.
            mapped = mmap.mmap(
                file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
            )
        view = (ctypes.c_char * size).from_buffer(mapped)
        vector = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        failed = libc.mincore(ctypes.addressof(view), size, vector)
        del view
        mapped.close()
        if failed:
            return None
        n_pages += vector.raw.translate(_LOWEST_BIT).count(1)
    return n_pages * mmap.PAGESIZE
