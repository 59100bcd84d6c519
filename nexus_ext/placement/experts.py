"""The expert cache in a plan: which tensors share records, and how many slots each layer gets.

A record is all parts (gate, up, down) of one expert of one layer. Each layer has slots of its own,
all layers the same number: routing is known only when it happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from nexus_ext.placement.memory import PAGE, round_up
from nexus_ext.placement.plan import NVME, RAM, ExpertCache
from nexus_ext.types import ModelShape, Role, TensorInfo

MAX_PARTS: Final = 4  # of a record, as in native/cache.h
SLACK: Final = PAGE  # before and after each part, as in native/cache.c
REUSE: Final = 0.15  # see hit_rate


def groups(tensors: Iterable[TensorInfo]) -> list[tuple[TensorInfo, ...]]:
    """Return the expert tensors by layer, in the order in which a layer computes with them."""
    layers: dict[int, list[TensorInfo]] = {}
    for tensor in tensors:
        if tensor.role is Role.EXPERT and tensor.n_experts > 1 and tensor.layer is not None:
            layers.setdefault(tensor.layer, []).append(tensor)
    found = []
    for layer in sorted(layers):
        parts = sorted(layers[layer], key=lambda t: ("down" in t.name, t.offset))
        if len({t.n_experts for t in parts}) == 1 and len(parts) <= MAX_PARTS:
            found.append(tuple(parts))
    return found


def slot_bytes(parts: Iterable[TensorInfo]) -> int:
    """Return the bytes of one slot: native/cache.c, nx_record_layout."""
    at = 0
    for tensor in parts:
        begin = at + SLACK + tensor.offset % PAGE
        at = round_up(begin + tensor.nbytes // tensor.n_experts + SLACK, PAGE)
    return at


def hit_rate(share: float) -> float:
    """Return the part of the experts' uses that a cache of `share` of them serves.

    Chance gives `share`; tokens that resemble each other give more. Calibrated on a small trained
    model whose routing is more even than that of large ones, where LRU hits 29 % at a quarter and
    54 % at a half; what large models have beyond that is not counted on.
    """
    return min(1.0, share + REUSE * share * (1.0 - share))


def cacheable(
    tensors: Iterable[TensorInfo], tiers: Mapping[str, str], keep: frozenset[str]
) -> list[tuple[TensorInfo, ...]]:
    """Return the groups that may get a cache.

    Layers of which a tensor is in `keep` (pinned by the user) or not in main memory are left alone.
    """
    return [
        parts
        for parts in groups(tensors)
        if all(tiers[t.name] in (RAM, NVME) and t.name not in keep for t in parts)
    ]


def caches(
    found: list[tuple[TensorInfo, ...]], shape: ModelShape, budget_bytes: int
) -> tuple[ExpertCache, ...]:
    """Return the caches of these groups that `budget_bytes` give.

    None when they cannot hold one token's experts.
    """
    per_slot = sum(slot_bytes(parts) for parts in found)
    slots = budget_bytes // per_slot if per_slot else 0
    if slots < max(shape.n_experts_used, 1):
        return ()
    return tuple(
        ExpertCache(
            tensors=tuple(t.name for t in parts),
            slots=min(slots, parts[0].n_experts),
            nbytes=min(slots, parts[0].n_experts) * slot_bytes(parts),
        )
        for parts in found
    )
