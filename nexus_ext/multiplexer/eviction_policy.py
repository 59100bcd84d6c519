"""The built-in eviction policy: the pure functions of `eviction`, behind the hook of plugins."""

from __future__ import annotations

from nexus_ext.hookspecs import hookimpl
from nexus_ext.multiplexer import eviction
from nexus_ext.multiplexer.eviction import Activation, Memory, Step
from nexus_ext.policies.base import EvictionPolicy


class UnitsThenModels:
    """Units before models, the lowest priority and the longest unused first."""

    name = "units-then-models"

    def activate(self, memory: Memory, name: str) -> Activation | None:
        return eviction.activate(memory, name)

    def make_room(
        self, memory: Memory, wanted_bytes: int, name: str, *, unload: bool = True
    ) -> tuple[Step, ...] | None:
        return eviction.make_room(memory, wanted_bytes, name, unload=unload)


@hookimpl
def nexus_eviction_policy() -> EvictionPolicy:
    return UnitsThenModels()
