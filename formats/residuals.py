"""A sidecar of residuals: what quantization lost of each matrix, at four bits.

It lies beside a GGUF, as `model.gguf.nxr`. All numbers are little-endian.

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

import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import xxhash

from nexus_ext.errors import FormatError, ReadFailed
from nexus_ext.formats.new_file import NewFile

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
    """What a sidecar holds."""

    path: str
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
    """Read the table of a sidecar. Raises FormatError or ReadFailed; reads no residual."""
    path = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FormatError(f"{path}: is not a regular file", hint="name a .nxr file")
        with open(path, "rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            if nbytes < ALIGNMENT + _FOOTER.size or file.read(len(MAGIC)) != MAGIC:
                raise _bad(path, "is no file of residuals")
            file.seek(nbytes - _FOOTER.size)
            at, table_nbytes, digest, count, magic = _FOOTER.unpack(file.read(_FOOTER.size))
            if magic != MAGIC or at + table_nbytes + _FOOTER.size != nbytes:
                raise _bad(path, "was cut off or is damaged at its end")
            if table_nbytes > MAX_TABLE_NBYTES:
                raise _bad(path, f"has a table of {table_nbytes} bytes, the most is 64 MiB")
            file.seek(at)
            table = file.read(table_nbytes)
    except OSError as error:
        raise _read_failed(path, error) from error
    if xxhash.xxh3_64(table).intdigest() != digest:
        raise _bad(path, "has a table that is not what was written")
    return _parsed(path, table, count, at)


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
    try:
        with open(table.path, "rb") as file:
            file.seek(stored.offset)
            codes, scales = file.read(stored.codes_nbytes), file.read(4 * stored.n_out)
    except OSError as error:
        raise _read_failed(table.path, error) from error
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
