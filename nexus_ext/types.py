"""Values that every layer shares: what a model file holds.

No I/O here and no policy: a catalog is filled in by `nexus_ext.formats` and read by everyone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


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
class Catalog:
    """Everything that a model's header says, and nothing of its weights."""

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

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def file_nbytes(self) -> int:
        return sum(f.nbytes for f in self.files)
