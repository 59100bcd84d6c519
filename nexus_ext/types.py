"""Values that every layer shares: what a model file holds.

No I/O here and no policy: a catalog is filled in by `nexus_ext.formats` and read by everyone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class Role(str, Enum):
    """What a tensor does in the graph; placement and paging depend on nothing else."""

    TOKEN_EMBEDDING = "token_embedding"  # gathered by row: one row a token (GET_ROWS)
    OUTPUT = "output"  # the language model head
    ATTENTION = "attention"  # dense matrices of attention and recurrent blocks
    FFN = "ffn"  # dense feed-forward matrices
    SHARED_EXPERT = "shared_expert"  # dense, used by every token
    EXPERT = "expert"  # (n_in, n_out, n_experts): the router picks a few experts a token
    ROUTER = "router"  # picks the experts
    SMALL = "small"  # norms, biases, scales and the like: always resident
    OTHER = "other"  # unknown matrices: resident


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of a model (a split GGUF has several)."""

    path: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where the bytes of one tensor are, and what it is."""

    name: str
    shape: tuple[int, ...]  # ggml order, innermost first: (n_in, n_out, n_experts)
    type_name: str  # ggml type, for instance "Q4_K"
    file: int  # index into Catalog.files
    offset: int  # bytes from the start of that file
    nbytes: int
    role: Role
    layer: int | None  # None for tensors outside of the repeating layers
    tied_output: bool = False  # the token embedding that also serves as the output head

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row, the smallest part that a matrix product can use."""
        rows = self.n_rows
        return self.nbytes // rows if rows else self.nbytes

    @property
    def n_rows(self) -> int:
        rows = 1
        for extent in self.shape[1:]:
            rows *= extent
        return rows

    @property
    def n_experts(self) -> int:
        """Number of experts stacked in this tensor; 0 when it is not an expert tensor."""
        return self.shape[2] if self.role is Role.EXPERT and len(self.shape) > 2 else 0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The hyperparameters that memory and cost depend on (0 where a model has none)."""

    architecture: str
    n_layers: int
    n_embd: int
    n_ff: int
    n_heads: int
    n_heads_kv: tuple[int, ...]  # per layer; 0 for layers without attention cache
    head_dim_k: int
    head_dim_v: int
    n_vocab: int
    n_ctx_train: int
    n_experts: int
    n_experts_used: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor that is stored, checked and decoded by itself."""

    file: int  # index into Catalog.files
    offset: int  # bytes from the start of that file
    stored_nbytes: int
    raw_nbytes: int  # decoded
    codec: str  # "raw", "ans", "zstd", or of a plugin
    hash: int  # xxh3-64 of the stored bytes


@dataclass(frozen=True, slots=True)
class TensorChunks:
    """How one tensor is cut: byte `i` of matrix `m` is in chunk `m * per_matrix + i // nbytes`."""

    n_matrices: int  # the experts of a tensor that is stored by expert, else 1
    matrix_nbytes: int
    chunk_nbytes: int  # decoded, of every chunk but the last of each matrix
    chunks: tuple[Chunk, ...]  # by matrix, then by place in it

    @property
    def per_matrix(self) -> int:
        return len(self.chunks) // self.n_matrices

    def of_matrix(self, matrix: int) -> tuple[Chunk, ...]:
        """Return the chunks of one matrix: of one expert."""
        return self.chunks[matrix * self.per_matrix : (matrix + 1) * self.per_matrix]

    def span(self) -> tuple[int, int, int] | None:
        """Return (file, offset, bytes) if the tensor lies there as it is, else None."""
        first = self.chunks[0]
        end = first.offset
        for chunk in self.chunks:
            if chunk.codec != "raw" or chunk.file != first.file or chunk.offset != end:
                return None
            end += chunk.stored_nbytes
        return first.file, first.offset, end - first.offset


@dataclass(frozen=True, slots=True)
class ChunkSummary:
    """What a container with chunks says of itself."""

    writer: str
    sources: tuple[tuple[str, str], ...]  # (name of a GGUF file, its SHA-256 or "")
    raw_nbytes: int
    stored_nbytes: int
    chunks_by_codec: Mapping[str, int]
    n_groups: int  # of tensors whose experts make records
    n_records: int
    sections: Mapping[str, int]  # name -> bytes


class ChunkTable(Protocol):
    """Where the bytes of the tensors of a container with chunks are."""

    def __hash__(self) -> int: ...

    def summary(self) -> ChunkSummary: ...

    def chunks_of(self, tensor: str) -> TensorChunks:
        """Return the chunks of a tensor of the catalog; KeyError for another name."""
        ...


@dataclass(frozen=True, slots=True)
class Catalog:
    """Everything that a model's header says, and nothing of its weights.

    In a container with chunks ("nxf"), `file` and `offset` of a tensor are those of its first
    chunk; where all of its bytes are, and how they are encoded, `chunks` alone says.
    """

    files: tuple[FileInfo, ...]
    shape: ModelShape
    tensors: tuple[TensorInfo, ...]  # file order
    metadata: Mapping[str, object]  # the GGUF key-value pairs; arrays of tokens as sizes only
    fingerprint: str  # xxh3-128 of headers and file sizes: names this exact model
    # One GGUF header that describes all files as one, and per tensor (in `tensors` order) the
    # offset which that header gives it. For a single file: its own header and offsets.
    header: bytes
    virtual_offsets: tuple[int, ...]
    virtual_nbytes: int
    container: str = "gguf"  # or "nxf", or the name of a plugin's reader
    chunks: ChunkTable | None = None  # None where tensors lie in the files as they are

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def file_nbytes(self) -> int:
        return sum(f.nbytes for f in self.files)
