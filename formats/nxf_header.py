"""The header of an NXF file as values, and as bytes: see SPEC.md.

Knows the encoding only: what must hold between the values is checked in `nxf_check`, what they
mean for a model in `nxf`.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from nexus_ext.errors import FormatError
from nexus_ext.formats.strict_json import Fields, parse_object

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Table = npt.NDArray[np.void]

MAGIC: Final = b"NXF2\r\n\x1a\n"
DRAFT_MAGIC: Final = b"NXF2part"
VERSION: Final = 2
ALIGNMENT: Final = 16384  # of extents in the files that this package writes
# magic, version, flags, bytes of the header, of the descriptor, chunks, bytes of the file, 0, hash
PREAMBLE: Final = struct.Struct("<8sIIQQQQQQ")
ENTRY_NBYTES: Final = 32
# What a chunk's entry holds; numpy is imported late, so that the fields are named here as text.
ENTRY_FIELDS: Final = (
    ("offset", "<u8"),
    ("hash", "<u8"),
    ("stored", "<u4"),
    ("raw", "<u4"),
    ("shard", "<u2"),
    ("codec", "<u2"),
    ("zero", "<u4"),
)

MAX_HEADER_NBYTES: Final = 1 << 30
MAX_DESCRIPTOR_NBYTES: Final = 64 << 20
MAX_CHUNKS: Final = 1 << 24
MAX_CHUNK_NBYTES: Final = 64 << 20
MIN_ALIGNMENT, MAX_ALIGNMENT = 4096, 1 << 20
MAX_FILES: Final = 0xFFFF  # as many as a split GGUF can have
MAX_TENSORS: Final = 1 << 18
MAX_MATRICES: Final = 1 << 16
MAX_SHARDS: Final = 4096
MAX_CODECS: Final = 64
MAX_SECTIONS: Final = 1024
MAX_FEATURES: Final = 256
MAX_TEXT: Final = 255  # characters of every name
MAX_OFFSET: Final = 2**63 - 1

NO_SHA256: Final = "0" * 64


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A GGUF file that this file gives back byte for byte."""

    name: str
    nbytes: int
    header: bytes = field(repr=False)  # everything before its weights
    sha256: str = NO_SHA256  # of the whole file; NO_SHA256: not recorded


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a source file, and how they are cut into chunks.

    A tensor; or, without a name, bytes outside of header and tensors that are not all zero.
    """

    name: str
    file: int
    offset: int
    nbytes: int
    n_matrices: int
    chunk_nbytes: int
    first_chunk: int

    @property
    def matrix_nbytes(self) -> int:
        return self.nbytes // self.n_matrices

    @property
    def per_matrix(self) -> int:
        return -(-self.matrix_nbytes // self.chunk_nbytes)

    @property
    def n_chunks(self) -> int:
        return self.n_matrices * self.per_matrix


@dataclass(frozen=True, slots=True)
class Section:
    """Named bytes beside the model: see the registry in SPEC.md."""

    name: str
    nbytes: int
    chunk_nbytes: int
    first_chunk: int

    @property
    def matrix_nbytes(self) -> int:
        return self.nbytes

    @property
    def per_matrix(self) -> int:
        return -(-self.nbytes // self.chunk_nbytes)

    @property
    def n_chunks(self) -> int:
        return self.per_matrix


@dataclass(frozen=True, slots=True)
class Shard:
    """A file that carries chunks of the set whose first file has the header."""

    name: str
    nbytes: int
    header_hash: int


@dataclass(frozen=True, slots=True)
class Nxf:
    """Everything that the header of an NXF says."""

    requires: tuple[str, ...]
    uses: tuple[str, ...]
    writer: str
    alignment: int
    codecs: tuple[str, ...]
    files: tuple[SourceFile, ...]
    tensors: tuple[Extent, ...]
    rests: tuple[Extent, ...]
    groups: tuple[tuple[int, ...], ...]  # numbers of tensors whose matrices make one record
    sections: tuple[Section, ...]
    shards: tuple[Shard, ...]  # without the first file

    @property
    def items(self) -> tuple[Extent | Section, ...]:
        """Everything that is cut into chunks, in the order of their numbers."""
        return (*self.tensors, *self.rests, *self.sections)

    @property
    def n_chunks(self) -> int:
        return sum(item.n_chunks for item in self.items)


def entry_dtype() -> np.dtype[Any]:
    """Return the type of the entries of the chunk table."""
    import numpy as np

    return np.dtype(list(ENTRY_FIELDS))


def padded(nbytes: int, alignment: int) -> int:
    """Round up to a multiple."""
    return -(-nbytes // alignment) * alignment


def encode_descriptor(nxf: Nxf) -> bytes:
    """Return the descriptor; its length does not depend on hashes and sizes of shards."""
    value = {
        "requires": nxf.requires,
        "uses": nxf.uses,
        "writer": nxf.writer,
        "alignment": nxf.alignment,
        "codecs": nxf.codecs,
        "files": [
            {"name": f.name, "nbytes": f.nbytes, "header_nbytes": len(f.header), "sha256": f.sha256}
            for f in nxf.files
        ],
        "tensors": [{"name": t.name, **_extent(t)} for t in nxf.tensors],
        "rests": [_extent(r) for r in nxf.rests],
        "groups": nxf.groups,
        "sections": [
            {"name": s.name, "nbytes": s.nbytes, "chunk": s.chunk_nbytes, "first": s.first_chunk}
            for s in nxf.sections
        ],
        "shards": [
            {"name": s.name, "nbytes": f"{s.nbytes:016x}", "header_hash": f"{s.header_hash:016x}"}
            for s in nxf.shards
        ],
    }
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode()


def _extent(extent: Extent) -> dict[str, int]:
    return {
        "file": extent.file,
        "offset": extent.offset,
        "nbytes": extent.nbytes,
        "matrices": extent.n_matrices,
        "chunk": extent.chunk_nbytes,
        "first": extent.first_chunk,
    }


def decode_descriptor(path: str, encoded: bytes) -> tuple[Nxf, list[int]]:
    """Return what the descriptor says, without GGUF headers, and the sizes of those."""
    fields = parse_object(f"{path}: the descriptor", encoded)
    if "shard" in fields:
        number = Fields(f"{path}: shard", fields.get("shard")).number("index", 1, MAX_SHARDS)
        raise FormatError(
            f"{path}: is shard {number} of a model, which has no header of its own",
            hint="Name the first file of the model, the one without a number.",
        )
    files: list[SourceFile] = []
    sizes: list[int] = []
    for each in fields.objects("files", MAX_FILES):
        nbytes = each.number("nbytes", 0, MAX_OFFSET)
        sizes.append(each.number("header_nbytes", 24, nbytes))
        name = each.text("name", MAX_TEXT)
        files.append(SourceFile(name, nbytes, b"", each.hexadecimal("sha256", 64)))
    nxf = Nxf(
        requires=fields.texts("requires", MAX_FEATURES, MAX_TEXT),
        uses=fields.texts("uses", MAX_FEATURES, MAX_TEXT),
        writer=fields.text("writer", MAX_TEXT),
        alignment=fields.number("alignment", MIN_ALIGNMENT, MAX_ALIGNMENT),
        codecs=fields.texts("codecs", MAX_CODECS, MAX_TEXT),
        files=tuple(files),
        tensors=tuple(
            _read_extent(each, each.text("name", MAX_TEXT), len(files))
            for each in fields.objects("tensors", MAX_TENSORS)
        ),
        rests=tuple(
            _read_extent(each, "", len(files)) for each in fields.objects("rests", MAX_TENSORS)
        ),
        groups=tuple(_read_groups(fields)),
        sections=tuple(_read_section(each) for each in fields.objects("sections", MAX_SECTIONS)),
        shards=tuple(_read_shard(each) for each in fields.objects("shards", MAX_SHARDS)),
    )
    return nxf, sizes


def _read_extent(fields: Fields, name: str, n_files: int) -> Extent:
    nbytes = fields.number("nbytes", 1, MAX_OFFSET)
    n_matrices = fields.number("matrices", 1, min(MAX_MATRICES, nbytes))
    if nbytes % n_matrices:
        raise fields.error("matrices", f"is {n_matrices}, which does not divide {nbytes} bytes")
    return Extent(
        name=name,
        file=fields.number("file", 0, n_files - 1),
        offset=fields.number("offset", 0, MAX_OFFSET),
        nbytes=nbytes,
        n_matrices=n_matrices,
        chunk_nbytes=fields.number("chunk", 1, MAX_CHUNK_NBYTES),
        first_chunk=fields.number("first", 0, MAX_CHUNKS),
    )


def _read_groups(fields: Fields) -> list[tuple[int, ...]]:
    groups = []
    for group in fields.array("groups", MAX_TENSORS):
        if not isinstance(group, list) or not all(type(number) is int for number in group):
            raise fields.error("groups", "holds something else than arrays of numbers of tensors")
        groups.append(tuple(group))
    return groups


def _read_section(fields: Fields) -> Section:
    return Section(
        name=fields.text("name", MAX_TEXT),
        nbytes=fields.number("nbytes", 1, MAX_OFFSET),
        chunk_nbytes=fields.number("chunk", 1, MAX_CHUNK_NBYTES),
        first_chunk=fields.number("first", 0, MAX_CHUNKS),
    )


def _read_shard(fields: Fields) -> Shard:
    return Shard(
        name=fields.text("name", MAX_TEXT),
        nbytes=int(fields.hexadecimal("nbytes", 16), 16),
        header_hash=int(fields.hexadecimal("header_hash", 16), 16),
    )


def header_nbytes(descriptor_nbytes: int, gguf_nbytes: int, n_chunks: int, alignment: int) -> int:
    """Return the bytes of a header with its padding."""
    table = padded(PREAMBLE.size + descriptor_nbytes + gguf_nbytes, ENTRY_NBYTES)
    return padded(table + n_chunks * ENTRY_NBYTES, alignment)
