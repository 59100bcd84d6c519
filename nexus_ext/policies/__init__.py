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
    ExpertPredictor,
    IoInfo,
    IoMode,
    IoPolicy,
    ModelInfo,
    PlacementSolver,
    PredictorChoice,
    PredictorName,
    RequestInfo,
)
from nexus_ext.policies.native import (
    EvictionAsk,
    LayerCachePolicy,
    LayerPredictor,
    NativePolicy,
)

BUILTIN_MODULES = (
    "nexus_ext.policies.cache",
    "nexus_ext.policies.io",
    "nexus_ext.policies.placement",
    "nexus_ext.policies.prediction",
)

__all__ = [
    "BUILTIN_MODULES",
    "CacheChoice",
    "CacheInfo",
    "CachePolicy",
    "CachePolicyName",
    "EvictionAsk",
    "ExpertPredictor",
    "IoInfo",
    "IoMode",
    "IoPolicy",
    "LayerCachePolicy",
    "LayerPredictor",
    "ModelInfo",
    "NativePolicy",
    "PlacementSolver",
    "PredictorChoice",
    "PredictorName",
    "RequestInfo",
]
