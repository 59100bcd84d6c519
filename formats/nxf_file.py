"""Read the header of an NXF file, or of a set of shards, and check it whole.

The order is that of SPEC.md, "Reading": sizes against the file, then the hash, and only then what
the bytes say, so that nothing is sized by a number that damage could have made.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import xxhash

from nexus_ext.errors import FormatError, ModelChanged, ReadFailed
from nexus_ext.formats.nxf_check import check_nxf, is_plain_name
from nexus_ext.formats.nxf_header import (
    DRAFT_MAGIC,
    ENTRY_NBYTES,
    MAGIC,
    MAX_CHUNKS,
    MAX_DESCRIPTOR_NBYTES,
    MAX_HEADER_NBYTES,
    PREAMBLE,
    VERSION,
    Nxf,
    Shard,
    decode_descriptor,
    entry_dtype,
    header_nbytes,
)
from nexus_ext.formats.strict_json import Fields, parse_object

if TYPE_CHECKING:
    from nexus_ext.formats.nxf_header import Table

_PIECE_NBYTES: Final = 1 << 20
_MAX_CARRIER_NBYTES: Final = 1 << 16  # of the descriptor of a shard


@dataclass(frozen=True, slots=True)
class NxfFile:
    """An NXF whose header was read and checked: nothing of its chunks was."""

    path: str
    nxf: Nxf
    table: Table  # one entry a chunk: nxf_header.ENTRY_FIELDS
    header_nbytes: int
    paths: tuple[str, ...]  # of this file and of its shards
    sizes: tuple[int, ...]
    header_sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Preamble:
    header_nbytes: int
    descriptor_nbytes: int
    n_chunks: int
    file_nbytes: int
    hash: int


def read_nxf(path: str) -> NxfFile:
    """Read the header of the NXF at `path`, and those of its shards.

    Raises FormatError for a file that breaks the format, ReadFailed for one that cannot be read.
    """
    with _File(path) as file:
        preamble = file.preamble()
        encoded = file.read(PREAMBLE.size, preamble.descriptor_nbytes)
        nxf, sizes = decode_descriptor(path, encoded)
        at = PREAMBLE.size + preamble.descriptor_nbytes
        expected = header_nbytes(
            preamble.descriptor_nbytes, sum(sizes), preamble.n_chunks, nxf.alignment
        )
        if preamble.header_nbytes != expected:
            raise FormatError(
                f"{path}: the header has {preamble.header_nbytes} bytes, its parts make {expected}"
            )
        headers = []
        for nbytes in sizes:
            headers.append(file.read(at, nbytes))
            at += nbytes
        files = (replace(f, header=h) for f, h in zip(nxf.files, headers, strict=True))
        nxf = replace(nxf, files=tuple(files))
        at += -at % ENTRY_NBYTES
        table = _table(file.read(at, preamble.n_chunks * ENTRY_NBYTES))
        end = at + preamble.n_chunks * ENTRY_NBYTES
        if any(file.read(end, preamble.header_nbytes - end)):
            raise FormatError(f"{path}: the padding from byte {end} on is not zero")
        file_nbytes = file.nbytes
    found = NxfFile(
        path=path,
        nxf=nxf,
        table=table,
        header_nbytes=preamble.header_nbytes,
        paths=(path,),
        sizes=(file_nbytes,),
        header_sizes=(preamble.header_nbytes,),
    )
    found = _with_shards(found)
    check_nxf(path, nxf, table, found.sizes, found.header_sizes)
    return found


def is_nxf(path: str | os.PathLike[str]) -> bool:
    """Tell whether the file at `path` starts as an NXF of any kind or age does."""
    if not os.path.isfile(path):  # before open(), which would wait for the other end of a pipe
        return False
    try:
        with open(path, "rb") as file:
            return file.read(3) == b"NXF"
    except OSError:
        return False


def _with_shards(found: NxfFile) -> NxfFile:
    paths, sizes, header_sizes = [found.path], [found.sizes[0]], [found.header_sizes[0]]
    for index, shard in enumerate(found.nxf.shards, 1):
        path = _shard_path(found.path, shard, found.nxf.shards[: index - 1])
        if not os.path.exists(path):
            raise FormatError(
                f"{found.path}: its shard {index} of {len(found.nxf.shards)}, {path}, is missing",
                hint="Put all files of the model into one directory.",
            )
        with _File(path) as file:
            preamble = file.preamble()
            _check_carrier(file, preamble, index)
            if (preamble.hash, file.nbytes) != (shard.header_hash, shard.nbytes):
                raise FormatError(
                    f"{path}: has {file.nbytes} bytes and the header hash {preamble.hash:016x}, "
                    f"{found.path} was written with a shard of {shard.nbytes} bytes and "
                    f"{shard.header_hash:016x}",
                    hint="The shards are of different models: download them again.",
                )
            paths.append(path)
            sizes.append(file.nbytes)
            header_sizes.append(preamble.header_nbytes)
    return replace(found, paths=tuple(paths), sizes=tuple(sizes), header_sizes=tuple(header_sizes))


def _shard_path(main: str, shard: Shard, before: tuple[Shard, ...]) -> str:
    name = shard.name
    if not is_plain_name(name):
        raise FormatError(f"{main}: the name of a shard is {name!r}, which is no plain file name")
    folder, own = os.path.split(main)
    if name == own or any(name == other.name for other in before):
        raise FormatError(f"{main}: the file {name!r} is in the set of shards twice")
    return os.path.join(folder, name)


def _check_carrier(file: _File, preamble: _Preamble, index: int) -> None:
    if preamble.descriptor_nbytes > _MAX_CARRIER_NBYTES or preamble.n_chunks:
        raise FormatError(f"{file.path}: is no shard: it has a model's header")
    fields = parse_object(
        f"{file.path}: the descriptor", file.read(PREAMBLE.size, preamble.descriptor_nbytes)
    )
    found = Fields(f"{file.path}: shard", fields.get("shard")).number("index", 1, 1 << 16)
    if found != index:
        raise FormatError(f"{file.path}: is shard {found}, the model has it as shard {index}")


def _table(encoded: bytes) -> Table:
    import numpy as np

    return np.frombuffer(encoded, entry_dtype())


class _File:
    """An open file whose size was taken once."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            # Before open(): opening a pipe would wait for its other end.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise FormatError(f"{path}: is not a regular file", hint="Name a model file.")
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._failed(0, error) from error
        self.nbytes = os.fstat(self._descriptor).st_size

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return `nbytes` from `offset` on; the caller has compared them with the size."""
        pieces = []
        while nbytes:
            try:
                piece = os.pread(self._descriptor, min(nbytes, 1 << 30), offset)
            except OSError as error:
                raise self._failed(offset, error) from error
            if not piece:
                raise ModelChanged(
                    f"{self.path}: ended at byte {offset} while it was read",
                    hint="Wait until the file is complete and open it again.",
                    path=self.path,
                    offset=offset,
                )
            pieces.append(piece)
            offset += len(piece)
            nbytes -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def preamble(self) -> _Preamble:
        """Check sizes and the hash of the header."""
        encoded = self.read(0, min(PREAMBLE.size, self.nbytes))
        self._check_magic(encoded)
        if len(encoded) < PREAMBLE.size:
            raise self._cut(PREAMBLE.size)
        _, version, flags, nbytes, descriptor, n_chunks, file_nbytes, zero, hash_ = PREAMBLE.unpack(
            encoded
        )
        if version != VERSION:
            raise FormatError(
                f"{self.path}: is NXF version {version}, this program reads version {VERSION}",
                hint="A newer nexus_ext may read it: pip install -U nexus_ext",
            )
        found = _Preamble(nbytes, descriptor, n_chunks, file_nbytes, hash_)
        least = header_nbytes(found.descriptor_nbytes, 0, found.n_chunks, 1)
        limit = min(MAX_HEADER_NBYTES, self.nbytes)
        if flags or zero:
            raise FormatError(f"{self.path}: reserved fields are {flags} and {zero}, not 0")
        if (
            found.descriptor_nbytes > MAX_DESCRIPTOR_NBYTES
            or found.n_chunks > MAX_CHUNKS
            or found.header_nbytes > MAX_HEADER_NBYTES
            or found.header_nbytes < least
        ):
            raise FormatError(
                f"{self.path}: at byte 16: a header of {found.header_nbytes} bytes with a "
                f"descriptor of {found.descriptor_nbytes} and {found.n_chunks} chunks; the limits "
                f"are {MAX_HEADER_NBYTES}, {MAX_DESCRIPTOR_NBYTES} and {MAX_CHUNKS}"
            )
        if found.header_nbytes > limit:
            raise self._cut(found.header_nbytes)
        self._check_hash(encoded, found)
        if found.file_nbytes != self.nbytes:
            raise self._cut(found.file_nbytes)
        return found

    def _check_magic(self, encoded: bytes) -> None:
        magic = encoded[:8]
        if magic == DRAFT_MAGIC:
            raise FormatError(
                f"{self.path}: is unfinished: the program that wrote it was stopped",
                hint="Run the conversion again, it goes on where it stopped.",
            )
        if magic[:4] == b"NXF1":
            raise FormatError(
                f"{self.path}: is an NXF of version 1, which holds no tokenizer and whose weights "
                "cannot be decoded right",
                hint="Convert the model again from its GGUF: nexus convert model.gguf model.nxf",
            )
        if magic[:4] == b"NXF2" and len(magic) == 8 and magic != MAGIC:
            raise FormatError(
                f"{self.path}: the magic is {magic!r}, not {MAGIC!r}: the file was damaged, "
                "perhaps by a transfer as text",
                hint="Download it again, as a binary file.",
            )
        if magic != MAGIC[: len(magic)] or not magic:
            raise FormatError(
                f"{self.path}: at byte 0: the magic is {magic!r}, not {MAGIC!r}",
                hint="Not an NXF file.",
            )

    def _check_hash(self, encoded: bytes, preamble: _Preamble) -> None:
        # Without keeping what is read: until the hash is right, its size means nothing.
        digest = xxhash.xxh3_64(encoded[: PREAMBLE.size - 8] + bytes(8))
        at = PREAMBLE.size
        while at < preamble.header_nbytes:
            piece = self.read(at, min(_PIECE_NBYTES, preamble.header_nbytes - at))
            digest.update(piece)
            at += len(piece)
        if digest.intdigest() != preamble.hash:
            raise FormatError(
                f"{self.path}: the header, bytes 0 to {preamble.header_nbytes}, is damaged: its "
                f"hash is {digest.intdigest():016x}, it should be {preamble.hash:016x}",
                hint="Download or convert the file again.",
            )

    def _cut(self, expected: int) -> FormatError:
        return FormatError(
            f"{self.path}: has {self.nbytes} bytes, {expected} are expected",
            hint="The file was cut off or has something at its end: download it again.",
        )

    def _failed(self, offset: int, error: OSError) -> ReadFailed:
        return ReadFailed(
            f"{self.path}: cannot be read at byte {offset}: {error.strerror}",
            hint="Check that the file exists and that you may read it.",
            path=self.path,
            offset=offset,
            errno=error.errno or 0,
        )
