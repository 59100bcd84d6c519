"""Models as bytes, whatever container they are in: what converters and `diff` read from.

The items of a source are tensors in header order, then the rests (bytes that are neither header nor
tensor nor zero), then sections.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from typing import Final, Protocol

from nexus_ext.codecs import RAW, Codecs
from nexus_ext.errors import FormatError
from nexus_ext.formats import is_other, open_model
from nexus_ext.formats.file_read import Buffer, FileReader, Mode, is_cold
from nexus_ext.formats.foreign import ForeignSource
from nexus_ext.formats.gguf import catalog_of, read_parts
from nexus_ext.formats.gguf_header import Header
from nexus_ext.formats.new_file import DIRECT_FROM_NBYTES
from nexus_ext.formats.nxf import catalog_of_nxf
from nexus_ext.formats.nxf_check import plain_name
from nexus_ext.formats.nxf_file import is_nxf, read_nxf
from nexus_ext.formats.nxf_header import MAX_TENSORS, SourceFile
from nexus_ext.formats.nxf_reader import NxfReader
from nexus_ext.types import Catalog

PIECE_NBYTES: Final = 1 << 20


class Source(Protocol):
    """A model that is open for reading. Several threads may read at once."""

    path: str
    catalog: Catalog  # tensors have the places that they have in the GGUF files
    files: tuple[SourceFile, ...]
    rests: tuple[tuple[int, int, int], ...]  # (file, offset, bytes)
    sections: dict[str, int]  # name -> bytes

    def read(self, item: int, offset: int, nbytes: int, buffer: Buffer) -> memoryview:
        """Return bytes of an item, decoded; they may lie in `buffer`, which has room for them."""
        ...

    def token(self) -> bytes:
        """Return what changes when the files do."""
        ...

    def codecs_by_tensor(self) -> Mapping[str, str]:
        """Return how each tensor is stored."""
        ...

    def close(self) -> None: ...


def open_source(path: str | os.PathLike[str], codecs: Codecs | None = None) -> Source:
    """Open a model in any container; raises what `open_model` raises."""
    path = os.fspath(path)
    if is_nxf(path):
        return NxfSource(path, codecs)
    if is_other(path):
        catalog = open_model(path)
        if catalog.container != "gguf":
            return ForeignSource(path, catalog)
    return GgufSource(path)


class GgufSource:
    """A GGUF, whole or split."""

    def __init__(self, path: str) -> None:
        headers = read_parts(path)
        self.path = path
        self.catalog = catalog_of(headers)
        names = [plain_name(os.path.basename(header.path)) for header in headers]
        self.files = tuple(
            SourceFile(name, header.file_nbytes, header.encoded)
            for name, header in zip(names, headers, strict=True)
        )
        self.sections: dict[str, int] = {}
        self._files = [FileReader(h.path) for h in headers]
        self.rests = tuple(
            (index, start, end - start)
            for index, header in enumerate(headers)
            for start, end in find_rests(header, self._files[index])
        )
        if len(self.rests) > MAX_TENSORS:
            raise FormatError(f"{path}: {len(self.rests)} runs of bytes belong to no tensor")

    def read(self, item: int, offset: int, nbytes: int, buffer: Buffer) -> memoryview:
        tensors = self.catalog.tensors
        if item < len(tensors):
            file, start = tensors[item].file, tensors[item].offset
        else:
            file, start, _ = self.rests[item - len(tensors)]
        return self._files[file].view(start + offset, nbytes, buffer)

    def read_past_the_cache(self) -> None:
        """Read directly what is not in the page cache anyway, from the next read on."""
        for number, file in enumerate(self._files):
            if file.nbytes >= DIRECT_FROM_NBYTES and is_cold(file.path):
                self._files[number] = FileReader(file.path, "direct")
                file.close()

    def token(self) -> bytes:
        return _token([file.path for file in self.catalog.files])

    def codecs_by_tensor(self) -> Mapping[str, str]:
        return dict.fromkeys((t.name for t in self.catalog.tensors), RAW)

    def close(self) -> None:
        for file in self._files:
            file.close()


class NxfSource:
    """An NXF; threads get a reader each."""

    def __init__(self, path: str, codecs: Codecs | None = None) -> None:
        self.path = path
        self.file = read_nxf(path)
        nxf = self.file.nxf
        catalog_of_nxf(self.file)  # checks the tensors against the GGUF headers
        self.catalog = gguf_catalog(self.file.nxf.files, path)
        self.files = nxf.files
        self.rests = tuple((rest.file, rest.offset, rest.nbytes) for rest in nxf.rests)
        self.sections = {section.name: section.nbytes for section in nxf.sections}
        self._items = nxf.items
        self._codecs = codecs
        self._mode: Mode = "buffered"
        self._own = threading.local()
        self._lock = threading.Lock()
        self._readers: list[NxfReader] = []

    def read(self, item: int, offset: int, nbytes: int, buffer: Buffer) -> memoryview:
        return memoryview(self._reader().read(self._items[item], offset, nbytes))

    def views(self, item: int) -> Iterator[memoryview]:
        """Yield an item chunk by chunk, each valid until the next: the cheapest way to read it."""
        return self._reader().pieces(self._items[item])

    def read_past_the_cache(self) -> None:
        """Read directly what is not in the page cache anyway; call it before the first read."""
        largest = max(zip(self.file.sizes, self.file.paths, strict=True))
        if largest[0] >= DIRECT_FROM_NBYTES and is_cold(largest[1]):
            self._mode = "direct"

    def _reader(self) -> NxfReader:
        reader: NxfReader | None = getattr(self._own, "reader", None)
        if reader is None:
            reader = NxfReader(self.file, mode=self._mode, codecs=self._codecs)
            self._own.reader = reader
            with self._lock:
                self._readers.append(reader)
        return reader

    def token(self) -> bytes:
        return _token(list(self.file.paths))

    def codecs_by_tensor(self) -> Mapping[str, str]:
        nxf, found = self.file.nxf, {}
        for tensor in nxf.tensors:
            numbers = self.file.table["codec"][tensor.first_chunk :][: tensor.n_chunks].tolist()
            # Chunks that a codec did not make smaller are raw: the others tell which it was.
            names = {nxf.codecs[number] for number in set(numbers)} - {RAW}
            found[tensor.name] = min(names, default=RAW)
        return found

    def close(self) -> None:
        with self._lock:
            for reader in self._readers:
                reader.close()
            self._readers = []


def gguf_catalog(files: tuple[SourceFile, ...], name: str) -> Catalog:
    """Return the catalog of GGUF files by their headers alone."""
    from nexus_ext.formats.gguf_header import parse_header

    return catalog_of([parse_header(f"{name}: {f.name}", f.header, f.nbytes) for f in files])


def find_rests(header: Header, file: FileReader) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the runs behind the header that no tensor covers and are not zero."""
    at = header.data_offset
    buffer = bytearray(PIECE_NBYTES)
    spans = sorted((t.offset, t.offset + t.nbytes) for t in header.tensors)
    for start, end in [*spans, (header.file_nbytes, header.file_nbytes)]:
        run: tuple[int, int] | None = None
        while at < start:
            nbytes = min(PIECE_NBYTES, start - at)
            piece = bytes(file.view(at, nbytes, buffer))
            left = len(piece.lstrip(b"\0"))
            if left:
                found = (at + nbytes - left, at + len(piece.rstrip(b"\0")))
                if run is not None and run[1] == found[0]:
                    found = (run[0], found[1])
                elif run is not None:
                    yield run
                run = found
            at += nbytes
        if run is not None:
            yield run
        at = end


def _token(paths: list[str]) -> bytes:
    stats = [os.stat(path) for path in paths]
    return repr([(s.st_size, s.st_mtime_ns, s.st_ino) for s in stats]).encode()
