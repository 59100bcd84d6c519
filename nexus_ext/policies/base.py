"""The decisions that a plugin can take: the facts that a policy is given, and its shape.

Values and protocols only. A policy is an object that a hook returns once; it is asked when there is
something to decide, never while a token is computed, and what it returns is data. An answer that
its docstring does not allow disables the policy by name, and the built-in takes over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from nexus_ext.policies.native import LayerCachePolicy, LayerPredictor, NativePolicy

if TYPE_CHECKING:
    from nexus_ext.hardware.profile import HardwareProfile
    from nexus_ext.multiplexer.eviction import Activation, Memory, Step
    from nexus_ext.placement import Plan, PlanRequest
    from nexus_ext.quality.allocation import Allocation, Item
    from nexus_ext.types import Catalog

IoMode = Literal["direct", "buffered"]
CachePolicyName = Literal["adaptive", "lfru", "lru", "lfu", "least-stale"]  # policy_builtin.c
PredictorName = Literal["none", "auto", "gate", "previous", "popular"]  # as in native/predict.c
CacheChoice = CachePolicyName | NativePolicy | LayerCachePolicy
PredictorChoice = PredictorName | NativePolicy | LayerPredictor


@dataclass(frozen=True, slots=True)
class IoInfo:
    """What decides between direct reads and the page cache."""

    streamed_bytes: int  # weights on disk that are read again and again while tokens are computed
    resident_bytes: int  # what the process itself will hold: weights, pools, KV cache, runtime
    available_bytes: int  # memory that the system can give before any of that is allocated
    limit_bytes: int | None  # most that process and page cache may hold together; None: no limit


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """What decides which expert is evicted."""

    n_layers: int  # with a cache
    n_experts: int  # of a layer
    n_experts_used: int  # of a layer, by one token
    slots: int  # of a layer
    fingerprint: str = ""  # of the model, as Catalog.fingerprint; "": not known
    layers: tuple[int, ...] = ()  # numbers of the layers with a cache, in order


@runtime_checkable
class PlacementSolver(Protocol):
    """Decides which tensor lives in which memory."""

    name: str

    def solve(self, catalog: Catalog, hardware: HardwareProfile, request: PlanRequest) -> Plan:
        """Return a plan for this catalog that keeps to the request's budget.

        Raises DoesNotFit when there is none; the next solver is then asked. The same arguments give
        the same plan.
        """
        ...


@runtime_checkable
class IoPolicy(Protocol):
    """Decides how streamed weights are read."""

    name: str

    def choose(self, info: IoInfo) -> IoMode:
        """Return "direct" (past the page cache) or "buffered" (through it)."""
        ...


@runtime_checkable
class CachePolicy(Protocol):
    """Decides which expert leaves the cache when another one needs its slot."""

    name: str

    def choose(self, info: CacheInfo) -> CacheChoice:
        """Return the name of one of the eviction policies of the native cache, or a policy."""
        ...


@runtime_checkable
class ExpertPredictor(Protocol):
    """Decides how experts are predicted, to be read before a router asks for them."""

    name: str

    def choose(self, info: CacheInfo) -> PredictorChoice:
        """Return the name of a native predictor ("auto" is on only while it helps), or one."""
        ...


@runtime_checkable
class EvictionPolicy(Protocol):
    """Decides which model of the multiplexer gives up memory for which."""

    name: str

    def activate(self, memory: Memory, name: str) -> Activation | None:
        """Return how the holder `name` comes to memory; None: what it needs is in use.

        `steps` free what its fixed part and its first `resident` units take beyond what is free.
        What is in use or pinned gives up nothing, nobody goes below its share, and holders with a
        share stay loaded. For units, only units of others go.
        """
        ...

    def make_room(
        self, memory: Memory, wanted_bytes: int, name: str, *, unload: bool = True
    ) -> tuple[Step, ...] | None:
        """Return the steps after which `wanted_bytes` are free for `name`; None: impossible.

        Without `unload` only units may go, no whole model.
        """
        ...


@runtime_checkable
class QuantizationAllocator(Protocol):
    """Decides which type each tensor is quantized to."""

    name: str

    def allocate(self, items: Sequence[Item], budget_nbytes: int) -> Allocation:
        """Return one type of its menu for each item, together at most `budget_nbytes`."""
        ...
