"""Read an NXF from its first to its last byte and say what is not as it was written.

The header is checked when the file is opened; here it is every chunk (hash, and whether it
decodes) and every byte between them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from nexus_ext.codecs import RAW, Codecs, builtin
from nexus_ext.errors import Damaged, UsageError
from nexus_ext.formats.file_read import FileReader
from nexus_ext.formats.nxf_file import NxfFile, read_nxf
from nexus_ext.formats.nxf_reader import NxfReader

_PIECE_NBYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    path: str
    offset: int
    item: str  # a tensor or a section; "" for bytes that belong to none
    chunk: int  # of the item; -1 outside of chunks
    what: str


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check has read, and what it found."""

    n_chunks: int
    stored_nbytes: int
    not_decoded: tuple[str, ...]  # codecs that are not known: their hashes are right
    findings: tuple[Finding, ...]


def check_file(
    path: str | os.PathLike[str],
    *,
    codecs: Codecs | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Read everything and report all that is damaged.

    Raises FormatError when the header is: then nothing is known of the rest.
    """
    codecs = codecs or builtin()
    file = read_nxf(os.fspath(path))
    table = file.table
    total = sum(file.sizes)
    findings: list[Finding] = []
    unknown: dict[str, None] = {}
    done = 0
    with NxfReader(file, codecs=codecs) as reader:
        for shard, shard_path in enumerate(file.paths):
            between = FileReader(shard_path)
            try:
                for index, start, end in _runs(file, shard):
                    findings += _not_zero(between, start, end)
                    if index is not None:
                        try:
                            reader.stored(index)
                            codec = reader.codec_of(index)
                            if codec == RAW or _is_known(codec, codecs):
                                reader.chunk(index)
                            else:
                                unknown[codec] = None
                        except Damaged as error:
                            where = (error.path, error.offset, error.item, error.chunk)
                            findings.append(Finding(*where, str(error)))
                        end += int(table["stored"][index])
                    done += end - start
                    if progress is not None:
                        progress(done, total)
            finally:
                between.close()
    return CheckReport(
        n_chunks=len(table),
        stored_nbytes=int(table["stored"].sum(dtype="u8")),
        not_decoded=tuple(unknown),
        findings=tuple(findings),
    )


def _runs(file: NxfFile, shard: int) -> Iterator[tuple[int | None, int, int]]:
    """Yield (chunk, start, end): the bytes from start to end are nobody's, then comes the chunk."""
    import numpy as np

    mine = np.flatnonzero(file.table["shard"] == shard)
    order = mine[np.argsort(file.table["offset"][mine], kind="stable")]
    at = file.header_sizes[shard]
    for index in order.tolist():
        offset = int(file.table["offset"][index])
        yield index, at, offset
        at = offset + int(file.table["stored"][index])
    yield None, at, file.sizes[shard]


def _not_zero(file: FileReader, start: int, end: int) -> Iterator[Finding]:
    while start < end:
        nbytes = min(_PIECE_NBYTES, end - start)
        piece = bytes(file.view(start, nbytes))
        left = len(piece.lstrip(b"\0"))
        if left:
            at = start + nbytes - left
            what = f"{file.path}: byte {at}, which belongs to no chunk, is not zero"
            yield Finding(file.path, at, "", -1, what)
            return
        start += nbytes


def _is_known(codec: str, codecs: Codecs) -> bool:
    try:
        codecs.get(codec)
    except UsageError:
        return False
    return True
