"""What a plugin's predictor, in C or in Python, says of the tokens of a routing trace.

Through the same struct as in the core (native/include/nexus_plugin.h), without a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import nexus_ext._native as _native
from nexus_ext.errors import PluginError
from nexus_ext.native_plugins import python_predictor
from nexus_ext.policies.native import LayerPredictor, NativePolicy

if TYPE_CHECKING:
    from nexus_ext.routing import RoutingTrace, TracedLayer

ffi = _native.ffi
lib = _native.lib

_HINT: Final = "see plugins/docs/c-policies.md"


def predict_trace(
    trace: RoutingTrace, predictor: NativePolicy | LayerPredictor, slots: int
) -> list[list[tuple[int, ...]]]:
    """Return what a predictor says of each layer for each token: [layer][token], likeliest first.

    Tokens come one after the other, as while decoding. As the core does, it asks for each layer but
    the first, when the router of the one before has decided. `slots` are those of each layer's
    cache. PluginError when the predictor fails, or names an expert twice, or one there is not.
    """
    struct, keep = _struct(predictor)
    layers = trace.layers
    n_experts = ffi.new("uint32_t[]", [layer.n_experts for layer in layers])
    n_slots = ffi.new("uint32_t[]", [slots] * len(layers))
    told = _made("nxp_layers", (len(layers), n_experts, n_slots))
    state = struct.create(struct.user, told) if struct.create else struct.user
    if struct.create and not state:
        raise PluginError(f"plugin {predictor.name!r}: `create` has failed", hint=_HINT)
    said: list[list[tuple[int, ...]]] = [[] for _ in layers]
    columns = [layer.numbers().tolist() for layer in layers]
    try:
        for token in range(trace.n_tokens):
            for i, layer in enumerate(layers):
                if i:
                    said[i].append(_predict(struct, state, predictor.name, i, layer))
                if struct.routed:
                    experts = ffi.new("int32_t[]", columns[i][token])
                    struct.routed(state, _made("nxp_routed", (i, 1, layer.n_used, experts)))
    finally:
        if struct.create and struct.destroy:
            struct.destroy(state)
    del keep  # until here
    return said


def _predict(
    struct: Any, state: Any, name: str, number: int, layer: TracedLayer
) -> tuple[int, ...]:
    out = ffi.new("int32_t[]", layer.n_experts)
    question = (number, 1, layer.n_used, layer.n_experts, layer.n_used)
    n = struct.predict(state, _made("nxp_predict_ask", question), out)
    if not 0 <= n <= layer.n_experts:
        raise PluginError(f"plugin {name!r}: `predict` returned {n} for layer {number}", hint=_HINT)
    found = tuple(ffi.unpack(out, n))
    if len(set(found)) < n or not all(0 <= expert < layer.n_experts for expert in found):
        raise PluginError(f"plugin {name!r}: `predict` said {found} for layer {number}", hint=_HINT)
    return found


def _struct(predictor: NativePolicy | LayerPredictor) -> tuple[Any, object]:
    if not isinstance(predictor, NativePolicy):
        return python_predictor(predictor)
    struct = ffi.cast("const nxp_predictor *", predictor.address)
    head = struct.head
    if (head.kind, head.api_version) != (lib.NXP_PREDICTOR, lib.NXP_API_VERSION):
        raise PluginError(
            f"plugin {predictor.name!r}: no predictor of version {lib.NXP_API_VERSION} of "
            "nexus_plugin.h",
            hint=_HINT,
        )
    return struct, predictor.keepalive


def _made(kind: str, values: tuple[object, ...]) -> Any:
    """Return a struct that is handed to a plugin; such structs begin with their own size."""
    made = ffi.new(f"{kind} *", values)
    ffi.cast("uint32_t *", made)[0] = ffi.sizeof(kind)
    return made
