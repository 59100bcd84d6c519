"""Residuals: what quantization lost of each matrix, at four bits.

They lie beside a GGUF, as the sidecar `model.gguf.nxr`, or are the section `residuals` of an NXF;
the bytes are the same. All numbers are little-endian.

    offset 0       "NXRESID1", then zeros up to 4096
    4096           for each tensor, at the next multiple of 4096:
                     codes   n_in rows of 64 * ceil(n_out / 128) bytes
                     scales  n_out float32
    table          (at the next multiple of 4096) u32 length and bytes of the fingerprint of the
                   model that the residuals were made for; then for each tensor
                     u32 length and bytes of its name, u32 n_in, u32 n_out, u64 offset,
                     u64 XXH3 of codes and scales
    last 40 bytes  u64 offset of the table, u64 its bytes, u64 XXH3 of it, u64 tensors, "NXRESID1"

The order of the table is that of the file; there is nothing between the parts but padding. What a
code means is in native/include/nexus_residual.h. Knows nothing of models beyond names and sizes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import xxhash

from nexus_ext.errors import FormatError, ReadFailed, UsageError
from nexus_ext.formats.file_read import FileReader
from nexus_ext.formats.new_file import NewFile
from nexus_ext.formats.nxf_file import NxfFile, is_nxf, read_nxf
from nexus_ext.formats.nxf_reader import NxfReader
from nexus_ext.types import Catalog

SECTION = "residuals"

MAGIC = b"NXRESID1"
ALIGNMENT = 4096
LINE_OUTPUTS, LINE_NBYTES = 128, 64
MAX_NAME_NBYTES = 63
MAX_TABLE_NBYTES = 64 << 20
_FOOTER = struct.Struct("<QQQQ8s")
_ENTRY = struct.Struct("<IIQQ")
_U32 = struct.Struct("<I")
_MAX_CHANNELS = 2**31 - 1


def row_nbytes(n_out: int) -> int:
    """Return the bytes that one input channel takes."""
    return -(-n_out // LINE_OUTPUTS) * LINE_NBYTES


@dataclass(frozen=True, slots=True)
class StoredResidual:
    """Where the residual of one matrix is."""

    name: str
    n_in: int
    n_out: int
    offset: int
    hash: int

    @property
    def codes_nbytes(self) -> int:
        return self.n_in * row_nbytes(self.n_out)

    @property
    def nbytes(self) -> int:
        return self.codes_nbytes + 4 * self.n_out


@dataclass(frozen=True, slots=True)
class ResidualTable:
    """What a sidecar or a section holds."""

    path: str  # of the sidecar, or of the NXF
    fingerprint: str  # names the quantized model, see runtime/residual.py
    tensors: tuple[StoredResidual, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that all residuals take in memory."""
        return sum(t.nbytes for t in self.tensors)


def _padded(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def write_residuals(
    path: str,
    fingerprint: str,
    residuals: Iterable[tuple[str, Any, Any]],
    *,
    expected_nbytes: int,
    overwrite: bool = False,
) -> ResidualTable:
    """Write (name, codes, scales) as they come; codes uint8 (n_in, row), scales float32 (n_out,).

    Raises UsageError or WriteFailed.
    """
    with NewFile(path, expected_nbytes=expected_nbytes, overwrite=overwrite) as file:
        file.write(MAGIC)
        file.pad(ALIGNMENT)
        stored = []
        for name, codes, scales in residuals:
            offset = file.nbytes
            digest = xxhash.xxh3_64(codes.tobytes())
            digest.update(scales.tobytes())
            file.write(codes.tobytes())
            file.write(scales.tobytes())
            file.pad(ALIGNMENT)
            entry = StoredResidual(name, len(codes), len(scales), offset, digest.intdigest())
            stored.append(entry)
        table = [_U32.pack(len(fingerprint)), fingerprint.encode("ascii")]
        for t in stored:
            raw = t.name.encode()
            table += [_U32.pack(len(raw)), raw, _ENTRY.pack(t.n_in, t.n_out, t.offset, t.hash)]
        encoded = b"".join(table)
        at = file.nbytes
        file.write(encoded)
        file.write(
            _FOOTER.pack(at, len(encoded), xxhash.xxh3_64(encoded).intdigest(), len(stored), MAGIC)
        )
        file.commit()
    return ResidualTable(path, fingerprint, tuple(stored))


def read_residuals(path: str | os.PathLike[str]) -> ResidualTable:
    """Read the table of a sidecar, or of an NXF with residuals; reads no residual.

    Raises FormatError or ReadFailed, and UsageError for an NXF without residuals.
    """
    path = os.fspath(path)
    with _opened(path) as (nbytes, read):
        if nbytes < ALIGNMENT + _FOOTER.size or read(0, len(MAGIC)) != MAGIC:
            raise _bad(path, "is no file of residuals")
        footer = read(nbytes - _FOOTER.size, _FOOTER.size)
        at, table_nbytes, digest, count, magic = _FOOTER.unpack(footer)
        if magic != MAGIC or at + table_nbytes + _FOOTER.size != nbytes:
            raise _bad(path, "was cut off or is damaged at its end")
        if table_nbytes > MAX_TABLE_NBYTES:
            raise _bad(path, f"has a table of {table_nbytes} bytes, the most is 64 MiB")
        table = read(at, table_nbytes)
    if xxhash.xxh3_64(table).intdigest() != digest:
        raise _bad(path, "has a table that is not what was written")
    return _parsed(path, table, count, at)


def holds_residuals(catalog: Catalog) -> bool:
    """Tell whether the file of an open model holds residuals."""
    return catalog.chunks is not None and SECTION in catalog.chunks.summary().sections


def has_residuals(path: str | os.PathLike[str]) -> bool:
    """Tell whether the file at `path` is an NXF that holds residuals."""
    if not is_nxf(path):
        return False
    return any(section.name == SECTION for section in _header(os.fspath(path)).nxf.sections)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[int, Callable[[int, int], bytes]]]:
    """Yield how many bytes there are, and what reads them: (offset, bytes)."""
    with contextlib.ExitStack() as stack:
        if is_nxf(path):
            if not has_residuals(path):
                raise UsageError(
                    f"{path}: has no section {SECTION!r}",
                    hint="make an NXF with residuals: nexus quantize --residual -o model.nxf",
                )
            reader = stack.enter_context(NxfReader(_header(path)))
            section = next(s for s in reader.file.nxf.sections if s.name == SECTION)
            yield section.nbytes, lambda at, nbytes: reader.read(section, at, nbytes)
            return
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise FormatError(f"{path}: is not a regular file", hint="name a .nxr file")
        except OSError as error:
            raise _read_failed(path, error) from error
        file = stack.enter_context(contextlib.closing(FileReader(path)))
        yield file.nbytes, lambda at, nbytes: bytes(file.view(at, nbytes))


def _header(path: str) -> NxfFile:
    found = os.stat(path)
    return _read_header(path, (found.st_size, found.st_mtime_ns, found.st_ino))


@functools.lru_cache(maxsize=1)
def _read_header(path: str, token: tuple[int, int, int]) -> NxfFile:
    """Read an NXF's header: once, not for every matrix whose residual is read."""
    return read_nxf(path)


def _parsed(path: str, table: bytes, count: int, end: int) -> ResidualTable:
    place = 0

    def take(n: int) -> bytes:
        nonlocal place
        if n > len(table) - place:
            raise _bad(path, f"has a table that ends at byte {len(table)} of at least {place + n}")
        place += n
        return table[place - n : place]

    def text(limit: int, what: str) -> str:
        (n,) = _U32.unpack(take(_U32.size))
        if not 1 <= n <= limit:
            raise _bad(path, f"has {what} of {n} bytes")
        try:
            return take(n).decode()
        except UnicodeDecodeError:
            raise _bad(path, f"has {what} that is no UTF-8") from None

    fingerprint = text(64, "a fingerprint")
    if count * (_U32.size + 1 + _ENTRY.size) > len(table):
        raise _bad(path, f"says that it holds {count} tensors, which its table has no room for")
    tensors, names, expected = [], set(), ALIGNMENT
    for _ in range(count):
        name = text(MAX_NAME_NBYTES, "a name")
        stored = StoredResidual(name, *_ENTRY.unpack(take(_ENTRY.size)))
        if name in names:
            raise _bad(path, f"has the tensor {name!r} twice")
        names.add(name)
        if not (1 <= stored.n_in <= _MAX_CHANNELS and 1 <= stored.n_out <= _MAX_CHANNELS):
            raise _bad(path, f"has a matrix {name!r} of {stored.n_in} to {stored.n_out} channels")
        if stored.offset != expected:
            raise _bad(path, f"has {name!r} at byte {stored.offset}, which belongs at {expected}")
        expected = _padded(stored.offset + stored.nbytes)
        if expected > end:
            raise _bad(path, f"has {name!r} reach to byte {expected}, behind the last at {end}")
        tensors.append(stored)
    if place != len(table) or expected != end:
        raise _bad(path, "has bytes that belong to nothing")
    return ResidualTable(path, fingerprint, tuple(tensors))


def read_residual(table: ResidualTable, stored: StoredResidual) -> tuple[bytes, bytes]:
    """Return (codes, scales) of one matrix. FormatError when they are not what was written."""
    with _opened(table.path) as (_, read):
        codes = read(stored.offset, stored.codes_nbytes)
        scales = read(stored.offset + stored.codes_nbytes, 4 * stored.n_out)
    digest = xxhash.xxh3_64(codes)
    digest.update(scales)
    if digest.intdigest() != stored.hash:
        raise _bad(table.path, f"has a residual of {stored.name!r} that is not what was written")
    return codes, scales


def _bad(path: str, what: str) -> FormatError:
    return FormatError(f"{path}: {what}", hint="make it anew with `nexus quantize --residual`")


def _read_failed(path: str, error: OSError) -> ReadFailed:
    return ReadFailed(
        f"{path}: cannot be read: {error.strerror}",
        hint="check that the file exists and that you may read it",
        path=path,
        errno=error.errno or 0,
    )
