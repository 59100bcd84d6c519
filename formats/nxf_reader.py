"""Read what an NXF holds: tensors, experts, rows, sections, each chunk checked before it is used.

Knows chunks and codecs; what tensors mean it does not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import TracebackType

import xxhash

from nexus_ext.codecs import RAW, Codecs, builtin
from nexus_ext.errors import Damaged, FormatError, UsageError
from nexus_ext.formats.file_read import FileReader, Mode
from nexus_ext.formats.nxf_check import describe_chunk
from nexus_ext.formats.nxf_file import NxfFile, read_nxf
from nexus_ext.formats.nxf_header import Extent, Section


class NxfReader:
    """An open NXF. Not for several threads at once: open one each, they share `file`."""

    def __init__(
        self,
        file: str | os.PathLike[str] | NxfFile,
        *,
        mode: Mode = "buffered",
        codecs: Codecs | None = None,
    ) -> None:
        """Open the files of `file`; codecs are those of nexus_ext unless given.

        Raises FormatError for a file that breaks the format, ReadFailed for one that cannot be
        read.
        """
        self.file = file if isinstance(file, NxfFile) else read_nxf(os.fspath(file))
        self._codecs = codecs or builtin()
        self._tensors = {tensor.name: tensor for tensor in self.file.nxf.tensors}
        self._sections = {section.name: section for section in self.file.nxf.sections}
        self._files: list[FileReader] = []
        self._buffer = bytearray()
        self._last: tuple[int, memoryview] | None = None  # the chunk that was asked for before
        try:
            for path in self.file.paths:
                self._files.append(FileReader(path, mode))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> NxfReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
        self._files = []

    def stored(self, index: int) -> memoryview:
        """Return the stored bytes of a chunk; Damaged if they are not those that were written.

        Valid until the next call.
        """
        entry = self.file.table[index]
        shard, offset, nbytes = (int(entry[k]) for k in ("shard", "offset", "stored"))
        self._last = None
        if len(self._buffer) < nbytes:
            self._buffer = bytearray(nbytes)
        view = self._files[shard].view(offset, nbytes, self._buffer)
        found = xxhash.xxh3_64_intdigest(view)
        if found != int(entry["hash"]):
            raise self.damaged(index, f"the hash is {found:016x}, not {int(entry['hash']):016x}")
        return view

    def codec_of(self, index: int) -> str:
        """Return the name of the codec of a chunk."""
        return self.file.nxf.codecs[int(self.file.table["codec"][index])]

    def chunk(self, index: int) -> memoryview:
        """Return a chunk, decoded. Valid until the next call for another.

        Raises Damaged, and UsageError for a codec that is not known.
        """
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        self._last = None
        stored = self.stored(index)
        codec = self.codec_of(index)
        if codec != RAW:
            out = memoryview(bytearray(int(self.file.table["raw"][index])))
            try:
                self._codecs.get(codec).decode(stored, out)
            except FormatError as error:
                raise self.damaged(index, str(error)) from error
            stored = out
        self._last = (index, stored)
        return stored

    def read(self, item: Extent | Section, start: int, nbytes: int) -> bytes:
        """Return decoded bytes of a tensor, a rest or a section."""
        if start < 0 or nbytes < 0 or start + nbytes > item.nbytes:
            raise UsageError(
                f"{item.name or 'a rest'}: bytes {start} to {start + nbytes} are not in its "
                f"{item.nbytes}"
            )
        pieces = []
        while nbytes:
            matrix, inside = divmod(start, item.matrix_nbytes)
            number, skip = divmod(inside, item.chunk_nbytes)
            chunk = self.chunk(item.first_chunk + matrix * item.per_matrix + number)
            piece = bytes(chunk[skip : skip + nbytes])
            pieces.append(piece)
            start += len(piece)
            nbytes -= len(piece)
        return b"".join(pieces)

    def pieces(self, item: Extent | Section) -> Iterator[memoryview]:
        """Yield all chunks of a tensor, a rest or a section, decoded, in order."""
        for index in range(item.first_chunk, item.first_chunk + item.n_chunks):
            yield self.chunk(index)

    def tensor(self, name: str) -> bytes:
        """Return a whole tensor."""
        extent = self._tensor(name)
        return self.read(extent, 0, extent.nbytes)

    def part(self, name: str, start: int, nbytes: int) -> bytes:
        """Return some bytes of a tensor."""
        return self.read(self._tensor(name), start, nbytes)

    def expert(self, name: str, expert: int) -> bytes:
        """Return the matrix of one expert of a tensor that is stored by expert."""
        extent = self._tensor(name)
        if not 0 <= expert < extent.n_matrices:
            raise UsageError(f"{name}: has {extent.n_matrices} experts, {expert} is none of them")
        return self.read(extent, expert * extent.matrix_nbytes, extent.matrix_nbytes)

    def section(self, name: str) -> bytes:
        """Return a section; UsageError if the file has none of this name."""
        section = self._sections.get(name)
        if section is None:
            raise UsageError(f"{self.file.path}: has no section {name!r}")
        return self.read(section, 0, section.nbytes)

    def _tensor(self, name: str) -> Extent:
        extent = self._tensors.get(name)
        if extent is None:
            raise UsageError(f"{self.file.path}: has no tensor {name!r}")
        return extent

    def damaged(self, index: int, what: str) -> Damaged:
        """Return the error that names a chunk and where it is."""
        entry = self.file.table[index]
        item = next(
            item
            for item in self.file.nxf.items
            if item.first_chunk <= index < item.first_chunk + item.n_chunks
        )
        path, offset = self.file.paths[int(entry["shard"])], int(entry["offset"])
        return Damaged(
            f"{path}: at byte {offset}, {int(entry['stored'])} bytes: "
            f"{describe_chunk(self.file.nxf, index)} is damaged: {what}",
            hint="Download or convert the file again.",
            path=path,
            item=item.name,
            chunk=index - item.first_chunk,
            offset=offset,
        )
