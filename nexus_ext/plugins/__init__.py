"""What nexus_ext asks its plugins, and what it does when one fails.

Looked for at the first question, so that importing nexus_ext loads no plugin. Two environment
variables (see plugins/README.md):

    NEXUS_LOAD_PLUGINS   "none", or the only entry points to load, separated by commas
    NEXUS_TRACE_PLUGINS  "1": log every registration and every call of a hook to stderr

A plugin that fails is disabled by name for the hook in question; the next one, in the end the
built-in, answers instead, and the run goes on.
"""

from __future__ import annotations

import threading

from nexus_ext.plugin_registry import PluginRecord
from nexus_ext.plugins.asking import TRACE_VARIABLE, Rubbish
from nexus_ext.plugins.decisions import CACHE as CACHE_HOOK
from nexus_ext.plugins.decisions import PREDICTOR as PREDICTOR_HOOK
from nexus_ext.plugins.decisions import Plugins

__all__ = [
    "CACHE_HOOK",
    "PREDICTOR_HOOK",
    "TRACE_VARIABLE",
    "PluginRecord",
    "Plugins",
    "Rubbish",
    "list_plugins",
    "plugins",
]

_lock = threading.Lock()
_plugins: Plugins | None = None


def plugins() -> Plugins:
    """Return the plugins of this process, looking for them at the first call."""
    global _plugins
    with _lock:
        if _plugins is None:
            _plugins = Plugins()
        return _plugins


def list_plugins() -> tuple[PluginRecord, ...]:
    """List every plugin that was found: what it implements, what it decides, why it failed."""
    return plugins().list_plugins()
