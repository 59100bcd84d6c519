"""nexus_ext: virtual memory for llama.cpp.

Everything public is named here and imported when it is first used, so that `import nexus_ext` costs
nothing and a program that only reads a model's header never loads llama.cpp.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from nexus_ext._version import __version__ as __version__

if TYPE_CHECKING:
    from nexus_ext.errors import NexusError as NexusError
    from nexus_ext.formats import open_gguf as open_gguf
    from nexus_ext.hardware import HardwareProfile as HardwareProfile
    from nexus_ext.hardware import probe as probe
    from nexus_ext.hookspecs import PLUGIN_API as PLUGIN_API
    from nexus_ext.hookspecs import hookimpl as hookimpl
    from nexus_ext.include import get_include as get_include
    from nexus_ext.placement import Plan as Plan
    from nexus_ext.placement import PlanRequest as PlanRequest
    from nexus_ext.placement import solve as solve
    from nexus_ext.plugins import list_plugins as list_plugins
    from nexus_ext.runtime import Llama as Llama
    from nexus_ext.types import Catalog as Catalog

_HOME = {
    "Catalog": "nexus_ext.types",
    "HardwareProfile": "nexus_ext.hardware",
    "Llama": "nexus_ext.runtime",
    "NexusError": "nexus_ext.errors",
    "PLUGIN_API": "nexus_ext.hookspecs",
    "Plan": "nexus_ext.placement",
    "PlanRequest": "nexus_ext.placement",
    "get_include": "nexus_ext.include",
    "hookimpl": "nexus_ext.hookspecs",
    "list_plugins": "nexus_ext.plugins",
    "open_gguf": "nexus_ext.formats",
    "probe": "nexus_ext.hardware",
    "solve": "nexus_ext.placement",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(home), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
