"""Read the header of a safetensors file, and write such files.

Knows the encoding: a 64-bit length, a JSON header, then the tensors one after the other. Reading
checks every number against the size of the file before anything is sized by it; the bytes of
tensors are left to the caller, who knows how many of them to hold at a time.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nexus_ext.errors import FormatError, ReadFailed
from nexus_ext.formats.bounded import BoundedReader

MAX_HEADER_NBYTES = 100_000_000  # by the specification
MAX_DIMS = 8  # tensors of language models have up to 4
MAX_TENSORS = 1 << 20
_MAX_ELEMENTS = 2**63 - 1
_METADATA = "__metadata__"
_ALIGNMENT = 8

# dtype -> bytes of an element. The narrow floats are known so that a file that has some can be
# read; whoever wants their values has to say that it cannot have them.
DTYPE_NBYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor is; its place was checked to be inside the file."""

    path: str
    name: str
    dtype: str
    shape: tuple[int, ...]  # outermost first, as PyTorch and numpy have it
    offset: int  # bytes from the start of the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What one file says before its data."""

    path: str
    file_nbytes: int
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]  # in the order of their data


def read_safetensors(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """Read and check the header of the file at `path`.

    Raises FormatError for whatever the specification forbids (holes, overlaps, duplicate names,
    sizes that do not fit), ReadFailed if the file cannot be read.
    """
    path = os.fspath(path)
    with BoundedReader(path) as reader:
        nbytes = reader.u64("the length of the header")
        if nbytes > MAX_HEADER_NBYTES:
            raise reader.error(
                f"the header takes {nbytes} bytes, the limit is {MAX_HEADER_NBYTES}",
                at=0,
                hint="Not a safetensors file, or a damaged one: download it again.",
            )
        reader.skip(nbytes, "the header")
        encoded = reader.header(reader.offset)[8:]
        fields = _parse(path, encoded)
        metadata = _metadata(path, fields.pop(_METADATA, {}))
        tensors = [_tensor(path, reader.offset, name, value) for name, value in fields.items()]
        tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
        _check_contiguous(path, tensors, reader.offset, reader.file_nbytes)
        return SafetensorsHeader(
            path=path,
            file_nbytes=reader.file_nbytes,
            metadata=metadata,
            tensors={tensor.name: tensor for tensor in tensors},
        )


def encode_safetensors_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """Return all that comes before the data of `tensors`: (name, dtype, shape), in file order."""
    fields: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        if name in fields or name == _METADATA:
            raise ValueError(f"the tensor name {name!r} is used twice or reserved")
        end = offset + math.prod(shape) * DTYPE_NBYTES[dtype]
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER_NBYTES:
        raise ValueError(f"the header takes {len(text)} bytes, the limit is {MAX_HEADER_NBYTES}")
    return struct.pack("<Q", len(text)) + text


class TensorReader:
    """Reads parts of stored tensors; keeps each file open. Not for several threads at once."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}

    def read(self, tensor: StoredTensor, start: int, nbytes: int) -> bytearray:
        """Return `nbytes` of the tensor's data from byte `start` on. ReadFailed if it ends."""
        if start < 0 or nbytes < 0 or start + nbytes > tensor.nbytes:
            raise ValueError(f"{tensor.name}: bytes {start} to {start + nbytes} are outside of it")
        data = bytearray(nbytes)
        view = memoryview(data)
        done, at = 0, tensor.offset + start
        try:
            descriptor = self._open(tensor.path)
            while done < nbytes:
                got = os.preadv(descriptor, [view[done:]], at + done)
                if not got:
                    raise ReadFailed(
                        f"{tensor.path}: ends at byte {at + done}, inside of {tensor.name!r}",
                        hint="The file was cut off while it was read.",
                        path=tensor.path,
                        offset=at + done,
                    )
                done += got
        except ReadFailed:
            raise
        except OSError as error:
            raise ReadFailed(
                f"{tensor.path}: cannot be read at byte {at + done}: {error.strerror}",
                path=tensor.path,
                offset=at + done,
                errno=error.errno or 0,
            ) from error
        return data

    def close(self) -> None:
        """Close every file."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _open(self, path: str) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]


def _parse(path: str, encoded: bytes) -> dict[str, object]:
    try:
        fields = json.loads(encoded.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise FormatError(f"{path}: the header is nested too deeply") from None
    except ValueError as error:
        raise FormatError(f"{path}: the header is no valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise FormatError(f"{path}: the header is a {type(fields).__name__}, not an object")
    if len(fields) > MAX_TENSORS:
        raise FormatError(f"{path}: has {len(fields)} tensors, the limit is {MAX_TENSORS}")
    return fields


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:80]!r} is there twice")
        found[name] = value
    return found


def _metadata(path: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise FormatError(f"{path}: {_METADATA!r} is not an object of strings")
    return value


def _tensor(path: str, data_offset: int, name: str, value: object) -> StoredTensor:
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: is not an object of 'dtype', 'shape' and 'data_offsets'")
    dtype, shape, place = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_NBYTES:
        raise FormatError(f"{where}: the dtype {dtype!r} is not known")
    if not _are_counts(shape) or len(shape) > MAX_DIMS:
        raise FormatError(f"{where}: the shape is not a list of up to {MAX_DIMS} sizes")
    if not _are_counts(place) or len(place) != 2:
        raise FormatError(f"{where}: 'data_offsets' is not a pair of offsets")
    nbytes = math.prod(shape) * DTYPE_NBYTES[dtype]
    start, end = place
    if end < start or end - start != nbytes:
        raise FormatError(
            f"{where}: 'data_offsets' {place} span {end - start} bytes, the shape {shape} of "
            f"{dtype} takes {nbytes}"
        )
    return StoredTensor(path, name, dtype, tuple(shape), data_offset + start, nbytes)


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= _MAX_ELEMENTS for item in value
    )


def _check_contiguous(path: str, tensors: list[StoredTensor], start: int, file_end: int) -> None:
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole"
            raise FormatError(
                f"{path}: tensor {tensor.name!r}: starts at byte {tensor.offset} and {what}, which "
                f"ends at {end}"
            )
        end += tensor.nbytes
    if end != file_end:
        raise FormatError(
            f"{path}: the tensors end at byte {end}, the file at {file_end}",
            hint="The file is damaged or was cut off: download it again.",
        )
