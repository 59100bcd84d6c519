"""Plugins in C, and in Python behind the same structs, given to a model of the core.

Thin: native/include/nexus_plugin.h says what a plugin may do and when it is called. An object in
Python gets a struct whose functions call it; an exception of its disables it, as a failure of a
function in C does, and is logged with its name.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nexus_ext._native as _native
from nexus_ext.core_errors import text_of as _text
from nexus_ext.errors import OutOfMemory, PluginError, UsageError
from nexus_ext.policies.native import EvictionAsk, LayerCachePolicy, LayerPredictor, NativePolicy

if TYPE_CHECKING:
    from nexus_ext.routing import Replay, RoutingTrace

ffi = _native.ffi
lib = _native.lib

_log = logging.getLogger("nexus_ext.plugins")

CachePolicyLike = str | NativePolicy | LayerCachePolicy
PredictorLike = str | NativePolicy | LayerPredictor


@dataclass(frozen=True, slots=True)
class PluginUse:
    """What became of a policy that a model uses."""

    name: str
    why: str  # it was disabled; "" while it is in use
    calls: int  # of its functions
    ns: int  # that they took
    plugin: str = ""  # that chose it; "" when no hook was asked


def _use(info: Any) -> PluginUse:
    return PluginUse(_text(info.name), _text(info.why), int(info.calls), int(info.ns))


def _check(status: int, name: str, error: Any) -> None:
    if status == lib.NX_OK:
        return
    text = _text(error.text)
    if status in (lib.NX_E_ABI, lib.NX_E_INVALID):
        raise PluginError(f"plugin {name!r}: {text}", hint="see plugins/docs/c-policies.md")
    raise OutOfMemory(f"plugin {name!r}: {text}", hint="give the process more memory")


# -- cache policies ------------------------------------------------------------------------------


def use_cache_policy(model: Any, policy: CachePolicyLike) -> object:
    """Let the cache of an `nx_model` evict what `policy` says; return what must be kept for it.

    PluginError when the struct is not one of this version, UsageError for an unknown name.
    """
    struct, keep = _cache_struct(policy)
    error = ffi.new("nx_error *")
    name = policy if isinstance(policy, str) else policy.name
    _check(lib.nx_cache_use_policy(model, struct, error), name, error)
    return keep


def cache_policy(model: Any) -> PluginUse:
    """Return which policy the cache was given, and what became of it."""
    info = ffi.new("nx_plugin_info *")
    lib.nx_cache_policy_get(model, info)
    return _use(info)


def _cache_struct(policy: CachePolicyLike) -> tuple[Any, object]:
    if isinstance(policy, str):
        struct = lib.nx_cache_builtin(policy.encode())
        if struct == ffi.NULL:
            raise UsageError(
                f"there is no cache policy {policy!r}",
                hint="use adaptive, lfru, lru, lfu or least-stale",
            )
        return struct, None
    if isinstance(policy, NativePolicy):
        return ffi.cast("const nxp_cache_policy *", policy.address), policy.keepalive
    return _python_cache(policy)


def replay(
    policy: CachePolicyLike,
    used: Sequence[Sequence[int]],
    n_experts: int,
    n_slots: int,
    *,
    layer: int = 0,
) -> tuple[int, PluginUse]:
    """Return how many of the experts that the tokens use a cache of one layer would not have.

    `used`: the experts of each token, each once. The code that evicts is the cache's own.
    UsageError for a token that uses more experts than there are slots.
    """
    import itertools

    most = max(map(len, used), default=0)
    flat = list(itertools.chain.from_iterable((*t, *[-1] * (most - len(t))) for t in used))
    struct, keep = _cache_struct(policy)
    misses, info = ffi.new("uint64_t *"), ffi.new("nx_plugin_info *")
    error = ffi.new("nx_error *")
    status = lib.nx_cache_replay(
        struct,
        layer,
        n_experts,
        n_slots,
        ffi.new("int32_t[]", flat),
        len(used),
        most,
        misses,
        info,
        error,
    )
    if status == lib.NX_E_INVALID and "trace" in _text(error.text):
        raise UsageError(_text(error.text), hint="give the cache more slots")
    _check(status, policy if isinstance(policy, str) else policy.name, error)
    del keep  # until here
    return int(misses[0]), _use(info)


def replay_trace(
    trace: RoutingTrace, policy: CachePolicyLike, slots: Sequence[int]
) -> tuple[Replay, tuple[str, ...]]:
    """Return what a policy does with a trace, and why it was disabled, layer by layer (if it was).

    As `nexus_ext.routing.replay` does for the built-ins by their formulas: `slots` are those of
    each layer, and a layer with fewer than its router picks for a token has no cache.
    """
    from nexus_ext.routing.replay import Replay, decisions

    numbers = decisions(trace)
    uses, misses, disabled = [], [], []
    for i, (layer, n_slots) in enumerate(zip(trace.layers, slots, strict=True)):
        used = [[e for e in row if e >= 0] for row in numbers[:, i].tolist()]
        uses.append(sum(map(len, used)))
        misses.append(uses[-1])
        if n_slots >= layer.n_used:
            misses[-1], use = replay(policy, used, layer.n_experts, n_slots, layer=i)
            disabled += [use.why] if use.why else []
    name = policy if isinstance(policy, str) else policy.name
    read_bytes = sum(n * layer.record_bytes for n, layer in zip(misses, trace.layers, strict=True))
    found = Replay(name, tuple(slots), tuple(uses), tuple(misses), read_bytes, trace.n_tokens)
    return found, tuple(disabled)


def replay_builtin(trace: RoutingTrace, policy: str, slots: Sequence[int]) -> Replay:
    """Return what a built-in policy does with a trace: `by_code` of `nexus_ext.routing.replay`."""
    return replay_trace(trace, policy, slots)[0]


# -- predictors ----------------------------------------------------------------------------------


def use_predictor(model: Any, predictor: NativePolicy | LayerPredictor) -> object:
    """Let a plugin predict the experts of an `nx_model`; return what must be kept for it.

    PluginError when the struct is not one of this version.
    """
    automatic = bool(getattr(predictor, "automatic", True))
    keep: object
    if isinstance(predictor, NativePolicy):
        struct, keep = ffi.cast("const nxp_predictor *", predictor.address), predictor.keepalive
    else:
        struct, keep = python_predictor(predictor)
    error = ffi.new("nx_error *")
    _check(lib.nx_predict_use(model, struct, automatic, error), predictor.name, error)
    return keep


def predictor_use(model: Any) -> PluginUse:
    """Return which plugin predicts, and what became of it; its name is "" when none ever did."""
    info = ffi.new("nx_plugin_info *")
    lib.nx_predict_plugin_get(model, info)
    return _use(info)


# -- objects in Python ---------------------------------------------------------------------------


class _Adapter:
    """A policy in Python, and what its struct points to."""

    def __init__(self, policy: Any, struct: str, kind: int) -> None:
        self.policy = policy
        self.layers: list[Any] = []  # handles of _Layer
        self.handle = ffi.new_handle(self)
        self.name = ffi.new("char[]", str(policy.name).encode())
        self.struct = ffi.new(struct + " *")
        self.struct.head = (ffi.sizeof(struct), lib.NXP_API_VERSION, kind, 0, self.name)
        self.struct.user = self.handle

    def failed(self, what: str) -> None:
        _log.exception("plugin %r: %s raised, and is not called again", self.policy.name, what)


class _Layer:
    def __init__(self, adapter: _Adapter, number: int) -> None:
        self.adapter = adapter
        self.number = number
        self.broken = False  # `used` raised: the next question is not asked


def _python_cache(policy: LayerCachePolicy) -> tuple[Any, _Adapter]:
    adapter = _Adapter(policy, "nxp_cache_policy", lib.NXP_CACHE_POLICY)
    adapter.struct.create = lib.nx_python_cache_create
    adapter.struct.used = lib.nx_python_cache_used
    adapter.struct.victims = lib.nx_python_cache_victims
    return adapter.struct, adapter


def python_predictor(predictor: LayerPredictor) -> tuple[Any, _Adapter]:
    adapter = _Adapter(predictor, "nxp_predictor", lib.NXP_PREDICTOR)
    adapter.struct.routed = lib.nx_python_routed
    adapter.struct.predict = lib.nx_python_predict
    return adapter.struct, adapter


@ffi.def_extern(onerror=lambda *_: None)  # type: ignore[untyped-decorator]
def nx_python_cache_create(user: Any, layer: Any) -> Any:
    adapter: _Adapter = ffi.from_handle(user)
    handle = ffi.new_handle(_Layer(adapter, int(layer.layer)))
    adapter.layers.append(handle)
    return handle


@ffi.def_extern(onerror=lambda *_: None)  # type: ignore[untyped-decorator]
def nx_python_cache_used(state: Any, use: Any) -> None:
    layer: _Layer = ffi.from_handle(state)
    try:
        layer.adapter.policy.used(layer.number, ffi.unpack(use.experts, use.n_experts))
    except BaseException:  # must not unwind through C
        layer.broken = True
        layer.adapter.failed("used")


@ffi.def_extern(error=-1, onerror=lambda *_: None)  # type: ignore[untyped-decorator]
def nx_python_cache_victims(state: Any, ask: Any, out: Any) -> int:
    layer: _Layer = ffi.from_handle(state)
    if layer.broken:
        return -1
    try:
        n = ask.n_candidates
        question = EvictionAsk(
            layer.number,
            ask.n_wanted,
            tuple(ffi.unpack(ask.experts, n)),
            tuple(ffi.unpack(ask.ages, n)),
            tuple(ffi.unpack(ask.frequencies, n)),
            tuple(ffi.unpack(ask.incoming, ask.n_wanted)),
            bool(ask.reason),
        )
        answer = layer.adapter.policy.victims(question)
        for i in range(ask.n_wanted):
            out[i] = answer[i]
    except BaseException:  # must not unwind through C
        layer.adapter.failed("victims")
        return -1
    return 0


@ffi.def_extern(onerror=lambda *_: None)  # type: ignore[untyped-decorator]
def nx_python_routed(state: Any, routed: Any) -> None:
    adapter: _Adapter = ffi.from_handle(state)
    try:
        n = routed.n_used
        flat = ffi.unpack(routed.experts, routed.n_tokens * n)
        tokens = [flat[i : i + n] for i in range(0, len(flat), n)]
        adapter.policy.routed(routed.layer, tokens)
    except BaseException:  # must not unwind through C
        adapter.layers.append(None)  # the next question is not asked
        adapter.failed("routed")


@ffi.def_extern(error=-1, onerror=lambda *_: None)  # type: ignore[untyped-decorator]
def nx_python_predict(state: Any, ask: Any, out: Any) -> int:
    adapter: _Adapter = ffi.from_handle(state)
    if adapter.layers:
        return -1
    try:
        found = adapter.policy.predict(ask.layer, ask.n_tokens, ask.n_used, ask.limit)
        n = min(len(found), int(ask.capacity))
        for i in range(n):
            out[i] = found[i]
        return n
    except BaseException:  # must not unwind through C
        adapter.failed("predict")
        return -1
