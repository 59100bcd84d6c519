"""How a model is laid out in an NXF: chunks, records of experts, codecs, and the order on disk.

Pure: from headers and wishes to an `Nxf` and the order in which its chunks are stored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from nexus_ext.codecs import RAW
from nexus_ext.errors import UsageError
from nexus_ext.formats.nxf_header import ALIGNMENT, Extent, Nxf, Section, SourceFile
from nexus_ext.types import Catalog, Role, TensorInfo

CHUNK_NBYTES: Final = 1 << 20  # what a chunk is near to, in whole rows
# A matrix of an expert up to this size is one chunk, so that its record has as few as it can.
WHOLE_NBYTES: Final = 4 << 20
_MAX_ROW_NBYTES: Final = 16 << 20  # longer rows are cut between blocks

Order = Callable[[int, int], Sequence[int]]
"""(layer, number of experts) -> the order in which their records are stored."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Which codec each tensor gets: by its whole name, else the first expression found in it."""

    default: str = RAW
    rules: tuple[tuple[str, str], ...] = ()  # (regular expression, codec)
    named: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pattern, _ in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(
                    f"the regular expression {pattern!r} is wrong: {error}",
                    hint="A dot matches any character, '\\.' a dot.",
                ) from error

    def codec_of(self, name: str) -> str:
        if name in self.named:
            return self.named[name]
        for pattern, codec in self.rules:
            if re.search(pattern, name):
                return codec
        return self.default

    def check(self, names: Collection[str]) -> None:
        """Raise UsageError for an expression that is found in none of the names of tensors."""
        for pattern, _ in self.rules:
            if not any(re.search(pattern, name) for name in names):
                raise UsageError(
                    f"the rule {pattern!r} is found in none of the {len(names)} names",
                    hint="`nexus inspect MODEL --tensors` lists the names of tensors.",
                )

    def codecs(self) -> tuple[str, ...]:
        """Return every codec that may occur; "raw" always may, it is what others fall back to."""
        ruled = (codec for _, codec in self.rules)
        return tuple(dict.fromkeys((RAW, self.default, *ruled, *self.named.values())))


@dataclass(frozen=True, slots=True)
class Step:
    """The next chunk on disk: where it starts depends on the ones before it."""

    chunk: int
    align: int  # its start is rounded up to this; a new record or extent has the file's alignment
    codec: str  # that was asked for
    item: int  # position in Nxf.items
    offset: int  # in the item, decoded
    nbytes: int  # decoded


def chunk_nbytes(matrix_nbytes: int, row_nbytes: int, block_nbytes: int, *, whole: int) -> int:
    """Return the bytes of a chunk: whole rows, all of a matrix of up to `whole` bytes."""
    if matrix_nbytes <= whole:
        return matrix_nbytes
    if row_nbytes > _MAX_ROW_NBYTES:
        return CHUNK_NBYTES // block_nbytes * block_nbytes
    return max(1, CHUNK_NBYTES // row_nbytes) * row_nbytes


def expert_groups(tensors: Iterable[TensorInfo]) -> list[tuple[int, ...]]:
    """Return the tensors (numbers) whose experts make one record: gate, up, down of a layer."""
    layers: dict[tuple[int, str, int], list[int]] = {}
    found = list(tensors)
    for number, tensor in enumerate(found):
        if tensor.role is Role.EXPERT and tensor.n_experts > 1 and tensor.layer is not None:
            kind = tensor.name.removesuffix(".weight").rpartition("_")[2]
            layers.setdefault((tensor.layer, kind, tensor.n_experts), []).append(number)
    return [
        tuple(sorted(members, key=lambda i: _part_order(found[i].name)))
        for _, members in sorted(layers.items())
    ]


def _part_order(name: str) -> int:
    for place, part in enumerate(("_gate_up_", "_gate_", "_up_", "_down_")):
        if part in name:
            return place
    return 4


def plan_layout(
    catalog: Catalog,
    files: Sequence[SourceFile],
    rests: Iterable[tuple[int, int, int]],
    rules: Rules,
    *,
    writer: str,
    block_nbytes: Mapping[str, int],
    sections: Mapping[str, int] | None = None,
    alignment: int = ALIGNMENT,
) -> Nxf:
    """Lay out the tensors of a GGUF.

    `rests` are (file, offset, bytes) of what is neither header nor tensor nor zero, `sections` the
    sizes by name, `block_nbytes` the bytes of a block by ggml type.
    """
    groups = expert_groups(catalog.tensors)
    grouped = {number for group in groups for number in group}
    first = 0
    tensors: list[Extent] = []
    for number, tensor in enumerate(catalog.tensors):
        n_matrices = tensor.n_experts if number in grouped else 1
        extent = Extent(
            name=tensor.name,
            file=tensor.file,
            offset=tensor.offset,
            nbytes=tensor.nbytes,
            n_matrices=n_matrices,
            chunk_nbytes=chunk_nbytes(
                tensor.nbytes // n_matrices,
                tensor.row_nbytes,
                block_nbytes[tensor.type_name],
                whole=WHOLE_NBYTES if n_matrices > 1 else CHUNK_NBYTES,
            ),
            first_chunk=first,
        )
        tensors.append(extent)
        first += extent.n_chunks
    others: list[Extent] = []
    for file, offset, nbytes in rests:
        others.append(Extent("", file, offset, nbytes, 1, min(nbytes, CHUNK_NBYTES), first))
        first += others[-1].n_chunks
    named: list[Section] = []
    for name, nbytes in (sections or {}).items():
        named.append(Section(name, nbytes, min(nbytes, CHUNK_NBYTES), first))
        first += named[-1].n_chunks
    return Nxf(
        requires=(),
        uses=(),
        writer=writer,
        alignment=alignment,
        codecs=rules.codecs(),
        files=tuple(files),
        tensors=tuple(tensors),
        rests=tuple(others),
        groups=tuple(groups),
        sections=tuple(named),
        shards=(),
    )


def steps(
    nxf: Nxf, rules: Rules, part_alignment: int, order: Order | None = None
) -> Iterator[Step]:
    """Yield every chunk in the order on disk: as in the GGUF, records of a group together."""
    group_of = {number: group for group in nxf.groups for number in group}
    done: set[int] = set()
    for number, item in enumerate(nxf.items):
        codec = rules.codec_of(item.name) if isinstance(item, Extent) else rules.default
        group = group_of.get(number) if number < len(nxf.tensors) else None
        if group is None:
            yield from _run(number, item, 0, codec, nxf.alignment)
        elif number not in done:
            done |= set(group)
            yield from _records(nxf, rules, group, part_alignment, order)


def _records(
    nxf: Nxf, rules: Rules, group: tuple[int, ...], part_alignment: int, order: Order | None
) -> Iterator[Step]:
    tensors = [nxf.tensors[number] for number in group]
    codecs = [rules.codec_of(tensor.name) for tensor in tensors]
    # Parts that are stored as they are get the same place in every record.
    part = part_alignment if set(codecs) == {RAW} else 1
    n_matrices = tensors[0].n_matrices
    numbers: Sequence[int] = range(n_matrices)
    if order is not None:
        match = re.search(r"\d+", tensors[0].name)
        numbers = order(int(match[0]) if match else -1, n_matrices)
        if sorted(numbers) != list(range(n_matrices)):
            raise UsageError(f"{tensors[0].name}: the order is no order of {n_matrices} experts")
    for matrix in numbers:
        for place, (number, tensor, codec) in enumerate(zip(group, tensors, codecs, strict=True)):
            yield from _run(number, tensor, matrix, codec, part if place else nxf.alignment)


def _run(
    number: int, item: Extent | Section, matrix: int, codec: str, align: int
) -> Iterator[Step]:
    first = item.first_chunk + matrix * item.per_matrix
    for index in range(item.per_matrix):
        at = index * item.chunk_nbytes
        yield Step(
            chunk=first + index,
            align=1 if index else align,
            codec=codec,
            item=number,
            offset=matrix * item.matrix_nbytes + at,
            nbytes=min(item.chunk_nbytes, item.matrix_nbytes - at),
        )
