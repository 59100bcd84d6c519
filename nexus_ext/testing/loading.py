"""Load the plugins that a test is about and no others, and let the process use them for a while."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points

from nexus_ext import plugins as home
from nexus_ext.errors import PluginError
from nexus_ext.plugin_registry import GROUP
from nexus_ext.plugins import TRACE_VARIABLE, Plugins


def load_plugins(*wanted: object) -> Plugins:
    """Return the built-ins and the plugins that are named, whatever else is installed.

    A text is the entry point name of an installed plugin; anything else is the plugin itself: a
    module, or an object, with hooks. Without arguments: the built-ins alone.

    Raises PluginError when one is not installed or cannot be loaded, where nexus_ext itself would
    log a warning and go on. NEXUS_TRACE_PLUGINS is obeyed, NEXUS_LOAD_PLUGINS is not.
    """
    found = [_installed(one) if isinstance(one, str) else _given(one) for one in wanted]
    environ = {TRACE_VARIABLE: os.environ.get(TRACE_VARIABLE, "")}
    loaded = Plugins(found, environ)
    for record in loaded.list_plugins():
        if record.state in ("failed", "skipped"):  # skipped: it was written for a newer nexus_ext
            raise PluginError(
                f"plugin {record.name!r} cannot be loaded: {record.error}",
                hint=f"set {TRACE_VARIABLE}=1 to see what was registered before",
            )
    return loaded


@contextmanager
def use_plugins(plugins: Plugins) -> Iterator[Plugins]:
    """Let `Llama`, the command line and everything else in this process use these plugins."""
    with home._lock:
        before, home._plugins = home._plugins, plugins
    try:
        yield plugins
    finally:
        with home._lock:
            home._plugins = before


def _installed(name: str) -> EntryPoint:
    installed = entry_points(group=GROUP)
    for entry in installed:
        if entry.name == name:
            return entry
    names = ", ".join(sorted({entry.name for entry in installed})) or "none"
    raise PluginError(
        f"no plugin {name!r} is installed (installed: {names})",
        hint="run `pip install -e .` in the directory of the plugin",
    )


def _given(plugin: object) -> EntryPoint:
    """Return an entry point of something that is at hand already."""

    class Given(EntryPoint):
        def load(self) -> object:
            return plugin

    name = str(getattr(plugin, "__name__", type(plugin).__name__)).rpartition(".")[2]
    return Given(name, name, GROUP)
