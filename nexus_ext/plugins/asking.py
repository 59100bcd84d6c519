"""How plugins are asked; one that fails is disabled by name, and others answer.

Knows no hook by name. Three ways to ask: `decide` takes the first good answer, down to the
built-in's; `collect` takes all; `observe` tells all. Nothing that a plugin raises gets out of here,
but KeyboardInterrupt: that is the user's.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Final, TypeVar

from nexus_ext.errors import NexusError, PluginError
from nexus_ext.plugin_registry import (
    GROUP,
    LOAD_VARIABLE,
    PluginRecord,
    Registry,
    describe,
    show,
)

if TYPE_CHECKING:
    import pluggy

TRACE_VARIABLE: Final = "NEXUS_TRACE_PLUGINS"
OBSERVER_FAILURES: Final = 10  # of one hook of one plugin; an exporter may miss its server once
SLOW_S: Final = 1.0

_log = logging.getLogger("nexus_ext.plugins")
_T = TypeVar("_T")


class Rubbish(Exception):
    """An answer that its hook does not allow. The text follows the name of the hook."""


class Asking:
    """The plugins of one process, and every way to ask them."""

    def __init__(
        self,
        found: Iterable[EntryPoint] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        environ = os.environ if environ is None else environ
        if environ.get(TRACE_VARIABLE, "") not in ("", "0"):
            _trace_to_stderr()
        found = entry_points(group=GROUP) if found is None else found
        self._registry = Registry(found, environ.get(LOAD_VARIABLE))
        self._lock = threading.RLock()  # while a hook is asked: a hook may ask for another
        self._asked: dict[tuple[str, str], object] = {}  # (hook, plugin) -> its answer
        self._warned: set[tuple[str, str]] = set()
        self._failures: dict[tuple[str, str], int] = {}

    # -- hooks that choose ----------------------------------------------------------------------

    def decide(
        self,
        hook: str,
        kind: type[Any],
        call: Callable[[Any], object],
        accept: Callable[[object], _T],
        *,
        use: Callable[[_T, str], None] = lambda answer, name: None,
        polite: tuple[type[NexusError], ...] = (),
    ) -> _T:
        """Return what `accept` makes of what `call` gets from the first that answers well.

        `accept` raises Rubbish for an answer that is none. `use` puts the answer to work, is told
        whose it is, and may refuse it with PluginError. A plugin may raise what is `polite` without
        being disabled: the next one is asked all the same. What the built-in returns or raises is
        passed on as it is.
        """
        for name, policy in self._candidates(hook, kind):
            if self._registry.record(name).builtin:
                answer: _T = call(policy)  # type: ignore[assignment]
                use(answer, name)
                return answer
            try:
                with self._timed(name, hook):
                    answer = accept(call(policy))
            except polite as error:
                _log.warning("plugin %r (%s): %s; the next one is asked", name, hook, error)
                continue
            except (Exception, SystemExit) as error:
                self.disable(name, hook, _what(error), error)
                continue
            try:
                use(answer, name)
            except PluginError as error:
                self.disable(name, hook, f"cannot be used: {error}", error)
            else:
                return answer
        raise PluginError(f"no plugin answers {hook}", hint="reinstall nexus_ext")

    def chosen(self, hook: str, kind: type[_T]) -> tuple[str, _T]:
        """Return (plugin, object) of the one that is asked first now."""
        for name, policy in self._candidates(hook, kind):
            return name, policy
        raise PluginError(f"no plugin answers {hook}", hint="reinstall nexus_ext")

    def _candidates(self, hook: str, kind: type[_T]) -> Iterator[tuple[str, _T]]:
        """Everyone who answers, in order; each is asked once for its object."""
        implementations = self._registry.implementations(hook)
        for index, impl in enumerate(implementations):
            answer = self._answer(impl, hook, lambda got: of_kind(got, kind))
            if answer is None:
                continue
            others = [i.plugin_name for i in implementations[index + 1 :]]
            others = [o for o in others if not self._registry.record(o).builtin]
            if others and self._first_time(impl.plugin_name, hook):
                _log.warning(
                    "%s: %r is used, %s not", hook, impl.plugin_name, ", ".join(map(repr, others))
                )
            yield impl.plugin_name, answer

    # -- hooks that add -------------------------------------------------------------------------

    def collect(
        self, hook: str, accept: Callable[[object], _T], **arguments: object
    ) -> list[tuple[str, _T]]:
        """Return (plugin, answer) of all that answer, by name; without arguments asked once."""
        found = []
        for impl in self._registry.implementations(hook):
            answer = self._answer(impl, hook, accept, **arguments)
            if answer is not None:
                found.append((impl.plugin_name, answer))
        return found

    def guarded(
        self,
        name: str,
        hook: str,
        call: Callable[[], _T],
        otherwise: _T,
        *,
        passes: tuple[type[BaseException], ...] = (),
    ) -> _T:
        """Return what `call` returns, or `otherwise`: it then raised, or the hook is disabled.

        For what is asked of an object later than its hook; `passes` are errors of the caller's.
        """
        if hook in self._registry.record(name).disabled:
            return otherwise
        try:
            with self._timed(name, hook):
                return call()
        except passes:
            raise
        except (Exception, SystemExit) as error:
            self.disable(name, hook, _what(error), error)
            return otherwise

    # -- hooks that watch -----------------------------------------------------------------------

    def watched(self, hook: str) -> bool:
        """Whether any plugin implements a hook: what is told need not be put together else."""
        return bool(self._registry.implementations(hook))

    def observe(self, hook: str, **arguments: object) -> None:
        """Tell every plugin. One that fails too often is told no more."""
        for impl in self._registry.implementations(hook):
            self.observe_one(impl, hook, **arguments)

    def observe_one(self, impl: pluggy.HookImpl, hook: str, **arguments: object) -> None:
        """Tell one plugin."""
        name = impl.plugin_name
        try:
            with self._timed(name, hook):
                self._call(impl, hook, **arguments)
        except (Exception, SystemExit) as error:
            self._observer_failed(name, hook, error)

    def _observer_failed(self, name: str, hook: str, error: BaseException) -> None:
        with self._lock:
            n = self._failures[name, hook] = self._failures.get((name, hook), 0) + 1
        if n >= OBSERVER_FAILURES:
            self.disable(name, hook, f"raised {describe(error)}, time {n}", error)
            return
        text = f"{hook} raised {describe(error)}"
        _log.error("plugin %r: %s", name, text, exc_info=error if n == 1 else None)
        self._registry.note_error(name, text)

    # -- all of them ----------------------------------------------------------------------------

    def disable(self, name: str, hook: str, what: str, error: BaseException | None = None) -> None:
        """Ask a plugin no more for one hook, and say so, once."""
        if self._registry.disable(name, hook, f"{hook} {what}"):
            distribution = self._registry.record(name).distribution
            _log.error(
                "plugin %r of %r is disabled for %s, which %s: it is not asked again, and "
                "nexus_ext goes on without it",
                name,
                distribution,
                hook,
                what,
            )
            _log.debug("plugin %r", name, exc_info=error)

    def failed_while_running(self, name: str, hook: str, what: str) -> None:
        """Say that what a plugin answered was disabled where it runs, and ask it no more.

        Not always the one that would be asked now: another model may have failed with it before,
        and what a model uses may have come from nobody (name ""), past the hooks.
        """
        text = f"{hook}: {what}; the built-in has taken over"
        _log.error("%s", f"plugin {name!r}: {text}" if name else text)
        if name and not self.is_builtin(name):
            self._registry.disable(name, hook, text)

    def is_disabled(self, name: str, hook: str) -> bool:
        return hook in self._registry.record(name).disabled

    def disabled(self) -> list[tuple[str, str, str]]:
        """Return (plugin, hook, its last error) of all that is not asked any more."""
        return [
            (record.name, hook, record.error)
            for record in self._registry.records()
            for hook in record.disabled
        ]

    def is_builtin(self, name: str) -> bool:
        return self._registry.record(name).builtin

    def note(self, name: str, hook: str, what: str) -> None:
        """Say that something of a plugin is left out, and remember it; the rest of it is used."""
        _log.warning("plugin %r: %s %s", name, hook, what)
        self._registry.note_error(name, f"{hook} {what}")

    def records(self, choosing: Mapping[str, type[Any]]) -> tuple[PluginRecord, ...]:
        """Return every plugin that was found; `choosing` are the hooks with one answer in use."""
        deciders: dict[str, list[str]] = {}
        for hook, kind in choosing.items():
            deciders[hook] = [name for name, _ in self._candidates(hook, kind)]
        return tuple(_placed(record, deciders) for record in self._registry.records())

    def _answer(
        self,
        impl: pluggy.HookImpl,
        hook: str,
        accept: Callable[[object], _T],
        **arguments: object,
    ) -> _T | None:
        """Return what a hook returns, if it is what it should be; without arguments asked once."""
        name = impl.plugin_name
        key = (hook, name)
        with self._lock:
            if key in self._asked:
                return self._asked[key]  # type: ignore[return-value]
            try:
                with self._timed(name, hook):
                    got = self._call(impl, hook, **arguments)
                    answer = None if got is None else accept(got)
            except (Exception, SystemExit) as error:
                self.disable(name, hook, _what(error), error)
                answer = None
            if not arguments:
                self._asked[key] = answer
            return answer

    def _call(self, impl: pluggy.HookImpl, hook: str, **arguments: object) -> object:
        # One implementation at a time, so that an error is laid at the right door.
        answer = impl.function(*(arguments[name] for name in impl.argnames))
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s of %s -> %s", hook, impl.plugin_name, show(answer))
        return answer

    @contextmanager
    def _timed(self, name: str, hook: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            self._registry.note_time(name, seconds)
            if seconds > SLOW_S and self._first_time(name, f"slow {hook}"):
                _log.warning("plugin %r has taken %.1f s in %s", name, seconds, hook)

    def _first_time(self, name: str, what: str) -> bool:
        with self._lock:
            first = (name, what) not in self._warned
            self._warned.add((name, what))
            return first


def of_kind(value: object, kind: type[_T]) -> _T:
    """Return `value` if it has all that `kind` has, and a name; Rubbish otherwise."""
    if not isinstance(value, kind) or type(getattr(value, "name", None)) is not str:
        raise Rubbish(f"returned {show(value)}, which is no {kind.__name__}")
    return value


def _what(error: BaseException) -> str:
    return str(error) if isinstance(error, Rubbish) else f"raised {describe(error)}"


def _placed(record: PluginRecord, deciders: Mapping[str, list[str]]) -> PluginRecord:
    """Return a record with what it decides, and what others decide before it."""
    answers = [hook for hook in record.hooks if record.name in deciders.get(hook, ())]
    decides = tuple(hook for hook in answers if deciders[hook][0] == record.name)
    overridden = tuple(hook for hook in answers if hook not in decides)
    state = record.state
    if state == "active" and overridden and set(record.hooks) == set(overridden):
        state = "overridden"
    return replace(record, state=state, decides=decides, overridden=overridden)


def _trace_to_stderr() -> None:
    _log.setLevel(logging.DEBUG)
    if not any(handler.get_name() == TRACE_VARIABLE for handler in _log.handlers):
        handler = logging.StreamHandler()
        handler.set_name(TRACE_VARIABLE)
        handler.setFormatter(logging.Formatter("nexus plugins: %(message)s"))
        _log.addHandler(handler)
