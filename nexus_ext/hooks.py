"""What authors of plugins import: the marker, what hooks are given, and what they return.

Everything that a signature in `nexus_ext.hookspecs` speaks of, in one place. What else is promised
to plugins: `nexus_ext` itself, `nexus_ext.routing` and `nexus_ext.formats` (what they name in
`__all__`), `nexus_ext.testing`. Each name is fetched when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nexus_ext.codecs import Codec as Codec
    from nexus_ext.errors import DoesNotFit as DoesNotFit
    from nexus_ext.errors import FormatError as FormatError
    from nexus_ext.errors import NexusError as NexusError
    from nexus_ext.errors import PluginError as PluginError
    from nexus_ext.errors import ReadFailed as ReadFailed
    from nexus_ext.errors import UsageError as UsageError
    from nexus_ext.errors import WriteFailed as WriteFailed
    from nexus_ext.formats.foreign import Place as Place
    from nexus_ext.formats.foreign import foreign_catalog as foreign_catalog
    from nexus_ext.formats.sources import Source as Source
    from nexus_ext.hardware.profile import HardwareProfile as HardwareProfile
    from nexus_ext.hookspecs import PLUGIN_API as PLUGIN_API
    from nexus_ext.hookspecs import hookimpl as hookimpl
    from nexus_ext.multiplexer.eviction import Activation as Activation
    from nexus_ext.multiplexer.eviction import Holder as Holder
    from nexus_ext.multiplexer.eviction import Memory as Memory
    from nexus_ext.multiplexer.eviction import Step as Step
    from nexus_ext.multiplexer.eviction import activate as activate
    from nexus_ext.multiplexer.eviction import make_room as make_room
    from nexus_ext.placement import Pin as Pin
    from nexus_ext.placement import Plan as Plan
    from nexus_ext.placement import PlanRequest as PlanRequest
    from nexus_ext.placement import solve as solve
    from nexus_ext.policies import CacheChoice as CacheChoice
    from nexus_ext.policies import CacheInfo as CacheInfo
    from nexus_ext.policies import CachePolicy as CachePolicy
    from nexus_ext.policies import CachePolicyName as CachePolicyName
    from nexus_ext.policies import EvictionAsk as EvictionAsk
    from nexus_ext.policies import EvictionPolicy as EvictionPolicy
    from nexus_ext.policies import ExpertPredictor as ExpertPredictor
    from nexus_ext.policies import FormatReader as FormatReader
    from nexus_ext.policies import FormatWriter as FormatWriter
    from nexus_ext.policies import IoInfo as IoInfo
    from nexus_ext.policies import IoMode as IoMode
    from nexus_ext.policies import IoPolicy as IoPolicy
    from nexus_ext.policies import KernelInfo as KernelInfo
    from nexus_ext.policies import KernelProvider as KernelProvider
    from nexus_ext.policies import LayerCachePolicy as LayerCachePolicy
    from nexus_ext.policies import LayerPredictor as LayerPredictor
    from nexus_ext.policies import LayerRouting as LayerRouting
    from nexus_ext.policies import MetricsCollector as MetricsCollector
    from nexus_ext.policies import ModelInfo as ModelInfo
    from nexus_ext.policies import ModelStore as ModelStore
    from nexus_ext.policies import NativePolicy as NativePolicy
    from nexus_ext.policies import PlacementSolver as PlacementSolver
    from nexus_ext.policies import PredictorChoice as PredictorChoice
    from nexus_ext.policies import PredictorName as PredictorName
    from nexus_ext.policies import Progress as Progress
    from nexus_ext.policies import QuantizationAllocator as QuantizationAllocator
    from nexus_ext.policies import RequestInfo as RequestInfo
    from nexus_ext.policies import RequestStart as RequestStart
    from nexus_ext.policies import RouterObserver as RouterObserver
    from nexus_ext.policies import Routing as Routing
    from nexus_ext.policies import ServerInfo as ServerInfo
    from nexus_ext.policies import StorePlaces as StorePlaces
    from nexus_ext.quality.allocation import Allocation as Allocation
    from nexus_ext.quality.allocation import Choice as Choice
    from nexus_ext.quality.allocation import Item as Item
    from nexus_ext.quality.allocation import allocate as allocate
    from nexus_ext.store import ModelName as ModelName
    from nexus_ext.store import StoredModel as StoredModel
    from nexus_ext.types import Catalog as Catalog
    from nexus_ext.types import FileInfo as FileInfo
    from nexus_ext.types import ModelShape as ModelShape
    from nexus_ext.types import Role as Role
    from nexus_ext.types import TensorInfo as TensorInfo

_HOME = {
    "Activation": "nexus_ext.multiplexer.eviction",
    "Allocation": "nexus_ext.quality.allocation",
    "CacheChoice": "nexus_ext.policies",
    "CacheInfo": "nexus_ext.policies",
    "CachePolicy": "nexus_ext.policies",
    "CachePolicyName": "nexus_ext.policies",
    "Catalog": "nexus_ext.types",
    "Choice": "nexus_ext.quality.allocation",
    "Codec": "nexus_ext.codecs",
    "DoesNotFit": "nexus_ext.errors",
    "EvictionAsk": "nexus_ext.policies",
    "EvictionPolicy": "nexus_ext.policies",
    "ExpertPredictor": "nexus_ext.policies",
    "FileInfo": "nexus_ext.types",
    "FormatError": "nexus_ext.errors",
    "FormatReader": "nexus_ext.policies",
    "FormatWriter": "nexus_ext.policies",
    "HardwareProfile": "nexus_ext.hardware.profile",
    "Holder": "nexus_ext.multiplexer.eviction",
    "IoInfo": "nexus_ext.policies",
    "IoMode": "nexus_ext.policies",
    "IoPolicy": "nexus_ext.policies",
    "Item": "nexus_ext.quality.allocation",
    "KernelInfo": "nexus_ext.policies",
    "KernelProvider": "nexus_ext.policies",
    "LayerCachePolicy": "nexus_ext.policies",
    "LayerPredictor": "nexus_ext.policies",
    "LayerRouting": "nexus_ext.policies",
    "Memory": "nexus_ext.multiplexer.eviction",
    "MetricsCollector": "nexus_ext.policies",
    "ModelInfo": "nexus_ext.policies",
    "ModelName": "nexus_ext.store",
    "ModelShape": "nexus_ext.types",
    "ModelStore": "nexus_ext.policies",
    "NativePolicy": "nexus_ext.policies",
    "NexusError": "nexus_ext.errors",
    "PLUGIN_API": "nexus_ext.hookspecs",
    "Pin": "nexus_ext.placement",
    "Place": "nexus_ext.formats.foreign",
    "PlacementSolver": "nexus_ext.policies",
    "Plan": "nexus_ext.placement",
    "PlanRequest": "nexus_ext.placement",
    "PluginError": "nexus_ext.errors",
    "PredictorChoice": "nexus_ext.policies",
    "PredictorName": "nexus_ext.policies",
    "Progress": "nexus_ext.policies",
    "QuantizationAllocator": "nexus_ext.policies",
    "ReadFailed": "nexus_ext.errors",
    "RequestInfo": "nexus_ext.policies",
    "RequestStart": "nexus_ext.policies",
    "Role": "nexus_ext.types",
    "RouterObserver": "nexus_ext.policies",
    "Routing": "nexus_ext.policies",
    "ServerInfo": "nexus_ext.policies",
    "Source": "nexus_ext.formats.sources",
    "Step": "nexus_ext.multiplexer.eviction",
    "StorePlaces": "nexus_ext.policies",
    "StoredModel": "nexus_ext.store",
    "TensorInfo": "nexus_ext.types",
    "UsageError": "nexus_ext.errors",
    "WriteFailed": "nexus_ext.errors",
    "activate": "nexus_ext.multiplexer.eviction",
    "allocate": "nexus_ext.quality.allocation",
    "foreign_catalog": "nexus_ext.formats.foreign",
    "hookimpl": "nexus_ext.hookspecs",
    "make_room": "nexus_ext.multiplexer.eviction",
    "solve": "nexus_ext.placement",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(home), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
