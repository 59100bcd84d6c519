"""What must hold between the values of an NXF header: SPEC.md, "Consistency".

Pure: values in, FormatError out. The chunk table is checked as whole columns.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from nexus_ext.errors import FormatError
from nexus_ext.formats.gguf_header import MAX_NAME_NBYTES
from nexus_ext.formats.nxf_header import Nxf, Section

if TYPE_CHECKING:
    import numpy.typing as npt

    from nexus_ext.formats.nxf_header import Table

KNOWN_FEATURES: Final = frozenset({"shards"})
SECTION_PREFIX: Final = "section:"
# What belongs to a deployed model and is written by tools that know it; others start with "x.".
SECTIONS: Final = (
    "residuals",
    "salience",
    "popularity",
    "draft",
    "routers",
    "filters",
    "plan",
)
PART_ALIGNMENT: Final = 4096  # of the parts of a record that is stored as it is
_CODEC: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_SECTION: Final = re.compile(r"x\.[a-z0-9][a-z0-9_-]*(\.[a-z0-9][a-z0-9_-]*)+")


def section_is_named_well(name: str) -> bool:
    """Tell whether a section is in the registry, or is a third party's own: x.party.name."""
    return name in SECTIONS or _SECTION.fullmatch(name) is not None


def is_plain_name(name: str) -> bool:
    """Tell whether `name` names a file in the same directory, on every system."""
    apart = set(name) & set("/\\\0:")
    return bool(name) and name not in (".", "..") and not apart and name == name.strip()


def plain_name(name: str) -> str:
    """Return `name`, or what comes near to it and is a plain file name."""
    found = "".join("_" if c in "/\\\0:" else c for c in name).strip() or "_"
    return found if is_plain_name(found) else "_"


def check_nxf(
    path: str, nxf: Nxf, table: Table, sizes: tuple[int, ...], header_sizes: tuple[int, ...]
) -> None:
    """Check a header; `sizes` and `header_sizes` are those of all files of the set.

    Raises FormatError that names the first thing that does not hold.
    """
    unknown = [name for name in nxf.requires if name not in KNOWN_FEATURES]
    if unknown:
        raise FormatError(
            f"{path}: needs {', '.join(map(repr, unknown))}, which this program does not know",
            hint="A newer nexus_ext may read it: pip install -U nexus_ext",
        )
    if nxf.alignment & (nxf.alignment - 1):
        raise FormatError(f"{path}: the alignment is {nxf.alignment}, not a power of two")
    for codec in nxf.codecs:
        if _CODEC.fullmatch(codec) is None:
            raise FormatError(f"{path}: {codec!r} cannot be the name of a codec")
    names: set[str] = set()
    for name in (file.name for file in nxf.files):
        if not is_plain_name(name) or name in names:
            raise FormatError(
                f"{path}: the name of a GGUF file is {name!r}, which is no plain file name, or is "
                "there twice"
            )
        names.add(name)
    if nxf.shards and "shards" not in nxf.requires:
        raise FormatError(f"{path}: has shards without the feature 'shards'")
    _check_sections(path, nxf)
    _check_extents(path, nxf)
    _check_groups(path, nxf)
    _check_numbering(path, nxf, table)
    _check_table(path, nxf, table, sizes, header_sizes)
    _check_places(path, nxf, table)


def _check_sections(path: str, nxf: Nxf) -> None:
    seen: set[str] = set()
    for section in nxf.sections:
        if not section_is_named_well(section.name) or section.name in seen:
            raise FormatError(f"{path}: a section has the name {section.name!r}, or two have it")
        seen.add(section.name)


def _check_extents(path: str, nxf: Nxf) -> None:
    """Tensors and rests lie behind the header of their file, in it, and apart."""
    names: set[str] = set()
    spans: list[list[tuple[int, int, str]]] = [[] for _ in nxf.files]
    for extent in (*nxf.tensors, *nxf.rests):
        spans[extent.file].append((extent.offset, extent.offset + extent.nbytes, extent.name))
    for tensor in nxf.tensors:
        if not tensor.name or len(tensor.name.encode("utf-8", "replace")) > MAX_NAME_NBYTES:
            raise FormatError(f"{path}: {tensor.name!r} cannot be the name of a tensor")
        if tensor.name in names:
            raise FormatError(f"{path}: the tensor {tensor.name!r} occurs twice")
        names.add(tensor.name)
    for file, found in zip(nxf.files, spans, strict=True):
        found.sort()
        first = (0, len(file.header), "the header")
        for before, after in pairwise([first, *found]):
            if after[0] < before[1]:
                raise FormatError(
                    f"{path}: {file.name}: {after[2] or 'a rest'!r} at byte {after[0]} overlaps "
                    f"{before[2] or 'a rest'!r}, which ends at {before[1]}"
                )
        if found and found[-1][1] > file.nbytes:
            raise FormatError(
                f"{path}: {file.name}: {found[-1][2] or 'a rest'!r} ends at byte {found[-1][1]}, "
                f"the file at {file.nbytes}"
            )


def _check_groups(path: str, nxf: Nxf) -> None:
    """Every tensor with several matrices is in one group, of tensors with as many."""
    grouped: set[int] = set()
    for group in nxf.groups:
        valid = group and all(0 <= number < len(nxf.tensors) for number in group)
        if not valid or len(set(group)) != len(group) or grouped & set(group):
            raise FormatError(f"{path}: {group!r} is no group of tensors that are in no other")
        grouped |= set(group)
        counts = {nxf.tensors[number].n_matrices for number in group}
        if len(counts) != 1 or counts == {1}:
            raise FormatError(
                f"{path}: the tensors of the group of {nxf.tensors[group[0]].name!r} are stored as "
                f"{sorted(counts)} matrices: they must be as many, and more than one"
            )
    for number, tensor in enumerate(nxf.tensors):
        if tensor.n_matrices > 1 and number not in grouped:
            raise FormatError(f"{path}: {tensor.name!r} has matrices and is in no group")


def _check_numbering(path: str, nxf: Nxf, table: Table) -> None:
    """Chunks are numbered through: tensors, rests, sections."""
    expected = 0
    for item in nxf.items:
        if item.first_chunk != expected:
            raise FormatError(
                f"{path}: the chunks of {item.name or 'a rest'!r} start at {item.first_chunk}, not "
                f"at {expected}"
            )
        expected += item.n_chunks
        if expected > len(table):
            break
    if expected != len(table):
        raise FormatError(f"{path}: the table has {len(table)} chunks, {expected} are needed")


def _check_table(
    path: str, nxf: Nxf, table: Table, sizes: tuple[int, ...], header_sizes: tuple[int, ...]
) -> None:
    import numpy as np

    def refuse(wrong: npt.NDArray[np.bool_], what: str) -> None:
        found = np.flatnonzero(wrong)
        if len(found):
            index = int(found[0])
            entry = {name: int(table[name][index]) for name in table.dtype.names or ()}
            raise FormatError(f"{path}: {describe_chunk(nxf, index)} {what}: {entry}")

    raw_nbytes = np.zeros(len(table), np.int64)
    for item in nxf.items:
        part = raw_nbytes[item.first_chunk : item.first_chunk + item.n_chunks]
        part[:] = item.chunk_nbytes
        last = item.per_matrix - 1
        part[last :: last + 1] = item.matrix_nbytes - last * item.chunk_nbytes
    refuse(table["zero"], "has a reserved field that is not 0")
    refuse(table["shard"] >= len(sizes), f"is in a shard that is none of the {len(sizes)} files")
    refuse(table["codec"] >= len(nxf.codecs), "has a codec that is not in the list")
    refuse(table["raw"] != raw_nbytes, "does not have the bytes that its tensor needs")
    refuse(table["stored"] == 0, "is empty")
    refuse(table["stored"] > table["raw"], "is larger than what it decodes to")
    raw_codec = nxf.codecs.index("raw") if "raw" in nxf.codecs else -1
    refuse(
        (table["codec"] == raw_codec) & (table["stored"] != table["raw"]),
        "is stored as it is, in fewer bytes",
    )
    shards = table["shard"]
    refuse(
        table["offset"] < np.array(header_sizes, np.uint64)[shards],
        "starts inside of a header",
    )
    # Not offset + stored > size: that sum can wrap around.
    ends = np.array(sizes, np.uint64)[shards]
    refuse(
        (table["offset"] > ends) | (table["stored"] > ends - np.minimum(table["offset"], ends)),
        "reaches past the end of its file",
    )
    order = np.lexsort((table["offset"], shards))
    placed = table[order]
    overlap = np.zeros(len(table), bool)
    overlap[order[1:]] = (placed["shard"][1:] == placed["shard"][:-1]) & (
        placed["offset"][1:] < placed["offset"][:-1] + placed["stored"][:-1]
    )
    refuse(overlap, "overlaps another chunk")


def _check_places(path: str, nxf: Nxf, table: Table) -> None:
    """Extents and records start at the alignment; a record is one run of bytes in one file."""
    import numpy as np

    starts = [
        item.first_chunk for item in nxf.items if isinstance(item, Section) or item.n_matrices == 1
    ]
    for group in nxf.groups:
        tensors = [nxf.tensors[number] for number in group]
        end = None
        for tensor in tensors:
            chunks = slice(tensor.first_chunk, tensor.first_chunk + tensor.n_chunks)
            part = table[chunks].reshape(tensor.n_matrices, tensor.per_matrix)
            for column in range(tensor.per_matrix):
                here = part[:, column]
                if end is None:
                    shard = here["shard"]
                    aligned = here["offset"] % np.uint64(nxf.alignment) == 0
                    near = aligned
                else:
                    gap = here["offset"] - end  # wraps to a huge number where it goes back
                    near = (gap < PART_ALIGNMENT) & (here["shard"] == shard)
                if not near.all():
                    matrix = int(np.flatnonzero(~near)[0])
                    index = tensor.first_chunk + matrix * tensor.per_matrix + column
                    raise FormatError(
                        f"{path}: {describe_chunk(nxf, index)} is not where its record has it: at "
                        f"byte {int(here['offset'][matrix])}"
                    )
                end = here["offset"] + here["stored"]
    wrong = [i for i in starts if int(table["offset"][i]) % nxf.alignment]
    if wrong:
        raise FormatError(
            f"{path}: {describe_chunk(nxf, wrong[0])} starts at byte "
            f"{int(table['offset'][wrong[0]])}, not a multiple of {nxf.alignment}"
        )


def describe_chunk(nxf: Nxf, index: int) -> str:
    """Name a chunk as people know it: its tensor, and which of its chunks."""
    items = nxf.items
    low, high = 0, len(items) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if items[middle].first_chunk <= index else (low, middle - 1)
    item = items[low]
    number = f"chunk {index - item.first_chunk} of {item.n_chunks}"
    if isinstance(item, Section):
        return f"section {item.name!r}, {number}"
    if not item.name:
        return f"the bytes from {item.offset} on of {nxf.files[item.file].name}, {number}"
    if item.n_matrices > 1:
        number += f" (expert {(index - item.first_chunk) // item.per_matrix})"
    return f"tensor {item.name!r}, {number}"
