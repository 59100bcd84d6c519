"""What llama.cpp puts on one GPU when it is told how many layers: names and bytes. Pure.

It offloads the output head first and then the last layers, whole, each with its KV cache; as soon
as anything is there, compute buffers are as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from nexus_ext.placement import memory
from nexus_ext.placement.mip import slots_of
from nexus_ext.types import Catalog


@dataclass(frozen=True, slots=True)
class GpuPart:
    """The part of a model that is on a GPU."""

    n_layers: int  # as llama.cpp counts: the head is one
    names: frozenset[str]  # of tensors that are there and not in main memory
    weight_bytes: int  # the copy of a tied embedding included
    kv_bytes: int
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.compute_bytes


NOTHING = GpuPart(0, frozenset(), 0, 0, 0)


def gpu_part(catalog: Catalog, context: memory.Context, n_layers: int) -> GpuPart:
    """Return what the last `n_layers` layers (the head counts as one) put on a GPU."""
    slots = slots_of(catalog, memory.kv_layer_bytes(catalog, context))
    n = min(n_layers, len(slots))
    if n <= 0:
        return NOTHING
    there = slots[-n:]
    return GpuPart(
        n_layers=n,
        names=frozenset(tensor.name for slot in there for tensor in slot.tensors),
        weight_bytes=sum(slot.weight_bytes for slot in there),
        kv_bytes=sum(slot.kv_bytes for slot in there),
        compute_bytes=memory.graph_bytes(catalog, context),
    )


def largest_part(catalog: Catalog, context: memory.Context, room_bytes: int) -> GpuPart:
    """Return the part with most layers that takes at most `room_bytes`."""
    best = NOTHING
    while True:
        more = gpu_part(catalog, context, best.n_layers + 1)
        if more.n_layers == best.n_layers or more.total_bytes > room_bytes:
            return best
        best = more
