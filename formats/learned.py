"""A file of what was learned of one model, by a predictor for instance: named arrays and facts.

The form, version 1, little-endian:

    "NXLEARN\\0"    magic
    u32 version, u32 n: the length of the header
    header          n bytes of JSON: kind, version, fingerprint, facts, and of each array its name,
                    type ("<i1", "<i2", "<i4", "<f2" or "<f4") and shape
    arrays          one after the other, in the order of the header
    u64             xxh3-64 of everything before

`kind` says whose it is and `version` is that of the kind.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from nexus_ext.errors import FormatError, ReadFailed
from nexus_ext.formats.new_file import NewFile

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.generic]

MAGIC: Final = b"NXLEARN\0"
VERSION: Final = 1
MOST_ARRAYS: Final = 1024
MOST_DIMENSIONS: Final = 8
_HEAD: Final = struct.Struct("<8sII")
_SUM: Final = struct.Struct("<Q")
_SIZES: Final = {"<i1": 1, "<i2": 2, "<i4": 4, "<f2": 2, "<f4": 4}
_FIELDS: Final = {"kind", "version", "fingerprint", "facts", "arrays"}
_ARRAY_FIELDS: Final = {"name", "type", "shape"}


@dataclass(frozen=True, slots=True)
class Learned:
    """Arrays and facts that belong to one model: Catalog.fingerprint, RoutingTrace.fingerprint."""

    kind: str
    version: int
    fingerprint: str
    facts: Mapping[str, Any]  # what JSON can say
    arrays: Mapping[str, Array]

    def write(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> int:
        """Write a file, all or nothing, and return its bytes.

        Raises UsageError when it is there already, WriteFailed when the system refuses.
        """
        data = self.to_bytes()
        with NewFile(path, expected_nbytes=len(data), overwrite=overwrite) as file:
            file.write(data)
            file.commit()
        return len(data)

    @classmethod
    def read(cls, path: str | os.PathLike[str], kind: str, version: int) -> Learned:
        """Return what a file holds; ReadFailed, or FormatError as for `from_bytes`."""
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise ReadFailed(
                f"{os.fspath(path)}: cannot be read: {error.strerror}",
                hint="name a file that was written by training",
                path=os.fspath(path),
                errno=error.errno or 0,
            ) from error
        return cls.from_bytes(data, kind, version, source=os.fspath(path))

    def to_bytes(self) -> bytes:
        """Return the binary form, which `from_bytes` reads back."""
        entries, parts = [], []
        for name, array in self.arrays.items():
            kind = array.dtype.newbyteorder("<").str.replace("|", "<")
            if kind not in _SIZES:
                raise TypeError(f"array {name!r} has the type {array.dtype}, known: {[*_SIZES]}")
            entries.append({"name": name, "type": kind, "shape": list(array.shape)})
            parts.append(array.astype(kind, order="C").tobytes())
        header = {
            "kind": self.kind,
            "version": self.version,
            "fingerprint": self.fingerprint,
            "facts": dict(self.facts),
            "arrays": entries,
        }
        text = json.dumps(header, allow_nan=False).encode()
        body = b"".join((_HEAD.pack(MAGIC, VERSION, len(text)), text, *parts))
        return body + _SUM.pack(_checksum(body))

    @classmethod
    def from_bytes(cls, data: bytes, kind: str, version: int, *, source: str) -> Learned:
        """Return what `data` holds, which must be of this kind and version.

        FormatError names `source` and what is wrong with it; arrays that are not finite are wrong.
        """
        return _Reader(data, kind, version, source).learned()


def _checksum(data: bytes) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(data)


class _Reader:
    """Reads one file and refuses all that `to_bytes` would not have written."""

    def __init__(self, data: bytes, kind: str, version: int, source: str) -> None:
        self._data, self._kind, self._version, self._source = data, kind, version, source
        self._end = len(data) - _SUM.size

    def learned(self) -> Learned:
        fields, at = self._header()
        if not isinstance(fields["fingerprint"], str):
            raise self._error("fingerprint", f"is {fields['fingerprint']!r}, not text")
        if not isinstance(fields["facts"], dict):
            raise self._error("facts", "are not an object")
        entries = fields["arrays"]
        if not isinstance(entries, list) or len(entries) > MOST_ARRAYS:
            raise self._error("arrays", f"are not a list of up to {MOST_ARRAYS}")
        arrays: dict[str, Array] = {}
        for entry in entries:
            name, array = self._array(entry, at)
            if name in arrays:
                raise self._error("arrays", f"have {name!r} twice")
            arrays[name] = array
            at += array.nbytes
        if at != self._end:
            raise self._error("length", f"is {len(self._data)}, the header says less")
        return Learned(self._kind, self._version, fields["fingerprint"], fields["facts"], arrays)

    def _header(self) -> tuple[dict[str, Any], int]:
        data = self._data
        if len(data) < _HEAD.size + _SUM.size:
            raise self._error("length", f"is {len(data)}, less than any such file has")
        magic, version, length = _HEAD.unpack_from(data)
        if magic != MAGIC:
            raise self._error("start", f"is {magic!r}, not {MAGIC!r}")
        if version != VERSION:
            raise self._error("version", f"is {version}, not {VERSION}")
        (expected,) = _SUM.unpack_from(data, self._end)
        if _checksum(data[: self._end]) != expected:
            raise self._error("checksum", "is wrong: the file is cut off or damaged")
        end = _HEAD.size + length
        if end > self._end:
            raise self._error("header", f"ends at {end}, the file has {len(data)} bytes")
        try:
            fields = json.loads(data[_HEAD.size : end], parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise self._error("header", f"is not JSON: {error}") from error
        if not isinstance(fields, dict) or fields.keys() != _FIELDS:
            raise self._error("header", f"does not have the fields {sorted(_FIELDS)}")
        for name, wanted in (("kind", self._kind), ("version", self._version)):
            if type(fields[name]) is not type(wanted) or fields[name] != wanted:
                raise self._error(name, f"is {fields[name]!r}, not {wanted!r}")
        return fields, end

    def _array(self, entry: object, at: int) -> tuple[str, Array]:
        import numpy as np

        if not isinstance(entry, dict) or entry.keys() != _ARRAY_FIELDS:
            raise self._error("arrays", f"have other fields than {sorted(_ARRAY_FIELDS)}")
        name, kind, shape = entry["name"], entry["type"], entry["shape"]
        if not isinstance(name, str) or not isinstance(kind, str) or kind not in _SIZES:
            raise self._error("arrays", f"have {name!r} of the type {kind!r}")
        if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS:
            raise self._error(f"array {name!r}", f"has the shape {shape!r}")
        for n in shape:
            if type(n) is not int or not 0 <= n <= len(self._data):
                raise self._error(f"array {name!r}", f"has the shape {shape!r}")
        count = math.prod(shape)
        if at + count * _SIZES[kind] > self._end:
            raise self._error(f"array {name!r}", f"of shape {shape} goes beyond the file")
        array = np.frombuffer(self._data, kind, count, at).reshape(shape)
        if kind.startswith("<f") and not np.isfinite(array).all():
            raise self._error(f"array {name!r}", "has numbers that are not finite")
        return name, array

    def _error(self, what: str, why: str) -> FormatError:
        return FormatError(
            f"{self._source}: {what} {why}", hint=f"train the {self._kind} predictor again"
        )


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not a number")
