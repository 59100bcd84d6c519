"""The decisions that a plugin can replace, and the built-in answer to each.

Pure functions of their arguments: no I/O, no clock, no state. The built-ins are registered through
the same hooks as everyone else's (`nexus_ext.hookspecs`), before everyone else's.
"""

from __future__ import annotations

from nexus_ext.policies.base import (
    CacheChoice,
    CacheInfo,
    CachePolicy,
    CachePolicyName,
    EvictionPolicy,
    ExpertPredictor,
    IoInfo,
    IoMode,
    IoPolicy,
    PlacementSolver,
    PredictorChoice,
    PredictorName,
    QuantizationAllocator,
)
from nexus_ext.policies.extensions import (
    FormatReader,
    FormatWriter,
    KernelInfo,
    KernelProvider,
    MetricsCollector,
    ModelStore,
    Progress,
    ServerInfo,
    StorePlaces,
)
from nexus_ext.policies.native import (
    EvictionAsk,
    LayerCachePolicy,
    LayerPredictor,
    NativePolicy,
)
from nexus_ext.policies.observed import (
    LayerRouting,
    ModelInfo,
    Outcome,
    RequestInfo,
    RequestStart,
    RouterObserver,
    Routing,
)

# Registered in this order. Those of higher layers are named and not imported from here.
BUILTIN_MODULES = (
    "nexus_ext.policies.allocation",
    "nexus_ext.policies.cache",
    "nexus_ext.policies.io",
    "nexus_ext.policies.placement",
    "nexus_ext.policies.prediction",
    "nexus_ext.multiplexer.eviction_policy",
    "nexus_ext.store.lm_studio",
    "nexus_ext.store.ollama",
)

__all__ = [
    "BUILTIN_MODULES",
    "CacheChoice",
    "CacheInfo",
    "CachePolicy",
    "CachePolicyName",
    "EvictionAsk",
    "EvictionPolicy",
    "ExpertPredictor",
    "FormatReader",
    "FormatWriter",
    "IoInfo",
    "IoMode",
    "IoPolicy",
    "KernelInfo",
    "KernelProvider",
    "LayerCachePolicy",
    "LayerPredictor",
    "LayerRouting",
    "MetricsCollector",
    "ModelInfo",
    "ModelStore",
    "NativePolicy",
    "Outcome",
    "PlacementSolver",
    "PredictorChoice",
    "PredictorName",
    "Progress",
    "QuantizationAllocator",
    "RequestInfo",
    "RequestStart",
    "RouterObserver",
    "Routing",
    "ServerInfo",
    "StorePlaces",
]
