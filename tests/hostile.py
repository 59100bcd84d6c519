"""A plugin that answers every hook, and does it as badly as it can, in several ways.

`hostile(mode)` is the plugin; MODES are the ways. What it returns where an object is asked for has
every method that any hook asks for, so that the failure comes as late as it can.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest

from nexus_ext import hookimpl, hookspecs
from nexus_ext.plugin_registry import GROUP
from nexus_ext.plugins import Plugins

HOOKS = [name for name in vars(hookspecs) if name.startswith("nexus_")]
SLEEP_S = 0.002


class Evil:
    """Nothing that can be done with it works."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"evil {name}")

    def __repr__(self) -> str:
        raise RuntimeError("evil repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("evil eq")

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise RuntimeError("evil bool")

    def __iter__(self) -> Any:
        raise RuntimeError("evil iter")


class EvilError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("evil str")


class Everything:
    """Has what any hook's answer must have, and does `act` whatever it is asked."""

    name = "hostile"
    suffixes = (".hostile",)
    function = "nowhere"  # an address that is none cannot be told from one: no test of that

    def __init__(self, act: Callable[[], Any]) -> None:
        self._act = act

    def solve(self, *args: Any, **kwargs: Any) -> Any:
        return self._act()

    choose = activate = make_room = allocate = encode = decode = solve
    claims = open = write = find = names = collect = observe = solve


def _raise(error: BaseException) -> Any:
    raise error


def _slow() -> None:
    time.sleep(SLEEP_S)


# How the hooks themselves answer.
HOOK_MODES: dict[str, Callable[[], Any]] = {
    "hooks raise": lambda: _raise(RuntimeError("hostile")),
    "hooks exit": lambda: _raise(SystemExit(3)),
    "hooks raise what cannot be printed": lambda: _raise(EvilError()),
    "hooks return a number": lambda: 7,
    "hooks return evil": Evil,
    "hooks return a class": lambda: Everything,
    "hooks are slow": _slow,
}
# How objects answer that the hooks return.
OBJECT_MODES: dict[str, Callable[[], Any]] = {
    "objects raise": lambda: _raise(RuntimeError("hostile")),
    "objects exit": lambda: _raise(SystemExit(3)),
    "objects raise what cannot be printed": lambda: _raise(EvilError()),
    "objects return None": lambda: None,
    "objects return a number": lambda: -1,
    "objects return a text": lambda: "rubbish",
    "objects return an empty tuple": tuple,
    "objects return evil": Evil,
    "objects return a list of evil": lambda: [Evil()],
    "objects are slow": _slow,
}
MODES = {
    **HOOK_MODES,
    **{name: lambda act=act: Everything(act) for name, act in OBJECT_MODES.items()},
}


def hostile(mode: str) -> ModuleType:
    """Return the plugin: a module with a function for every hook."""
    plugin = ModuleType("hostile")
    for hook in HOOKS:

        def answer(mode: str = mode) -> Any:
            return MODES[mode]()

        answer.__signature__ = inspect.Signature()  # type: ignore[attr-defined]
        setattr(plugin, hook, hookimpl(answer, specname=hook))
    return plugin


def hostile_plugins(mode: str, patch: pytest.MonkeyPatch) -> Plugins:
    """Let this process have the plugin, registered twice, as the only one."""
    plugin = hostile(mode)
    patch.setattr(EntryPoint, "load", lambda self: plugin)
    twice = [EntryPoint(name, "hostile", GROUP) for name in ("hostile", "hostile-again")]
    found = Plugins(found=twice, environ={})
    patch.setattr("nexus_ext.plugins._plugins", found)
    return found
