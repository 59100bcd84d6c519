"""The built-in allocator: the least loss within the size, behind the hook that others use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nexus_ext.hookspecs import hookimpl
from nexus_ext.policies.base import QuantizationAllocator

if TYPE_CHECKING:
    from nexus_ext.quality.allocation import Allocation, Item


class LeastLoss:
    """Solve the multiple-choice knapsack problem of `nexus_ext.quality.allocation`."""

    name = "least-loss"

    def allocate(self, items: Sequence[Item], budget_nbytes: int) -> Allocation:
        from nexus_ext.quality.allocation import allocate  # when it is asked, not at registration

        return allocate(items, budget_nbytes)


@hookimpl
def nexus_quantization_allocator() -> QuantizationAllocator:
    return LeastLoss()
