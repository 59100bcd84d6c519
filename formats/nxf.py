"""Open an NXF model as a `Catalog`: the same values as of the GGUF that it was made of.

Reads headers only. The tensors of an NXF are those of the GGUF headers that it holds; this module
checks that both say the same, and answers where the chunks of a tensor are.
"""

from __future__ import annotations

import os
from dataclasses import replace

from nexus_ext.errors import FormatError
from nexus_ext.formats.gguf import catalog_of
from nexus_ext.formats.gguf_header import parse_header
from nexus_ext.formats.nxf_file import NxfFile, read_nxf
from nexus_ext.formats.nxf_header import NO_SHA256
from nexus_ext.types import Catalog, Chunk, ChunkSummary, FileInfo, TensorChunks


class NxfChunks:
    """The chunk table of an open NXF, by tensor."""

    def __init__(self, file: NxfFile) -> None:
        self.file = file
        self._numbers = {tensor.name: i for i, tensor in enumerate(file.nxf.tensors)}

    def chunks_of(self, tensor: str) -> TensorChunks:
        """Return the chunks of a tensor; KeyError for a name that the model does not have."""
        extent = self.file.nxf.tensors[self._numbers[tensor]]
        entries = self.file.table[extent.first_chunk : extent.first_chunk + extent.n_chunks]
        codecs = self.file.nxf.codecs
        return TensorChunks(
            n_matrices=extent.n_matrices,
            matrix_nbytes=extent.matrix_nbytes,
            chunk_nbytes=extent.chunk_nbytes,
            chunks=tuple(
                Chunk(shard, offset, stored, raw, codecs[codec], hash_)
                for offset, hash_, stored, raw, shard, codec, _ in entries.tolist()
            ),
        )

    def summary(self) -> ChunkSummary:
        """Return what the header says of all chunks."""
        nxf, table = self.file.nxf, self.file.table
        counts = {name: int((table["codec"] == i).sum()) for i, name in enumerate(nxf.codecs)}
        return ChunkSummary(
            writer=nxf.writer,
            sources=tuple((f.name, "" if f.sha256 == NO_SHA256 else f.sha256) for f in nxf.files),
            raw_nbytes=int(table["raw"].sum(dtype="u8")),
            stored_nbytes=int(table["stored"].sum(dtype="u8")),
            chunks_by_codec={name: count for name, count in counts.items() if count},
            n_groups=len(nxf.groups),
            n_records=sum(nxf.tensors[group[0]].n_matrices for group in nxf.groups),
            sections={section.name: section.nbytes for section in nxf.sections},
        )

    def record_groups(self) -> tuple[tuple[str, ...], ...]:
        """Return the groups of tensors whose experts are stored together, in stored order."""
        tensors = self.file.nxf.tensors
        return tuple(tuple(tensors[number].name for number in g) for g in self.file.nxf.groups)


def open_nxf(path: str | os.PathLike[str]) -> Catalog:
    """Read the header of the NXF model at `path`, and those of its shards.

    Raises FormatError for a file that breaks the format, ReadFailed for one that cannot be read.
    """
    return catalog_of_nxf(read_nxf(os.fspath(path)))


def catalog_of_nxf(file: NxfFile) -> Catalog:
    """Return the catalog of an NXF whose header was read."""
    nxf = file.nxf
    if not nxf.files:
        raise FormatError(f"{file.path}: holds no model", hint="It may hold sections alone.")
    headers = [
        parse_header(f"{file.path}: {source.name}", source.header, source.nbytes)
        for source in nxf.files
    ]
    catalog = catalog_of(headers)
    expected = [(t.name, t.file, t.offset, t.nbytes) for t in catalog.tensors]
    found = [(t.name, t.file, t.offset, t.nbytes) for t in nxf.tensors]
    if expected != found:
        wrong = next((a for a in found if a not in set(expected)), found[:1] or expected[:1])
        raise FormatError(f"{file.path}: the GGUF header does not have the tensor {wrong}")
    for header, source in zip(headers, nxf.files, strict=True):
        if header.encoded != source.header:
            raise FormatError(f"{file.path}: {source.name} has bytes behind its header")
    for tensor, extent in zip(catalog.tensors, nxf.tensors, strict=True):
        if extent.n_matrices not in (1, tensor.n_experts):
            raise FormatError(
                f"{file.path}: {tensor.name!r} is stored as {extent.n_matrices} matrices and has "
                f"{tensor.n_experts} experts"
            )
    places = [file.table[t.first_chunk] for t in nxf.tensors]
    return replace(
        catalog,
        files=tuple(FileInfo(p, n) for p, n in zip(file.paths, file.sizes, strict=True)),
        tensors=tuple(
            replace(tensor, file=int(place["shard"]), offset=int(place["offset"]))
            for tensor, place in zip(catalog.tensors, places, strict=True)
        ),
        container="nxf",
        chunks=NxfChunks(file),
    )
