"""A replay as rows for people: hits beside Belady's optimum, bytes a token, predicted speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from nexus_ext.routing.policies import GLOBAL_LRU
from nexus_ext.routing.replay import ByCode, Replay, global_lru, replay
from nexus_ext.routing.trace import RoutingTrace

_STEPS: Final = 8  # sizes of a table


@dataclass(frozen=True, slots=True)
class Row:
    """One policy at one size."""

    policy: str
    slots: int  # the most that a layer has
    cache_bytes: int
    share: float  # of all experts that have a slot
    hit_rate: float
    below_belady: float  # what the optimum hits beyond that
    bytes_per_token: float
    tok_s: float | None  # None when neither reading nor computing takes any time that is known


def slots_of(trace: RoutingTrace, cache_bytes: int) -> tuple[int, ...]:
    """Return the slots of each layer in a cache of `cache_bytes`, as the planner would have it."""
    per_slot = sum(layer.slot_bytes for layer in trace.layers)
    slots = cache_bytes // per_slot if per_slot else 0
    return tuple(min(slots, layer.n_experts) for layer in trace.layers)


def slots_of_share(trace: RoutingTrace, share: float) -> tuple[int, ...]:
    """Return the slots of each layer when `share` of its experts have one."""
    return tuple(int(layer.n_experts * share + 1e-9) for layer in trace.layers)


def default_sizes(trace: RoutingTrace) -> list[tuple[int, ...]]:
    """Return sizes from what one token uses to everything."""
    used = max((layer.n_used for layer in trace.layers), default=0)
    most = max((layer.n_experts for layer in trace.layers), default=0)
    steps = {used, *(most * i // _STEPS for i in range(1, _STEPS + 1))}
    return [
        tuple(min(max(slots, layer.n_used), layer.n_experts) for layer in trace.layers)
        for slots in sorted(steps)
        if slots >= used
    ]


def report(
    trace: RoutingTrace,
    policies: Sequence[str],
    sizes: Sequence[Sequence[int]],
    *,
    disk_bytes_s: float = 0.0,
    compute_s: float = 0.0,
    by_code: ByCode | None = None,
) -> list[Row]:
    """Return a row for each size and policy. A rate or time of 0 is not known and costs nothing.

    `by_code` as for `replay`.

    Experts are read when the router has picked them, so that reading and computing add up; weights
    other than experts are not in the trace and are taken to be in memory.
    """
    lanes = [name for name in policies if name not in (GLOBAL_LRU, "belady")]
    rows = []
    replayed = replay(trace, [*lanes, "belady"], sizes, by_code=by_code)
    for size, found in zip(sizes, replayed, strict=True):
        by_policy = {result.policy: result for result in found}
        if GLOBAL_LRU in policies:
            by_policy[GLOBAL_LRU] = global_lru(trace, sum(size))
        best = by_policy["belady"].hit_rate
        pairs = list(zip(size, trace.layers, strict=True))
        n_experts = sum(layer.n_experts for layer in trace.layers)
        for policy in policies:
            result = by_policy[policy]
            rows.append(
                Row(
                    policy=policy,
                    slots=max(size, default=0),
                    cache_bytes=sum(slots * layer.slot_bytes for slots, layer in pairs),
                    share=sum(size) / n_experts if n_experts else 0.0,
                    hit_rate=result.hit_rate,
                    below_belady=best - result.hit_rate,
                    bytes_per_token=result.bytes_per_token,
                    tok_s=_tok_s(result, disk_bytes_s, compute_s),
                )
            )
    return rows


def _tok_s(result: Replay, disk_bytes_s: float, compute_s: float) -> float | None:
    read_s = result.bytes_per_token / disk_bytes_s if disk_bytes_s else 0.0
    token_s = read_s + compute_s
    return 1.0 / token_s if token_s else None
