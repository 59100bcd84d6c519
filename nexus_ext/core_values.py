"""What the native library reports of a model, as values. Knows nothing of how it is asked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelStats:
    """What a model has done since it was opened or `reset_stats`. Names as in nexus_core.h."""

    passes: int
    segments: int
    bytes_read: int
    bytes_loaded: int
    bytes_used: int
    pieces: int
    pieces_ready: int
    pieces_dropped: int
    demand_reads: int
    whole_tensors: int
    wait_ns: int
    compute_ns: int
    pass_ns: int
    load_ns: int
    retries: int
    short_reads: int
    bounces: int
    expert_uses: int
    expert_misses: int
    expert_evictions: int
    prefetched: int
    prefetch_used: int
    prefetch_wasted: int
    preloaded: int
    idle_ns: int
    predict_ns: int
    pinned_bytes: int
    ring_bytes: int
    scratch_bytes: int
    host_bytes: int
    cache_bytes: int
    bounce_bytes: int  # memory of the threads that decode chunks
    stored_bytes: int  # of chunks that were checked and decoded
    raw_bytes: int  # the same, decoded
    decode_ns: int  # summed over threads


@dataclass(frozen=True, slots=True)
class Prediction:
    """Whether experts are predicted, and why: nexus_predict.h."""

    state: str  # "fixed", "watching", "no_stall", "no_idle", "trying", "slower", "faster"
    on: bool
    trials: int
    switches: int
    idle: float  # shares of the time of passes without prediction, as last watched
    stall: float
    on_s: float  # median pass of the last trial; 0: there was none
    off_s: float


@dataclass(frozen=True, slots=True)
class FileIo:
    """How one file of a model is read."""

    direct: bool
    reason: str
    offset_align: int
    mem_align: int


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of the trace: `kind` is a name, `a` and `b` as nexus_core.h explains."""

    t_ns: int
    kind: str
    a: int
    b: int
