"""Models in containers that a plugin reads: described as ggml needs them, checked, and copied.

A container qualifies when each tensor lies in a file as ggml has it in memory: quantized in one of
ggml's types, contiguous, at a multiple of 32 bytes. Such tensors are streamed from where they are,
exactly like those of a GGUF; `foreign_catalog` makes up the GGUF header that llama.cpp is shown.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import xxhash

from nexus_ext.codecs import RAW
from nexus_ext.errors import FormatError, ReadFailed
from nexus_ext.formats.file_read import Buffer, FileReader
from nexus_ext.formats.ggml_types import GgmlType, ggml_types
from nexus_ext.formats.gguf import catalog_of
from nexus_ext.formats.gguf_encode import TensorSpec, Value, encode_header
from nexus_ext.formats.gguf_header import DEFAULT_ALIGNMENT, padded, parse_header
from nexus_ext.formats.new_file import NewFile
from nexus_ext.formats.nxf_check import plain_name
from nexus_ext.formats.nxf_header import SourceFile
from nexus_ext.types import Catalog, FileInfo

ALIGNMENT: Final = 32  # of a tensor in its file: ggml's kernels count on it
_PIECE_NBYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor of a foreign container, and where its bytes are."""

    name: str  # llama.cpp's: "blk.0.attn_q.weight"
    shape: tuple[int, ...]  # ggml order, innermost first
    type_name: str  # ggml type, for instance "Q4_K"
    path: str
    offset: int  # bytes from the start of that file, a multiple of ALIGNMENT


def foreign_catalog(
    container: str, path: str, metadata: Mapping[str, Value], places: Sequence[Place]
) -> Catalog:
    """Return the catalog of a model in a foreign container.

    `container` is the reader's name, `metadata` the key-value pairs that a GGUF of this model would
    have (see `gguf_encode.Value`). Raises FormatError for what llama.cpp would refuse, or a tensor
    that is not all there.
    """
    kinds = {kind.name: kind for kind in ggml_types().values()}
    specs = []
    for place in places:
        kind: GgmlType | None = kinds.get(place.type_name)
        if kind is None:
            raise FormatError(f"{path}: {place.name!r} has the unknown type {place.type_name!r}")
        specs.append(TensorSpec(place.name, tuple(place.shape), kind))
    try:
        header = encode_header(metadata, specs)
        nbytes = len(header) + sum(padded(s.nbytes, DEFAULT_ALIGNMENT) for s in specs)
    except (ValueError, TypeError, struct.error) as error:
        raise FormatError(f"{path}: {error}") from error
    shown = catalog_of([parse_header(path, header, nbytes)])
    paths = list(dict.fromkeys(place.path for place in places))
    number = {p: i for i, p in enumerate(paths)}
    made = replace(
        shown,
        files=tuple(FileInfo(p, _size(p)) for p in paths),
        tensors=tuple(
            replace(tensor, file=number[place.path], offset=place.offset)
            for tensor, place in zip(shown.tensors, places, strict=True)
        ),
        fingerprint=_fingerprint(header, paths, places),
        container=container,
    )
    fault = faults(made)
    if fault:
        raise FormatError(f"{path}: {fault}")
    return made


def faults(made: Catalog) -> str:
    """Return the first thing that is wrong with a catalog of a reader; "" if nothing is.

    Its header is parsed again, and places are compared with the files. Raises FormatError.
    """
    if made.chunks is not None:
        return "its tensors are in chunks, which readers of plugins cannot have"
    shown = catalog_of([parse_header("header", made.header, made.virtual_nbytes)])
    facts = [(t.name, t.shape, t.type_name, t.nbytes, t.role, t.layer) for t in shown.tensors]
    if facts != [(t.name, t.shape, t.type_name, t.nbytes, t.role, t.layer) for t in made.tensors]:
        return "its tensors are not those of its header"
    if tuple(made.virtual_offsets) != shown.virtual_offsets or made.shape != shown.shape:
        return "its offsets or its shape are not those of its header"
    for file in made.files:
        if _size(file.path) != file.nbytes:
            return f"{file.path} does not have {file.nbytes} bytes"
    for tensor in made.tensors:
        if not 0 <= tensor.file < len(made.files):
            return f"{tensor.name!r} is in file {tensor.file} of {len(made.files)}"
        end = made.files[tensor.file].nbytes
        if tensor.offset < 0 or tensor.offset + tensor.nbytes > end:
            return f"{tensor.name!r} lies outside of its file"
        if tensor.offset % ALIGNMENT:
            return f"{tensor.name!r} is at {tensor.offset}, not a multiple of {ALIGNMENT}"
    return ""


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise ReadFailed(
            f"{path} cannot be read: {error.strerror}",
            hint="check that all files of the model are there",
            path=path,
            errno=error.errno or 0,
        ) from error


def _fingerprint(header: bytes, paths: Sequence[str], places: Sequence[Place]) -> str:
    digest = xxhash.xxh3_128(header)
    digest.update(repr([_size(path) for path in paths]).encode())
    digest.update(repr([(paths.index(p.path), p.offset) for p in places]).encode())
    return digest.hexdigest()


class ForeignSource:
    """A model of a plugin's reader as converters want it: as the GGUF that it would be."""

    def __init__(self, path: str, opened: Catalog) -> None:
        self.path = path
        self.container = opened.container
        stem = os.path.splitext(os.path.basename(path.rstrip("/")))[0]
        name = plain_name(f"{stem}.gguf")
        self.catalog = catalog_of([parse_header(name, opened.header, opened.virtual_nbytes)])
        self.files: tuple[SourceFile, ...] = (
            SourceFile(name, opened.virtual_nbytes, opened.header),
        )
        self.rests: tuple[tuple[int, int, int], ...] = ()
        self.sections: dict[str, int] = {}
        self._paths = [file.path for file in opened.files]
        self._places = [(t.file, t.offset) for t in opened.tensors]
        self._files = [FileReader(p) for p in self._paths]

    def read(self, item: int, offset: int, nbytes: int, buffer: Buffer) -> memoryview:
        file, start = self._places[item]
        return self._files[file].view(start + offset, nbytes, buffer)

    def pieces(self, item: int) -> Iterator[bytes]:
        """Yield the bytes of a tensor in pieces."""
        nbytes, buffer = self.catalog.tensors[item].nbytes, bytearray(_PIECE_NBYTES)
        for at in range(0, nbytes, _PIECE_NBYTES):
            yield bytes(self.read(item, at, min(_PIECE_NBYTES, nbytes - at), buffer))

    def token(self) -> bytes:
        stats = [os.stat(path) for path in self._paths]
        return repr([(s.st_size, s.st_mtime_ns, s.st_ino) for s in stats]).encode()

    def codecs_by_tensor(self) -> Mapping[str, str]:
        return dict.fromkeys((t.name for t in self.catalog.tensors), RAW)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def write_gguf(self, target: str, *, overwrite: bool) -> Iterator[int]:
        """Write the model as the GGUF `target`; yield the bytes that are done, now and then."""
        file = self.files[0]
        with NewFile(target, expected_nbytes=file.nbytes, overwrite=overwrite) as output:
            output.write(file.header)
            done = len(file.header)
            for item in range(len(self.catalog.tensors)):
                for piece in self.pieces(item):
                    output.write(piece)
                    done += len(piece)
                    yield done
                rest = padded(done, DEFAULT_ALIGNMENT) - done
                output.write(bytes(rest))
                done += rest
            output.commit()
