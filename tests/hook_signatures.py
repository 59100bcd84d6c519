# ruff: noqa: E501
"""The signatures of the hooks and of what goes through them, as each version of the API had them.

A table that is written once for each version: what is in it never changes. `PLUGIN_API` counts up
with what is added, and a new entry of VERSIONS lists it.
"""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from typing import Any

from nexus_ext import hookspecs, policies


def signature_of(name: str) -> tuple[str, ...]:
    """Return a hook as its arguments and what it returns, a class as its fields or its methods."""
    value: Any = getattr(hookspecs, name, None) or getattr(policies, name)
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        arguments = [str(parameter) for parameter in signature.parameters.values()]
        return (*arguments, f"-> {signature.return_annotation}")
    if is_dataclass(value):
        return tuple(f"{field.name}: {field.type}" for field in fields(value))
    attributes = [f"{n}: {kind}" for n, kind in inspect.get_annotations(value).items()]
    for n, member in vars(value).items():
        if isinstance(member, property):
            assert member.fget is not None
            attributes.append(f"{n}: {inspect.signature(member.fget).return_annotation}")
        elif inspect.isfunction(member) and not n.startswith("_"):
            attributes.append(f"{n}{inspect.signature(member)}")
    return tuple(attributes)


VERSIONS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {
        "nexus_placement_solver": ("-> PlacementSolver | None",),
        "nexus_io_policy": ("-> IoPolicy | None",),
        "nexus_cache_policy": ("-> CachePolicy | None",),
        "nexus_expert_predictor": ("-> ExpertPredictor | None",),
        "nexus_eviction_policy": ("-> EvictionPolicy | None",),
        "nexus_quantization_allocator": ("-> QuantizationAllocator | None",),
        "nexus_codec": ("-> Codec | None",),
        "nexus_format_reader": ("-> FormatReader | None",),
        "nexus_format_writer": ("-> FormatWriter | None",),
        "nexus_kernel_provider": ("-> KernelProvider | None",),
        "nexus_model_store": (
            "places: 'StorePlaces'",
            "-> ModelStore | None",
        ),
        "nexus_server_routes": (
            "info: 'ServerInfo'",
            "-> Sequence[Route] | None",
        ),
        "nexus_metrics": ("-> MetricsCollector | None",),
        "nexus_register_commands": (
            "cli: 'click.Group'",
            "-> None",
        ),
        "nexus_model_loaded": (
            "info: 'ModelInfo'",
            "-> None",
        ),
        "nexus_model_closed": (
            "info: 'ModelInfo'",
            "-> None",
        ),
        "nexus_request_started": (
            "info: 'RequestStart'",
            "-> None",
        ),
        "nexus_request_done": (
            "info: 'RequestInfo'",
            "-> None",
        ),
        "nexus_router_observer": ("-> RouterObserver | None",),
        "CacheInfo": (
            "n_layers: int",
            "n_experts: int",
            "n_experts_used: int",
            "slots: int",
            "fingerprint: str",
            "layers: tuple[int, ...]",
        ),
        "CachePolicy": (
            "name: str",
            "choose(self, info: 'CacheInfo') -> 'CacheChoice'",
        ),
        "EvictionAsk": (
            "layer: int",
            "n_wanted: int",
            "experts: tuple[int, ...]",
            "ages: tuple[int, ...]",
            "frequencies: tuple[float, ...]",
            "incoming: tuple[int, ...]",
            "ahead: bool",
        ),
        "EvictionPolicy": (
            "name: str",
            "activate(self, memory: 'Memory', name: 'str') -> 'Activation | None'",
            "make_room(self, memory: 'Memory', wanted_bytes: 'int', name: 'str', *, unload: 'bool' = True) -> 'tuple[Step, ...] | None'",
        ),
        "ExpertPredictor": (
            "name: str",
            "choose(self, info: 'CacheInfo') -> 'PredictorChoice'",
        ),
        "FormatReader": (
            "name: str",
            "claims(self, path: 'str', start: 'bytes') -> 'bool'",
            "open(self, path: 'str') -> 'Catalog'",
        ),
        "FormatWriter": (
            "name: str",
            "suffixes: tuple[str, ...]",
            "write(self, source: 'Source', target: 'str', *, overwrite: 'bool', progress: 'Progress') -> 'Sequence[str]'",
        ),
        "IoInfo": (
            "streamed_bytes: int",
            "resident_bytes: int",
            "available_bytes: int",
            "limit_bytes: int | None",
        ),
        "IoPolicy": (
            "name: str",
            "choose(self, info: 'IoInfo') -> 'IoMode'",
        ),
        "KernelInfo": (
            "op: str",
            "type_name: str",
            "n_in: int",
            "n_out: int",
        ),
        "KernelProvider": (
            "name: str",
            "function: int",
            "claims(self, info: 'KernelInfo') -> 'bool'",
        ),
        "LayerCachePolicy": (
            "name: str",
            "used(self, layer: 'int', experts: 'Sequence[int]') -> 'None'",
            "victims(self, ask: 'EvictionAsk') -> 'Sequence[int]'",
        ),
        "LayerPredictor": (
            "name: str",
            "routed(self, layer: 'int', tokens: 'Sequence[Sequence[int]]') -> 'None'",
            "predict(self, layer: 'int', n_tokens: 'int', n_used: 'int', limit: 'int') -> 'Sequence[int]'",
        ),
        "LayerRouting": (
            "layer: int",
            "experts: tuple[tuple[int, ...], ...]",
        ),
        "MetricsCollector": ("collect(self) -> 'Iterable[Metric]'",),
        "ModelInfo": (
            "path: str",
            "fingerprint: str",
            "architecture: str",
            "resident_bytes: int",
            "streamed_bytes_per_token: int",
            "io_mode: IoMode | None",
        ),
        "ModelStore": (
            "name: str",
            "find(self, name: 'ModelName') -> 'StoredModel | None'",
            "names(self) -> 'Sequence[ModelName]'",
        ),
        "NativePolicy": (
            "name: str",
            "address: int",
            "keepalive: object",
            "automatic: bool",
        ),
        "PlacementSolver": (
            "name: str",
            "solve(self, catalog: 'Catalog', hardware: 'HardwareProfile', request: 'PlanRequest') -> 'Plan'",
        ),
        "QuantizationAllocator": (
            "name: str",
            "allocate(self, items: 'Sequence[Item]', budget_nbytes: 'int') -> 'Allocation'",
        ),
        "RequestInfo": (
            "model: ModelInfo",
            "n_prompt_tokens: int",
            "n_tokens: int",
            "prefill_ns: int",
            "decode_ns: int",
            "read_bytes: int",
            "id: str",
            "interface: Interface",
            "model_name: str",
            "outcome: Outcome",
            "error: str",
            "n_cached_tokens: int",
            "queue_ns: int",
            "load_ns: int",
            "started_unix_ns: int",
            "ended_unix_ns: int",
        ),
        "RequestStart": (
            "id: str",
            "interface: Interface",
            "model: str",
            "n_prompt_tokens: int",
            "started_unix_ns: int",
        ),
        "RouterObserver": (
            "name: str",
            "observe(self, routing: 'Routing') -> 'None'",
        ),
        "Routing": (
            "model: ModelInfo",
            "layers: tuple[LayerRouting, ...]",
        ),
        "ServerInfo": ("paths: tuple[str, ...]",),
        "StorePlaces": (
            "ollama: str | None",
            "lm_studio: str | None",
        ),
    },
}
