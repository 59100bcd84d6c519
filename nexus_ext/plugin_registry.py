"""Find plugins and register them; remember what became of each.

Knows entry points and pluggy; knows nothing of what a hook is for. A plugin that cannot be imported
or registered is logged by name and skipped: the run goes on without it.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from typing import Literal

import pluggy

from nexus_ext import hookspecs
from nexus_ext._version import __version__
from nexus_ext.errors import PluginError
from nexus_ext.policies import BUILTIN_MODULES

GROUP = "nexus_ext"
LOAD_VARIABLE = "NEXUS_LOAD_PLUGINS"

_log = logging.getLogger("nexus_ext.plugins")

State = Literal["built-in", "loaded", "disabled", "missing", "failed"]


@dataclass(frozen=True, slots=True)
class PluginRecord:
    """One plugin, and what became of it."""

    name: str  # of the entry point; of the module for a built-in
    distribution: str
    version: str
    state: State
    hooks: tuple[str, ...] = ()  # what it implements
    decides: tuple[str, ...] = ()  # those of its hooks whose answer is the one in use
    error: str = ""


class Registry:
    """Built-ins, then the plugins among `found` that `selection` (NEXUS_LOAD_PLUGINS) allows."""

    def __init__(self, found: Iterable[EntryPoint], selection: str | None) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._records: dict[str, PluginRecord] = {}
        self._unreachable: list[PluginRecord] = []  # their name belongs to another plugin
        for name in BUILTIN_MODULES:
            hooks = self._register(importlib.import_module(name), name)
            self._records[name] = PluginRecord(name, GROUP, __version__, "built-in", hooks)
        self._register_found(found, parse_selection(selection))

    def records(self) -> list[PluginRecord]:
        """Every plugin that was found: built-ins, then by name."""
        return sorted(
            (*self._records.values(), *self._unreachable),
            key=lambda record: (record.state != "built-in", record.name, record.distribution),
        )

    def record(self, name: str) -> PluginRecord:
        return self._records[name]

    def note_error(self, name: str, text: str) -> None:
        """Remember the last error of a plugin that was loaded."""
        self._records[name] = replace(self._records[name], error=text)

    def implementations(self, hook: str) -> list[pluggy.HookImpl]:
        """In the order in which they are asked: the last one registered first."""
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        return caller.get_hookimpls()[::-1]

    def _register_found(self, found: Iterable[EntryPoint], wanted: set[str] | None) -> None:
        loadable: list[EntryPoint] = []
        for entry in sorted(found, key=lambda entry: (entry.name, *_origin(entry))):
            record = PluginRecord(entry.name, *_origin(entry), "disabled")
            if entry.name in self._records:
                owner = self._records[entry.name].distribution
                self._unreachable.append(_failed(record, f"its name is taken by {owner!r}"))
                continue
            self._records[entry.name] = record
            if wanted is None or entry.name in wanted:
                loadable.append(entry)
        # The plugin that registers last is asked first: hence from Z to A.
        for entry in reversed(loadable):
            self._records[entry.name] = self._load(entry, self._records[entry.name])
        for name in sorted((wanted or set()) - self._records.keys()):
            record = PluginRecord(name, "", "", "missing", error=f"{LOAD_VARIABLE} names it")
            self._records[name] = record
            _log.warning("plugin %r of %s is not installed", name, LOAD_VARIABLE)

    def _load(self, entry: EntryPoint, record: PluginRecord) -> PluginRecord:
        # SystemExit too: a module that calls sys.exit() must not end the user's run.
        try:
            hooks = self._register(entry.load(), entry.name)
        except (Exception, SystemExit) as error:
            _log.debug("plugin %r", entry.name, exc_info=True)
            return _failed(record, describe(error))
        return replace(record, state="loaded", hooks=hooks)

    def _register(self, plugin: object, name: str) -> tuple[str, ...]:
        """Register and return the names of the hooks, or leave no trace and raise."""
        try:
            self._manager.register(plugin, name=name)
            callers = self._manager.get_hookcallers(plugin) or []
            if not callers:
                raise PluginError(f"{plugin!r} implements no hook of {GROUP}")
            for caller in callers:
                if not caller.has_spec():
                    raise PluginError(f"{caller.name!r} is not a hook of {GROUP} {__version__}")
                for impl in caller.get_hookimpls():
                    if impl.plugin is plugin and (impl.wrapper or impl.hookwrapper):
                        raise PluginError(f"{caller.name!r} is a wrapper: wrappers are not run")
        except Exception:  # raised again: what was half registered must go first
            if self._manager.get_plugin(name) is plugin:
                self._manager.unregister(name=name)
            raise
        hooks = tuple(sorted(caller.name for caller in callers))
        _log.debug("registered %s: %s", name, ", ".join(hooks))
        return hooks


def parse_selection(selection: str | None) -> set[str] | None:
    """Return the names to load; None means all. An empty text, like "none", loads nothing."""
    if selection is None:
        return None
    names = {name.strip() for name in selection.split(",")} - {""}
    return set() if names == {"none"} else names


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _failed(record: PluginRecord, text: str) -> PluginRecord:
    _log.warning("plugin %r of %r skipped: %s", record.name, record.distribution, text)
    return replace(record, state="failed", error=text)


def _origin(entry: EntryPoint) -> tuple[str, str]:
    """Return (name, version) of the distribution that an entry point belongs to."""
    return (entry.dist.name, entry.dist.version) if entry.dist is not None else ("", "")
