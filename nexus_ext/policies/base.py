"""What goes through the hooks: the facts that a policy is given, and the shape of a policy.

Values and protocols only. A policy is an object that is asked once, when a model is loaded; what
it returns is data, so that no Python runs while tokens are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from nexus_ext.policies.native import LayerCachePolicy, LayerPredictor, NativePolicy

if TYPE_CHECKING:
    from nexus_ext.hardware.profile import HardwareProfile
    from nexus_ext.placement import Plan, PlanRequest
    from nexus_ext.types import Catalog

IoMode = Literal["direct", "buffered"]
CachePolicyName = Literal["lfru", "lru", "lfu", "least-stale"]  # as in native/cache.c
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


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that was loaded, as the lifecycle hooks see it."""

    path: str
    fingerprint: str
    architecture: str
    resident_bytes: int  # weights and pools in memory
    streamed_bytes_per_token: int  # 0 when everything fits
    io_mode: IoMode | None  # None when nothing is streamed


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """One finished request."""

    model: ModelInfo
    n_prompt_tokens: int
    n_tokens: int  # generated
    prefill_ns: int
    decode_ns: int
    read_bytes: int  # from the disk, over the whole request


@runtime_checkable
class PlacementSolver(Protocol):
    """Decides which tensor lives in which memory."""

    name: str

    def solve(self, catalog: Catalog, hardware: HardwareProfile, request: PlanRequest) -> Plan:
        """Return a plan for this catalog that keeps to the request's budget.

        Raises DoesNotFit when there is none. The same arguments give the same plan.
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
