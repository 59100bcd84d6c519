"""The stores beside our own, all through one hook: Ollama's, LM Studio's, those of plugins."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, TypeVar

from nexus_ext.errors import FormatError
from nexus_ext.plugin_registry import show
from nexus_ext.plugins import Rubbish, plugins
from nexus_ext.plugins.asking import of_kind
from nexus_ext.policies import ModelStore, StorePlaces
from nexus_ext.store.model import ModelSource, StoredModel
from nexus_ext.store.names import ModelName

HOOK: Final = "nexus_model_store"
_OURS: Final = ("nexus", "ollama", "lm-studio")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_T = TypeVar("_T")


def other_stores(places: StorePlaces) -> list[ModelSource]:
    """Return the stores that are asked after our own: the built-in ones, then those of plugins."""
    kind: type[Any] = ModelStore
    found = plugins().collect(HOOK, lambda answer: of_kind(answer, kind), places=places)
    builtin = [store for name, store in found if store.name in _OURS and _is_builtin(name)]
    builtin.sort(key=lambda store: _OURS.index(store.name))
    added: list[ModelSource] = []
    for name, store in found:
        if _is_builtin(name):
            continue
        if _NAME.fullmatch(store.name) is None or store.name in _OURS:
            plugins().disable(name, HOOK, f"has the name {store.name!r}, which it cannot have")
            continue
        added.append(PluginStore(name, store))
    return [*builtin, *added]


def _is_builtin(plugin: str) -> bool:
    return plugins().is_builtin(plugin)


class PluginStore:
    """A plugin's store, which has no models any more once it has failed."""

    def __init__(self, plugin: str, store: ModelStore) -> None:
        self.name = store.name
        self._plugin = plugin
        self._store = store

    def find(self, name: ModelName) -> StoredModel | None:
        def call() -> StoredModel | None:
            found: object = self._store.find(name)
            if found is None:
                return None
            if not isinstance(found, StoredModel) or found.name != name:
                raise Rubbish(f"returned {show(found)} for {name}, which is no stored model")
            if not os.path.isfile(found.path):
                raise Rubbish(f"has {name} at {show(found.path)}, where there is no file")
            return replace(found, origin=self.name)

        return self._guarded(call, None, (FormatError,))

    def names(self) -> list[ModelName]:
        def call() -> list[ModelName]:
            found = list(self._store.names())
            for name in found:
                if not isinstance(name, ModelName):
                    raise Rubbish(f"returned {show(name)}, which is no ModelName")
            return sorted(found)

        return self._guarded(call, [], ())

    def _guarded(
        self, call: Callable[[], _T], otherwise: _T, passes: tuple[type[BaseException], ...]
    ) -> _T:
        return plugins().guarded(self._plugin, HOOK, call, otherwise, passes=passes)
