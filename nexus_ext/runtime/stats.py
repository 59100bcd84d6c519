"""The accounting of a run: what was read, what it cost, and how near to the bound it came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nexus_ext.core import ModelStats, PluginUse, Prediction
from nexus_ext.runtime.expert_prediction import describe


@dataclass(frozen=True, slots=True)
class RunStats:
    """Since the model was opened or `reset_stats` was called.

    `bound_fraction` is the time that the bytes read would have taken at the disk's measured rate,
    divided by the time that the graphs took: 1.0 is the physical limit. None when nothing was read.
    """

    passes: int  # graphs computed: one a decoded token, one a micro-batch of a prompt
    segments_per_pass: float
    bytes_read: int  # from the disk, for graphs (not for loading)
    bytes_loaded: int  # from the disk, into resident memory
    bytes_used: int  # streamed weights that computations consumed
    read_per_pass_bytes: float
    hit_rate: float  # slabs that were there when they were asked for
    expert_hit_rate: float | None  # experts that the cache served; None without a cache
    pieces_dropped: int  # read ahead and not used
    demand_reads: int  # rows and experts
    wait_s: float  # computation stood still for a read
    compute_s: float
    pass_s: float
    load_s: float
    bound_tok_s: float | None  # at the bytes that each pass read
    bound_fraction: float | None
    prefetched_bytes: int  # experts that were predicted and read, or began to be
    prefetch_used_bytes: int  # those of them that a router then asked for
    prefetch_wasted_bytes: int  # read, and left the cache without having been asked for
    preloaded_bytes: int  # popular experts, before the first graph
    idle_s: float  # computing while the disk had nothing to do, but for predictions
    predicting: bool
    prediction: str  # why, in a sentence; "" without a cache of experts
    cache_policy: str  # what evicts experts; "" without a cache of experts
    policy_s: float  # that it took, a predictor of a plugin included
    disabled: tuple[str, ...]  # plugins that failed in this process, and why; others took over
    retries: int
    stored_bytes: int  # chunks of an NXF that were checked and decoded, as they are stored
    raw_bytes: int  # the same, decoded
    decode_s: float  # that this took, all threads together
    resident_bytes: int  # pinned weights, ring, scratch, expert cache, chunks on their way
    io_engine: str
    io_mode: str
    direct_reason: str
    kernels: str  # our implementation that computes ternary products: "avx2", ...; "ggml": none
    packed_products: int  # computed by our kernels since the model was opened: resident weights,
    stored_products: int  # streamed ones and experts, as they are stored,
    device_products: int  # and those on the OpenCL device
    plugin_products: int  # computed by kernels of plugins


def run_stats(
    stats: ModelStats,
    disk_bytes_s: float,
    *,
    io_engine: str,
    io_mode: str,
    direct_reason: str,
    prediction: Prediction,
    cache_policy: PluginUse,
    predictor: PluginUse,
    failed: tuple[str, ...] = (),
    kernels: str,
    products: Mapping[str, int],
) -> RunStats:
    """Derive the accounting from the core's counters and the disk's measured bandwidth."""
    read = max(stats.bytes_read - stats.bytes_loaded, 0)
    passes = max(stats.passes, 1)
    pass_s = stats.pass_ns / 1e9
    streamed = read > 0 and pass_s > 0
    return RunStats(
        passes=stats.passes,
        segments_per_pass=stats.segments / passes,
        bytes_read=read,
        bytes_loaded=stats.bytes_loaded,
        bytes_used=stats.bytes_used,
        read_per_pass_bytes=read / passes,
        hit_rate=stats.pieces_ready / stats.pieces if stats.pieces else 1.0,
        expert_hit_rate=1 - stats.expert_misses / stats.expert_uses if stats.expert_uses else None,
        pieces_dropped=stats.pieces_dropped,
        demand_reads=stats.demand_reads,
        wait_s=stats.wait_ns / 1e9,
        compute_s=stats.compute_ns / 1e9,
        pass_s=pass_s,
        load_s=stats.load_ns / 1e9,
        bound_tok_s=disk_bytes_s * stats.passes / read if streamed else None,
        bound_fraction=read / disk_bytes_s / pass_s if streamed else None,
        prefetched_bytes=stats.prefetched,
        prefetch_used_bytes=stats.prefetch_used,
        prefetch_wasted_bytes=stats.prefetch_wasted,
        preloaded_bytes=stats.preloaded,
        idle_s=stats.idle_ns / 1e9,
        predicting=prediction.on,
        prediction=describe(prediction) if stats.cache_bytes else "",
        cache_policy=cache_policy.name if stats.cache_bytes else "",
        policy_s=(cache_policy.ns + predictor.ns) / 1e9,
        disabled=(
            *(f"{use.name}: {use.why}" for use in (cache_policy, predictor) if use.why),
            *failed,
        ),
        retries=stats.retries,
        stored_bytes=stats.stored_bytes,
        raw_bytes=stats.raw_bytes,
        decode_s=stats.decode_ns / 1e9,
        resident_bytes=stats.pinned_bytes
        + stats.ring_bytes
        + stats.scratch_bytes
        + stats.cache_bytes
        + stats.bounce_bytes,
        io_engine=io_engine,
        io_mode=io_mode,
        direct_reason=direct_reason,
        kernels=kernels,
        packed_products=products["packed"],
        stored_products=products["stored"],
        device_products=products["opencl"],
        plugin_products=products["plugin"],
    )
