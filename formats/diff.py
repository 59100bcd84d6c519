"""Compare two models by what they hold, whatever containers they are in.

Equal are models whose GGUF files are equal byte for byte, and whose sections are. How an NXF stores
them (codecs, order of records, shards) is no difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nexus_ext.codecs import Codecs
from nexus_ext.formats.sources import Source, open_source

_PIECE_NBYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which two models differ."""

    item: str  # a tensor, a file, a section
    what: str


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    codecs: Codecs | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Difference]:
    """Return all differences between the models `a` and `b`; none: they hold the same.

    Raises what opening and reading them raises.
    """
    first = open_source(a, codecs)
    try:
        second = open_source(b, codecs)
        try:
            return [*_headers(first, second), *_Contents(first, second, progress).differences()]
        finally:
            second.close()
    finally:
        first.close()


def _headers(a: Source, b: Source) -> list[Difference]:
    if len(a.files) != len(b.files):
        return [Difference("files", f"{len(a.files)} and {len(b.files)} GGUF files")]
    found = []
    for one, other in zip(a.files, b.files, strict=True):
        if one.header != other.header:
            at = next(
                (
                    i
                    for i, (x, y) in enumerate(zip(one.header, other.header, strict=False))
                    if x != y
                ),
                min(len(one.header), len(other.header)),
            )
            found.append(Difference(one.name, f"the GGUF headers differ from byte {at} on"))
        elif one.nbytes != other.nbytes:
            found.append(Difference(one.name, f"{one.nbytes} and {other.nbytes} bytes"))
    if sorted(a.rests) != sorted(b.rests):
        found.append(Difference("files", "different bytes outside of tensors"))
    return found


class _Contents:
    def __init__(self, a: Source, b: Source, progress: Callable[[int, int], None] | None) -> None:
        self._a, self._b = a, b
        self._progress = progress
        self._done = 0
        self._total = a.catalog.nbytes
        self._buffers = (bytearray(_PIECE_NBYTES), bytearray(_PIECE_NBYTES))

    def differences(self) -> list[Difference]:
        found: list[Difference] = []
        mine, theirs = _items(self._a), _items(self._b)
        for name in dict.fromkeys((*mine, *theirs)):
            one, other = mine.get(name), theirs.get(name)
            if one is None or other is None:
                found.append(
                    Difference(name, f"is only in {self._b.path if one is None else self._a.path}")
                )
            elif one[1:] != other[1:]:
                found.append(
                    Difference(name, f"{one[2]}, {one[1]} bytes, and {other[2]}, {other[1]}")
                )
            else:
                at = self._first_difference(one[0], other[0], one[1])
                if at is not None:
                    found.append(Difference(name, f"differs from its byte {at} on"))
        return found

    def _first_difference(self, one: int, other: int, nbytes: int) -> int | None:
        for start in range(0, nbytes, _PIECE_NBYTES):
            size = min(_PIECE_NBYTES, nbytes - start)
            x = self._a.read(one, start, size, self._buffers[0])
            y = self._b.read(other, start, size, self._buffers[1])
            if x != y:
                return start + next(i for i in range(size) if x[i] != y[i])
            self._done += size
            if self._progress is not None:
                self._progress(self._done, self._total)
        return None


def _items(source: Source) -> dict[str, tuple[int, int, str]]:
    """Return name -> (item, bytes, what it is) of everything that a model holds."""
    found: dict[str, tuple[int, int, str]] = {}
    number = 0
    for tensor in source.catalog.tensors:
        found[tensor.name] = (number, tensor.nbytes, f"{tensor.type_name} {tensor.shape}")
        number += 1
    for file, offset, nbytes in source.rests:
        found[f"bytes from {offset} on of file {file}"] = (number, nbytes, "rest")
        number += 1
    for name, nbytes in source.sections.items():
        found[f"section {name}"] = (number, nbytes, "section")
        number += 1
    return found
