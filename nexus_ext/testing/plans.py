"""Plans made by hand, for what the solver would hardly choose for so small a model."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from nexus_ext.errors import UsageError

if TYPE_CHECKING:
    from nexus_ext.placement import Plan


def expert_plan(
    model: str | os.PathLike[str],
    slots: int,
    *,
    wave: int = 4,
    io_mode: str = "direct",
    n_ctx: int = 128,
    n_ubatch: int = 64,
) -> Plan:
    """Plan a mixture of experts: all in memory but the experts, `slots` of each layer cached.

    With no slots each expert is read each time. `wave` is how many experts the scratch area holds,
    which is what a prompt computes at once. UsageError for a model without experts.
    """
    from nexus_ext.formats import open_model
    from nexus_ext.placement import PlanRequest, ring, solve
    from nexus_ext.placement.experts import groups, hit_rate, slot_bytes
    from nexus_ext.placement.plan import Budget, ExpertCache
    from nexus_ext.testing.hardware import machine
    from nexus_ext.types import Role

    request = PlanRequest(weights_bytes=1 << 40, gpu_bytes=0, io_mode=io_mode, n_ctx=n_ctx)
    catalog = open_model(os.fspath(model))
    resident = solve(catalog, machine(), request)
    experts = [t for t in catalog.tensors if t.role is Role.EXPERT]
    if not experts:
        raise UsageError(f"{os.fspath(model)} has no experts", hint="take a mixture of experts")
    caches = tuple(
        ExpertCache(tuple(t.name for t in parts), slots, slots * slot_bytes(parts))
        for parts in groups(experts)
        if slots
    )
    missing = 1.0 - hit_rate(slots / catalog.shape.n_experts)
    token = sum(t.nbytes // t.n_experts * catalog.shape.n_experts_used for t in experts)
    scratch = max(ring.scratch_bytes(t, n_ubatch) for t in experts)
    record = max(t.nbytes // t.n_experts for t in experts)
    scratch = min(scratch, wave * (-(-record // 512) * 512 + 2 * 4096))
    breakdown = {
        **resident.breakdown,
        "pinned weights": resident.breakdown["pinned weights"] - sum(t.nbytes for t in experts),
        "ring": 0,
        "scratch": scratch,
        "expert cache": sum(c.nbytes for c in caches),
    }
    return replace(
        resident,
        tiers={**resident.tiers, **dict.fromkeys((t.name for t in experts), "nvme")},
        ring_bytes=0,
        slab_bytes=0,
        scratch_bytes=scratch,
        budget=Budget(None, sum(breakdown.values()), 0),
        breakdown=breakdown,
        streamed_bytes_per_token=round(token * missing),
        everything_fits=False,
        expert_caches=caches,
    )
