"""How long a token takes: bytes moved per tensor, and a model of reading beside computing.

A decode step is bound by bytes: each active weight passes the processor once (compute time =
bytes / what memory and cores get through), each streamed weight passes the disk first. Dense
weights are read ahead in graph order, so their reading overlaps with their computing; experts are
known only when the router has run and the row of the embedding only when a token was sampled, so
those reads are waited for, and the ring is too short to read much ahead meanwhile:

    token_s = waited_s + expert_s + (1 - LOSS) max(ahead_s, dense_s) + LOSS (ahead_s + dense_s)

with expert_s and dense_s for computing. At LOSS = 0 the shorter of reading and computing would cost
nothing, but reading takes processor time and memory bandwidth, and waits behind experts.

Not modelled: attention over a long KV cache, and types that are slower to compute than Q4_K.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nexus_ext.placement.memory import stored_shares
from nexus_ext.placement.plan import GPU, NVME, Prediction
from nexus_ext.types import Catalog, ModelShape, Role, TensorInfo

if TYPE_CHECKING:
    from nexus_ext.hardware.profile import Gpu, HardwareProfile

DEFAULT_DISK_BYTES_S: Final = 1.5e9  # an ordinary NVMe drive, when none was measured
DEFAULT_GPU_BYTES_S: Final = 200e9  # a small discrete GPU, when the profile does not say
# Share of the measured memory bandwidth that llama.cpp's matrix-vector products reach.
COMPUTE_EFFICIENCY: Final = 0.7
# What one core gets through at most: 4.3 to 5.5 GB/s of Q4_K were measured with AVX2.
CORE_BYTES_S: Final = 5e9
# The part of the shorter of reading and computing that overlapping them does not hide.
OVERLAP_LOSS: Final = 0.25
# Tokens of a micro-batch that take as long as one decoded token: 13 to 16 were measured (Q4_K).
PREFILL_REUSE: Final = 12

# Roles that the backend can page. All others stay where llama.cpp puts them.
PAGED: Final = frozenset(
    (
        Role.TOKEN_EMBEDDING,
        Role.OUTPUT,
        Role.ATTENTION,
        Role.FFN,
        Role.SHARED_EXPERT,
        Role.EXPERT,
    )
)


@dataclass(frozen=True, slots=True)
class Rates:
    """Bandwidths that a prediction is made with."""

    disk_bytes_s: float  # sequential, many requests in flight
    random: Mapping[int, float]  # bytes of a record -> bytes/s of reading such records anywhere
    cpu_bytes_s: float
    gpu_bytes_s: float

    def random_bytes_s(self, n_bytes: int) -> float:
        return self.random.get(n_bytes, self.disk_bytes_s)


def is_dense(tensor: TensorInfo) -> bool:
    """Return whether a streamed tensor passes through the ring, all of it, for each token."""
    if tensor.role is Role.TOKEN_EMBEDDING:
        return tensor.tied_output
    return tensor.role in PAGED and not tensor.n_experts


def record_bytes(tensor: TensorInfo) -> int:
    """Return what is read at once when it is not read in order: an expert, or a row."""
    return tensor.nbytes // tensor.n_experts if tensor.n_experts else tensor.row_nbytes


def token_bytes(tensor: TensorInfo, shape: ModelShape, *, row_only: bool = False) -> int:
    """Return the bytes of `tensor` that one decoded token uses.

    `row_only`: a tied embedding whose copy on the GPU does the work of the output head.
    """
    if tensor.role is Role.TOKEN_EMBEDDING and (row_only or not tensor.tied_output):
        return tensor.row_nbytes
    if tensor.n_experts:
        used = min(shape.n_experts_used or tensor.n_experts, tensor.n_experts)
        return record_bytes(tensor) * used
    return tensor.nbytes


def batch_bytes(tensor: TensorInfo, shape: ModelShape, n_tokens: int) -> int:
    """Return the bytes of `tensor` that a micro-batch uses, its tokens routed independently."""
    one = token_bytes(tensor, shape)
    if one == tensor.nbytes:
        return one
    if tensor.n_experts:
        share = 1 - (1 - one / tensor.nbytes) ** n_tokens
        return math.ceil(tensor.nbytes * share)
    return min(one * n_tokens, tensor.nbytes)


def read_s(tensor: TensorInfo, shape: ModelShape, rates: Rates, *, row_only: bool = False) -> float:
    """Return the seconds of reading that a streamed `tensor` costs per decoded token."""
    n_bytes = token_bytes(tensor, shape, row_only=row_only)
    if is_dense(tensor) and not row_only:
        return n_bytes / rates.disk_bytes_s
    return n_bytes / rates.random_bytes_s(record_bytes(tensor))


def rates_of(
    catalog: Catalog, hardware: HardwareProfile, gpu: Gpu | None, n_threads: int
) -> tuple[Rates, tuple[str, ...]]:
    """Return the rates of a machine for a model, and notes on those that had to be assumed."""
    notes = []
    records = {record_bytes(t) for t in catalog.tensors if t.role in PAGED}
    disk = hardware.disk
    if any(point.pattern == "sequential" for point in disk.points):
        sequential = disk.sequential_bytes_s
        random = {n_bytes: disk.random_bytes_s(n_bytes) for n_bytes in records}
    else:
        sequential = DEFAULT_DISK_BYTES_S
        random = dict.fromkeys(records, DEFAULT_DISK_BYTES_S)
        notes.append(
            f"The disk was not measured: {DEFAULT_DISK_BYTES_S / 1e9:.1f} GB/s are assumed, "
            "and the predictions are no better than that."
        )
    cpu = hardware.memory.bandwidth_bytes_s * COMPUTE_EFFICIENCY
    cpu = min(cpu, max(n_threads, 1) * CORE_BYTES_S)
    gpu_bytes_s = cpu
    if gpu is not None:
        measured = gpu.bandwidth_bytes_s
        if measured is None and gpu.unified:
            measured = hardware.memory.bandwidth_bytes_s
        if measured is None:
            measured = DEFAULT_GPU_BYTES_S
            notes.append(
                f"The bandwidth of {gpu.name} is not known: "
                f"{DEFAULT_GPU_BYTES_S / 1e9:.0f} GB/s are assumed."
            )
        gpu_bytes_s = measured * COMPUTE_EFFICIENCY
    return Rates(sequential, random, cpu, gpu_bytes_s), tuple(notes)


@dataclass(frozen=True, slots=True)
class Compute:
    """Seconds of computing per decoded token."""

    dense_s: float = 0.0  # the ring is filled meanwhile
    expert_s: float = 0.0  # it is not

    @property
    def total_s(self) -> float:
        return self.dense_s + self.expert_s

    def plus(self, tensor: TensorInfo, seconds: float) -> Compute:
        """Return this with `seconds` of computing with `tensor`."""
        if tensor.n_experts:
            return Compute(self.dense_s, self.expert_s + seconds)
        return Compute(self.dense_s + seconds, self.expert_s)


def token_seconds(waited_s: float, ahead_s: float, compute: Compute) -> float:
    """Return the time of a decoded token; see the module's docstring."""
    overlapped_s = (1 - OVERLAP_LOSS) * max(ahead_s, compute.dense_s)
    return waited_s + compute.expert_s + overlapped_s + OVERLAP_LOSS * (ahead_s + compute.dense_s)


def predict(
    catalog: Catalog,
    tiers: Mapping[str, str],
    rates: Rates,
    n_ubatch: int,
    missing: Mapping[str, float] | None = None,
) -> tuple[Prediction, int]:
    """Return what a placement leads to, and its streamed bytes per decoded token.

    `missing`: tensors with a cache, and the part of their use that it does not serve.
    """
    shape = catalog.shape
    stored = stored_shares(catalog)
    head_on_gpu = output_on_gpu(catalog.tensors, tiers)
    ahead_s = waited_s = batch_read_s = batch_compute_s = 0.0
    compute = Compute()
    streamed = 0
    fastest = rates.disk_bytes_s
    for tensor in catalog.tensors:
        row_only = tensor.tied_output and head_on_gpu
        used = token_bytes(tensor, shape, row_only=row_only)
        on_gpu = tiers[tensor.name] == GPU
        compute = compute.plus(tensor, used / (rates.gpu_bytes_s if on_gpu else rates.cpu_bytes_s))
        if row_only:
            compute = compute.plus(tensor, tensor.nbytes / rates.gpu_bytes_s)
        in_batch = batch_bytes(tensor, shape, n_ubatch)
        batch_compute_s += in_batch / (rates.gpu_bytes_s if on_gpu else rates.cpu_bytes_s)
        if tiers[tensor.name] != NVME:
            continue
        share = missing.get(tensor.name, 1.0) if missing else 1.0
        share *= stored.get(tensor.name, 1.0)  # what is read is what is stored
        streamed += math.ceil(used * share)
        seconds = read_s(tensor, shape, rates, row_only=row_only) * share
        if is_dense(tensor) and not row_only:
            ahead_s += seconds
            batch_read_s += in_batch / rates.disk_bytes_s
        else:
            waited_s += seconds
            batch_read_s += in_batch / rates.random_bytes_s(record_bytes(tensor))
            fastest = max(fastest, rates.random_bytes_s(record_bytes(tensor)))
    token_s = token_seconds(waited_s, ahead_s, compute)
    # Products over many tokens are bound by arithmetic, not by the one pass over the weights.
    batch_compute_s = max(batch_compute_s, compute.total_s * n_ubatch / PREFILL_REUSE)
    batch_s = max(batch_read_s, batch_compute_s)
    prediction = Prediction(
        read_s=waited_s + ahead_s,
        compute_s=compute.total_s,
        token_s=token_s,
        tok_s=1 / token_s if token_s else 0.0,
        bound_tok_s=fastest / streamed if streamed else math.inf,
        prefill_read_s=batch_read_s,
        prefill_compute_s=batch_compute_s,
        prefill_tok_s=n_ubatch / batch_s if batch_s else 0.0,
    )
    return prediction, streamed


def output_on_gpu(tensors: Iterable[TensorInfo], tiers: Mapping[str, str]) -> bool:
    """Return whether the output head runs on the GPU (a layer there implies it)."""
    return any(tiers[tensor.name] == GPU for tensor in tensors)
