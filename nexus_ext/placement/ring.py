"""How large the ring, its slabs and the scratch area are.

The ring is a circular buffer through which streamed dense weights pass, slab by slab; it must be
long enough that the disk never waits for the processor. The scratch area holds what cannot be
read ahead: rows of the embedding, and the experts that a micro-batch asks for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from nexus_ext.placement.costs import is_dense, record_bytes
from nexus_ext.placement.memory import KIB, MIB, PAGE, round_up
from nexus_ext.types import TensorInfo

SLACK: Final = 2 * PAGE  # direct reads cover up to a page before and after what is wanted
MIN_SLAB: Final = 64 * KIB  # in budgets too small for better; a larger ring has larger slabs
MAX_SLAB: Final = 8 * MIB
MIN_SLABS: Final = 3  # one computed, one arriving, one that the next cannot share
AIM_SLABS: Final = 6
LEAST_TARGET: Final = 64 * MIB
MOST_TARGET: Final = 256 * MIB
READ_AHEAD_S: Final = 0.040  # reading that the ring should hold: a slow layer's computing
LEAST_ROWS: Final = 4  # of a slab: fewer would take other paths in the kernels
MAX_ROWS: Final = 64  # rows of the embedding in the scratch area at a time
MAX_WAVE: Final = 16  # experts in the scratch area at a time
TIED_ROWS: Final = 8  # the same for an embedding that is also the output head: ring and scratch
SCRATCH_SPARE: Final = PAGE  # to align the start of the area


@dataclass(frozen=True, slots=True)
class RingSize:
    """The limits of a ring for a set of tensors that may be streamed. All zero: none is."""

    smallest: int
    target: int

    def of(self, free_bytes: int, missing_bytes: int) -> int | None:
        """Return the ring for `free_bytes` that ring and pinned weights share; None: too few.

        At most a quarter of what is free, and no more than is `missing_bytes` anyhow (what
        could not be pinned without any ring), for each byte of the ring is one more to stream.
        What is left for pinning never shrinks when `free_bytes` grows.
        """
        if free_bytes < self.smallest:
            return None
        return max(self.smallest, min(self.target, free_bytes // 4, missing_bytes))


def ring_size(streamable: Iterable[TensorInfo], disk_bytes_s: float) -> RingSize:
    """Return the ring's limits when any of `streamable` (dense tensors) may be streamed."""
    tensors = list(streamable)
    if not tensors:
        return RingSize(0, 0)
    low, high = _slab_limits(tensors)
    smallest = MIN_SLABS * (low + SLACK) + tied_rows_bytes(tensors)
    wanted = min(max(int(disk_bytes_s * READ_AHEAD_S), LEAST_TARGET), MOST_TARGET)
    useful = sum(round_up(t.nbytes, PAGE) + SLACK for t in tensors)
    target = max(smallest, min(max(wanted, 4 * (high + SLACK)), useful))
    return RingSize(smallest, round_up(target, PAGE))


def slab_bytes(streamed: Iterable[TensorInfo], ring_bytes: int) -> int:
    """Return the slab for a ring, a multiple of a page; 0 without a ring."""
    tensors = list(streamed)
    if not tensors or not ring_bytes:
        return 0
    low, high = _slab_limits(tensors)
    return min(max(ring_bytes // AIM_SLABS // PAGE * PAGE, low), high)


def _slab_limits(tensors: list[TensorInfo]) -> tuple[int, int]:
    row = round_up(LEAST_ROWS * max(t.row_nbytes for t in tensors), PAGE)
    largest = round_up(max(t.nbytes for t in tensors), PAGE)
    return max(row, min(MIN_SLAB, largest)), max(row, min(MAX_SLAB, largest))


def tied_rows_bytes(streamed: Iterable[TensorInfo]) -> int:
    """Return the scratch area for the rows of a tied embedding among `streamed`; 0 without one.

    Such a tensor passes through the ring as the output head, and its rows are gathered as the
    embedding. A ring is always sized for both, and gives up this part when the tensor is streamed.
    """
    return max((_rows_area(t, TIED_ROWS) for t in streamed if t.tied_output), default=0)


def _rows_area(tensor: TensorInfo, rows: int) -> int:
    return round_up(rows * (round_up(tensor.row_nbytes, 512) + SLACK), PAGE) + SCRATCH_SPARE


def scratch_bytes(tensor: TensorInfo, n_ubatch: int, *, row_only: bool = False) -> int:
    """Return the scratch area that streaming `tensor` needs; 0 for one that uses the ring."""
    if is_dense(tensor) and not row_only:
        return 0
    if tensor.n_experts:
        # Prefill may ask for all experts of a tensor: it then computes in waves of this many.
        wave = min(tensor.n_experts, MAX_WAVE)
        return wave * round_up(record_bytes(tensor) + SLACK, PAGE) + SCRATCH_SPARE
    return _rows_area(tensor, min(max(n_ubatch, 1), MAX_ROWS))
