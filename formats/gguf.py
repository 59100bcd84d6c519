"""Open a GGUF model, whole or split over files, as a `Catalog`.

Reads headers only. Knows how the parts of a split model belong together and how to describe them
by one header; the encoding itself is in `gguf_header`, the meaning of names in `roles`.
"""

from __future__ import annotations

import os
import re
import struct

import xxhash

from nexus_ext.errors import FormatError
from nexus_ext.formats.gguf_header import MAGIC, Header, RawTensor, padded, read_header
from nexus_ext.formats.hyperparameters import model_shape
from nexus_ext.formats.roles import role_of, split_name
from nexus_ext.types import Catalog, FileInfo, Role, TensorInfo

_PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_SPLIT_PREFIX = "split."
_MAX_PARTS = 0xFFFF  # split.count is a 16-bit number


def open_gguf(path: str | os.PathLike[str]) -> Catalog:
    """Read the header of the model at `path`; of a split model, `path` is any one of its parts.

    Raises FormatError for a file that breaks the format or that llama.cpp would refuse,
    ReadFailed for one that cannot be read.
    """
    return catalog_of(read_parts(os.fspath(path)))


def catalog_of(headers: list[Header]) -> Catalog:
    """Return the catalog of the model whose parts have these headers, in order."""
    raw = [(index, tensor) for index, header in enumerate(headers) for tensor in header.tensors]
    _check_unique(headers, raw)
    tied = not any(tensor.name == "output.weight" for _, tensor in raw)
    tensors = tuple(_describe(index, tensor, tied) for index, tensor in raw)
    first = headers[0]
    if len(headers) == 1:
        encoded = first.encoded
        offsets = tuple(tensor.offset for tensor in tensors)
        nbytes = first.file_nbytes
    else:
        encoded, offsets, nbytes = _merge(headers)
    return Catalog(
        files=tuple(FileInfo(header.path, header.file_nbytes) for header in headers),
        shape=model_shape(first.path, first.metadata, tensors),
        tensors=tensors,
        metadata=first.metadata,
        fingerprint=_fingerprint(headers),
        header=encoded,
        virtual_offsets=offsets,
        virtual_nbytes=nbytes,
    )


def _describe(file: int, raw: RawTensor, tied: bool) -> TensorInfo:
    role = role_of(raw.name, raw.shape)
    return TensorInfo(
        name=raw.name,
        shape=raw.shape,
        type_name=raw.type.name,
        file=file,
        offset=raw.offset,
        nbytes=raw.nbytes,
        role=role,
        layer=split_name(raw.name)[0],
        tied_output=tied and role is Role.TOKEN_EMBEDDING and raw.name == "token_embd.weight",
    )


def _fingerprint(headers: list[Header]) -> str:
    digest = xxhash.xxh3_128()
    for header in headers:
        digest.update(header.encoded)
        digest.update(struct.pack("<QQ", len(header.encoded), header.file_nbytes))
    return digest.hexdigest()


def read_parts(path: str) -> list[Header]:
    """Read the headers of all parts of the model of which `path` is one, in their order."""
    given = read_header(path)
    count = _split_number(given, "split.count", 1)
    if count <= 1:
        return [given]
    match = _PART_NAME.fullmatch(path)
    if match is None or int(match[3]) != count or not 1 <= int(match[2]) <= count:
        raise FormatError(
            f"{path}: is a part of a model split into {count} files, but its name does not end "
            f"in '-<number>-of-{count:05d}.gguf'",
            hint="Give the parts the names under which they were published.",
        )
    names = [f"{match[1]}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    missing = [name for name in names if not os.path.exists(name)]
    if missing:
        raise FormatError(
            f"{path}: {len(missing)} of the {count} parts of this model are missing, the first is "
            f"{missing[0]}",
            hint="Download the missing parts into the same directory.",
        )
    headers = [given if name == path else read_header(name) for name in names]
    for number, header in enumerate(headers):
        found = (_split_number(header, "split.no", -1), _split_number(header, "split.count", 1))
        if found != (number, count):
            raise FormatError(
                f"{header.path}: says that it is part {found[0]} of {found[1]} (counted from 0), "
                f"its name says {number} of {count}",
                hint="The parts are of different models or were renamed: download them again.",
            )
    declared = _split_number(headers[0], "split.tensors.count", -1)
    n_tensors = sum(len(header.tensors) for header in headers)
    if declared != n_tensors:
        raise FormatError(
            f"{headers[0].path}: 'split.tensors.count' is {declared} but the {count} parts hold "
            f"{n_tensors} tensors",
            hint="The parts are of different models: download them again.",
        )
    return headers


def _split_number(header: Header, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    if (
        type(value) is not int
        or (key in header.metadata and value < 0)
        or (key == "split.count" and value > _MAX_PARTS)
    ):
        raise FormatError(f"{header.path}: the key {key!r} holds {value!r}, not a small integer")
    return value


def _check_unique(headers: list[Header], raw: list[tuple[int, RawTensor]]) -> None:
    seen: dict[str, int] = {}
    for file, tensor in raw:
        before = seen.setdefault(tensor.name, file)
        if before != file:
            raise FormatError(
                f"{headers[file].path}: the tensor {tensor.name!r} is already in "
                f"{headers[before].path}",
                hint="The parts are of different models: download them again.",
            )


def _merge(headers: list[Header]) -> tuple[bytes, tuple[int, ...], int]:
    """Describe all parts as one file.

    Returns its header (version 3, the pairs of the first part as they are), the offset of each
    tensor from its start, and its size. llama.cpp wants tensors in the order of their infos, each
    at the next multiple of the alignment.
    """
    first = headers[0]
    pairs = [pair for key, pair in first.pairs.items() if not key.startswith(_SPLIT_PREFIX)]
    tensors = [tensor for header in headers for tensor in header.tensors]
    pieces = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(pairs)), *pairs]
    offsets: list[int] = []
    data_nbytes = 0
    for tensor in tensors:
        name = tensor.name.encode()
        dims = tensor.shape
        pieces.append(struct.pack("<Q", len(name)) + name)
        pieces.append(struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        pieces.append(struct.pack("<IQ", tensor.type.number, data_nbytes))
        offsets.append(data_nbytes)
        data_nbytes = padded(data_nbytes + tensor.nbytes, first.alignment)
    encoded = b"".join(pieces)
    encoded += bytes(padded(len(encoded), first.alignment) - len(encoded))
    start = len(encoded)
    return encoded, tuple(start + offset for offset in offsets), start + data_nbytes
