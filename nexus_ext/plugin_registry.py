"""Find plugins and register them; remember what became of each.

Knows entry points and pluggy; knows nothing of what a hook is for. A plugin that cannot be imported
or registered is logged by name and skipped: the run goes on without it.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint
from typing import Literal

import pluggy

from nexus_ext import hookspecs
from nexus_ext._version import __version__
from nexus_ext.errors import PluginError
from nexus_ext.policies import BUILTIN_MODULES

GROUP = "nexus_ext"
LOAD_VARIABLE = "NEXUS_LOAD_PLUGINS"
API_ATTRIBUTE = "nexus_plugin_api"

_log = logging.getLogger("nexus_ext.plugins")

State = Literal["active", "overridden", "disabled", "failed", "skipped", "missing"]
"""active: registered, and used where it is first. overridden: all that it answers, others answer
before it. disabled: it raised or answered what its hook does not allow. failed: it could not be
imported or registered. skipped: NEXUS_LOAD_PLUGINS leaves it out, or it needs a newer nexus_ext.
missing: NEXUS_LOAD_PLUGINS names it, and it is not installed."""


@dataclass(frozen=True, slots=True)
class PluginRecord:
    """One plugin, and what became of it."""

    name: str  # of the entry point; of the module for a built-in
    distribution: str
    version: str
    state: State
    hooks: tuple[str, ...] = ()  # what it implements
    decides: tuple[str, ...] = ()  # those of its hooks whose answer is the one in use
    overridden: tuple[str, ...] = ()  # those that it answers, and another plugin before it
    disabled: tuple[str, ...] = ()  # those that it is not asked any more, since it failed
    error: str = ""  # the last one
    builtin: bool = False
    api: int = hookspecs.PLUGIN_API  # that it was written for
    seconds: float = field(default=0.0, compare=False)  # that its hooks have taken


class TooNew(PluginError):
    """A plugin needs a newer nexus_ext than this one."""


class Registry:
    """Built-ins, then the plugins among `found` that `selection` (NEXUS_LOAD_PLUGINS) allows."""

    def __init__(self, found: Iterable[EntryPoint], selection: str | None) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._lock = threading.Lock()  # of records: hooks are called from several threads
        self._records: dict[str, PluginRecord] = {}
        self._unreachable: list[PluginRecord] = []  # their name belongs to another plugin
        for name in BUILTIN_MODULES:
            hooks, _ = self._register(importlib.import_module(name), name)
            self._records[name] = PluginRecord(
                name, GROUP, __version__, "active", hooks, builtin=True
            )
        self._register_found(found, parse_selection(selection))

    def records(self) -> list[PluginRecord]:
        """Every plugin that was found: built-ins, then by name."""
        with self._lock:
            return sorted(
                (*self._records.values(), *self._unreachable),
                key=lambda record: (not record.builtin, record.name, record.distribution),
            )

    def record(self, name: str) -> PluginRecord:
        return self._records[name]

    def note_error(self, name: str, text: str) -> None:
        """Remember the last error of a plugin that was loaded."""
        with self._lock:
            self._records[name] = replace(self._records[name], error=text)

    def note_time(self, name: str, seconds: float) -> None:
        """Add to the time that the hooks of a plugin have taken."""
        with self._lock:
            record = self._records[name]
            self._records[name] = replace(record, seconds=record.seconds + seconds)

    def disable(self, name: str, hook: str, text: str) -> bool:
        """Ask a plugin no more for one hook; False when that was so already."""
        with self._lock:
            record = self._records[name]
            if hook in record.disabled:
                return False
            disabled = tuple(sorted((*record.disabled, hook)))
            self._records[name] = replace(record, disabled=disabled, state="disabled", error=text)
            return True

    def implementations(self, hook: str) -> list[pluggy.HookImpl]:
        """Those that are not disabled, in the order in which they are asked."""
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        return [  # pluggy has the one that registered last at the end
            impl
            for impl in caller.get_hookimpls()[::-1]
            if hook not in self._records[impl.plugin_name].disabled
        ]

    def _register_found(self, found: Iterable[EntryPoint], wanted: set[str] | None) -> None:
        loadable: list[EntryPoint] = []
        for entry in sorted(found, key=lambda entry: (entry.name, *_origin(entry))):
            record = PluginRecord(entry.name, *_origin(entry), "skipped")
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
            hooks, api = self._register(entry.load(), entry.name)
        except TooNew as error:
            return replace(_failed(record, str(error)), state="skipped")
        except (Exception, SystemExit) as error:
            _log.debug("plugin %r", entry.name, exc_info=True)
            return _failed(record, describe(error))
        return replace(record, state="active", hooks=hooks, api=api)

    def _register(self, plugin: object, name: str) -> tuple[tuple[str, ...], int]:
        """Register and return the hooks and the API version, or leave no trace and raise."""
        api = api_of(plugin)
        known = self._manager.get_name(plugin)
        if known is not None:
            raise PluginError(f"it is registered already, as {known!r}")
        try:
            self._manager.register(plugin, name=name)
            callers = self._manager.get_hookcallers(plugin) or []
            if not callers:
                raise PluginError(f"{show(plugin)} implements no hook of {GROUP}")
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
        return hooks, api


def api_of(plugin: object) -> int:
    """Return the version of the hooks that a plugin was written for; 1 when it does not say.

    Raises TooNew, and PluginError for what is no version.
    """
    api = getattr(plugin, API_ATTRIBUTE, 1)
    if type(api) is not int or api < 1:
        raise PluginError(f"{API_ATTRIBUTE} is {show(api)}, which is no version: 1, 2, ...")
    if api > hookspecs.PLUGIN_API:
        raise TooNew(
            f"it needs version {api} of the plugin API, and {GROUP} {__version__} has "
            f"{hookspecs.PLUGIN_API}: update {GROUP}, or install an older version of the plugin"
        )
    return api


def parse_selection(selection: str | None) -> set[str] | None:
    """Return the names to load; None means all. An empty text, like "none", loads nothing."""
    if selection is None:
        return None
    names = {name.strip() for name in selection.split(",")} - {""}
    return set() if names == {"none"} else names


def show(value: object) -> str:
    """Return a short text for a value of a plugin, whose own `repr` may be anything."""
    try:
        text = repr(value)
    except Exception as error:
        return f"a {type(value).__name__} whose repr raises {type(error).__name__}"
    return text if len(text) <= 200 else text[:200] + "..."


def describe(error: BaseException) -> str:
    """Return the class and the text of an error, whose own `str` may be anything."""
    try:
        text = str(error)
    except Exception:  # in the plugin's own `__str__`; the class is named all the same
        text = "(it has no text)"
    return f"{type(error).__name__}: {text}"


def _failed(record: PluginRecord, text: str) -> PluginRecord:
    _log.warning("plugin %r of %r skipped: %s", record.name, record.distribution, text)
    return replace(record, state="failed", error=text)


def _origin(entry: EntryPoint) -> tuple[str, str]:
    """Return (name, version) of the distribution that an entry point belongs to."""
    return (entry.dist.name, entry.dist.version) if entry.dist is not None else ("", "")
