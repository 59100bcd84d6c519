"""What nexus_ext asks its plugins, and what it does when one fails.

Looked for at the first question, so that importing nexus_ext loads no plugin. Two environment
variables (see plugins/README.md):

    NEXUS_LOAD_PLUGINS   "none", or the only entry points to load, separated by commas
    NEXUS_TRACE_PLUGINS  "1": log every registration and every call of a hook to stderr

A plugin whose observer or command hook fails is logged by name, and the run goes on. A plugin that
was asked for a decision and fails at it raises PluginError with its name: a run with another
decision than the installed one would pass for something that it is not.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

from nexus_ext.codecs import Codec, Codecs, is_codec_name
from nexus_ext.errors import NexusError, PluginError
from nexus_ext.plugin_registry import GROUP, LOAD_VARIABLE, PluginRecord, Registry, describe
from nexus_ext.policies import (
    CacheChoice,
    CacheInfo,
    CachePolicy,
    CachePolicyName,
    ExpertPredictor,
    IoInfo,
    IoMode,
    IoPolicy,
    LayerCachePolicy,
    LayerPredictor,
    ModelInfo,
    NativePolicy,
    PlacementSolver,
    PredictorChoice,
    PredictorName,
    RequestInfo,
)

if TYPE_CHECKING:
    import click
    import pluggy

    from nexus_ext.hardware.profile import HardwareProfile
    from nexus_ext.placement import Plan, PlanRequest
    from nexus_ext.types import Catalog

TRACE_VARIABLE = "NEXUS_TRACE_PLUGINS"

_log = logging.getLogger("nexus_ext.plugins")
_PLACEMENT = "nexus_placement_solver"
_IO = "nexus_io_policy"
_CACHE = CACHE_HOOK = "nexus_cache_policy"
_PREDICTOR = PREDICTOR_HOOK = "nexus_expert_predictor"
_CODEC = "nexus_codec"
_T = TypeVar("_T")


class Plugins:
    """The plugins of one process; `plugins()` returns the ones that nexus_ext uses."""

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
        self._chosen: dict[str, tuple[str, object]] = {}  # hook -> (plugin, its answer)

    def placement_solver(self) -> PlacementSolver:
        """Return the solver in use."""
        return self._choose(_PLACEMENT, PlacementSolver)[1]  # type: ignore[type-abstract]

    def io_policy(self) -> IoPolicy:
        """Return the I/O policy in use."""
        return self._choose(_IO, IoPolicy)[1]  # type: ignore[type-abstract]

    def solve(self, catalog: Catalog, hardware: HardwareProfile, request: PlanRequest) -> Plan:
        """Place a model with the solver in use.

        Raises what a solver may raise (DoesNotFit), and PluginError for anything else that a
        plugin's solver raises or returns.
        """
        from nexus_ext.placement import Plan

        name, solver = self._choose(_PLACEMENT, PlacementSolver)  # type: ignore[type-abstract]
        try:
            plan = solver.solve(catalog, hardware, request)
        except NexusError:
            raise
        except Exception as error:
            raise self._failure(name, _PLACEMENT, f"raised {describe(error)}") from error
        if not isinstance(plan, Plan):
            raise self._failure(name, _PLACEMENT, f"returned {plan!r}, which is no Plan")
        if plan.fingerprint != catalog.fingerprint:
            raise self._failure(name, _PLACEMENT, f"planned for the model {plan.fingerprint!r}")
        return plan

    def choose_io(self, info: IoInfo) -> IoMode:
        """Ask the policy in use how to read; PluginError for an answer that is none."""
        name, policy = self._choose(_IO, IoPolicy)  # type: ignore[type-abstract]
        try:
            mode = policy.choose(info)
        except Exception as error:
            raise self._failure(name, _IO, f"raised {describe(error)}") from error
        if mode not in ("direct", "buffered"):
            raise self._failure(name, _IO, f'chose {mode!r} instead of "direct" or "buffered"')
        return mode

    def choose_cache(
        self, info: CacheInfo, use: Callable[[CacheChoice], None] = lambda choice: None
    ) -> CacheChoice:
        """Ask the policy in use what to evict; PluginError for an answer that is none.

        `use` puts the choice to work, and may refuse it with PluginError.
        """
        kind: type[CachePolicy] = CachePolicy  # type: ignore[type-abstract]
        found: CacheChoice = self._choose_and_use(
            _CACHE, kind, CachePolicyName, LayerCachePolicy, info, use
        )
        return found

    def choose_predictor(
        self, info: CacheInfo, use: Callable[[PredictorChoice], None] = lambda choice: None
    ) -> PredictorChoice:
        """Ask the predictor in use how to predict, as `choose_cache`."""
        kind: type[ExpertPredictor] = ExpertPredictor  # type: ignore[type-abstract]
        found: PredictorChoice = self._choose_and_use(
            _PREDICTOR, kind, PredictorName, LayerPredictor, info, use
        )
        return found

    def _choose_and_use(
        self,
        hook: str,
        kind: type[Any],
        names: Any,
        layerwise: type[Any],
        info: CacheInfo,
        use: Callable[[Any], None],
    ) -> Any:
        name, policy = self._choose(hook, kind)
        try:
            chosen = policy.choose(info)
        except Exception as error:
            raise self._failure(name, hook, f"raised {describe(error)}") from error
        known = get_args(names)
        by_name = isinstance(chosen, str) and chosen in known
        if not by_name and not isinstance(chosen, (NativePolicy, layerwise)):
            raise self._failure(
                name, hook, f"chose {chosen!r} instead of one of {', '.join(known)}"
            )
        try:
            use(chosen)
        except PluginError as error:
            raise self._failure(name, hook, f"cannot be used: {error}") from error
        return chosen

    def failed_while_running(self, hook: str, what: str) -> None:
        """Remember and log that the plugin that answers this hook was disabled for a model."""
        name = self._decider(hook)
        if name is not None:
            text = f"{hook}: {what}; the built-in has taken over"
            _log.error("plugin %r: %s", name, text)
            self._registry.note_error(name, text)

    def codecs(self) -> Codecs:
        """Return all codecs: those of nexus_ext and those of plugins.

        Raises PluginError for an answer that is no codec, or that takes the name of another: a
        file would be read by other rules than it was written.
        """
        taken = dict.fromkeys(Codecs().names(), "nexus_ext")
        added: list[Codec] = []
        for impl in self._registry.implementations(_CODEC):
            name = impl.plugin_name
            try:
                codec = self._call(impl, _CODEC)
            except Exception as error:
                raise self._failure(name, _CODEC, f"raised {describe(error)}") from error
            if codec is None:
                continue
            if not isinstance(codec, Codec) or not is_codec_name(codec.name):
                raise self._failure(name, _CODEC, f"returned {codec!r}, which is no Codec")
            if codec.name in taken:
                raise self._failure(
                    name, _CODEC, f"has the name {codec.name!r}, which {taken[codec.name]!r} has"
                )
            taken[codec.name] = name
            added.append(codec)
        return Codecs(added)

    def register_commands(self, cli: click.Group) -> None:
        """Let plugins add commands; one that takes the name of another is dropped and logged."""
        for impl in self._registry.implementations("nexus_register_commands"):
            before = dict(cli.commands)
            self._observe(impl, "nexus_register_commands", cli=cli)
            for name, command in before.items():
                if cli.commands.get(name) is not command:
                    _log.warning("plugin %r: command %r exists, kept", impl.plugin_name, name)
                    cli.commands[name] = command

    def model_loaded(self, info: ModelInfo) -> None:
        self._observe_all("nexus_model_loaded", info=info)

    def model_closed(self, info: ModelInfo) -> None:
        self._observe_all("nexus_model_closed", info=info)

    def request_done(self, info: RequestInfo) -> None:
        self._observe_all("nexus_request_done", info=info)

    def list_plugins(self) -> tuple[PluginRecord, ...]:
        """Return every plugin that was found, built-ins first, then by name."""
        kinds: tuple[tuple[str, type[object]], ...] = (
            (_PLACEMENT, PlacementSolver),
            (_IO, IoPolicy),
            (_CACHE, CachePolicy),
            (_PREDICTOR, ExpertPredictor),
        )
        for hook, kind in kinds:
            try:
                self._choose(hook, kind)
            except PluginError as error:
                _log.error("%s", error)
        return tuple(
            replace(
                record,
                decides=tuple(h for h in record.hooks if self._decider(h) == record.name),
            )
            for record in self._registry.records()
        )

    def _decider(self, hook: str) -> str | None:
        return self._chosen[hook][0] if hook in self._chosen else None

    def _choose(self, hook: str, kind: type[_T]) -> tuple[str, _T]:
        """Return (plugin, the object that it answered), asking only the first time."""
        if hook not in self._chosen:
            self._chosen[hook] = self._ask(hook, kind)
        name, answer = self._chosen[hook]
        return name, cast(_T, answer)

    def _ask(self, hook: str, kind: type[_T]) -> tuple[str, _T]:
        implementations = self._registry.implementations(hook)
        for index, impl in enumerate(implementations):
            name = impl.plugin_name
            try:
                answer = self._call(impl, hook)
            except Exception as error:
                raise self._failure(name, hook, f"raised {describe(error)}") from error
            if answer is None:
                continue
            if not isinstance(answer, kind) or not isinstance(getattr(answer, "name", None), str):
                raise self._failure(name, hook, f"returned {answer!r}, which is no {kind.__name__}")
            others = [i.plugin_name for i in implementations[index + 1 :]]
            others = [o for o in others if self._registry.record(o).state != "built-in"]
            if others:
                _log.warning("%s: %r is used, %s not", hook, name, ", ".join(map(repr, others)))
            return name, answer
        raise PluginError(f"no plugin answers {hook}", hint="reinstall nexus_ext")

    def _call(self, impl: pluggy.HookImpl, hook: str, **arguments: object) -> object:
        # One implementation at a time, so that an error is laid at the right door.
        answer = impl.function(*(arguments[name] for name in impl.argnames))
        _log.debug("%s of %s -> %r", hook, impl.plugin_name, answer)
        return answer

    def _observe_all(self, hook: str, **arguments: object) -> None:
        for impl in self._registry.implementations(hook):
            self._observe(impl, hook, **arguments)

    def _observe(self, impl: pluggy.HookImpl, hook: str, **arguments: object) -> None:
        try:
            self._call(impl, hook, **arguments)
        except Exception as error:
            text = f"{hook} raised {describe(error)}"
            _log.error("plugin %r: %s", impl.plugin_name, text, exc_info=error)
            self._registry.note_error(impl.plugin_name, text)

    def _failure(self, name: str, hook: str, what: str) -> PluginError:
        self._registry.note_error(name, f"{hook} {what}")
        distribution = self._registry.record(name).distribution
        return PluginError(
            f"plugin {name!r} ({hook}) {what}",
            hint=f"uninstall {distribution!r}, or set {LOAD_VARIABLE}=none",
        )


def _trace_to_stderr() -> None:
    _log.setLevel(logging.DEBUG)
    if not any(handler.get_name() == TRACE_VARIABLE for handler in _log.handlers):
        handler = logging.StreamHandler()
        handler.set_name(TRACE_VARIABLE)
        handler.setFormatter(logging.Formatter("nexus plugins: %(message)s"))
        _log.addHandler(handler)


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
