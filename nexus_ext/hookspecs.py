"""The hooks that a plugin can implement. Documentation only: nothing here does anything.

A plugin is a distribution with an entry point in the group "nexus_ext" that names a module (or an
object) whose functions carry `@nexus_ext.hookimpl` and the name of a hook below. A function takes
those of the arguments that it wants, by name. `nexus_plugin_api = 1` beside the functions says
which version of this list the plugin was written for; see PLUGIN_API.

Three kinds of hooks:

- that choose (placement solver, I/O policy, cache policy, expert predictor, eviction policy,
  quantization allocator): they return an object, or None to leave the choice to others. They are
  asked once and the object is kept. A plugin wins over the built-in. When several plugins answer,
  the one whose entry point name comes first in alphabetical order wins, and a warning names the
  others.
- that add (codecs, containers, stores, kernels, routes, metrics, commands): all are asked. What
  exists is never replaced; of two that bring the same name the first in alphabetical order stays.
- that watch (models, requests, routers): all are called, and what they return is ignored.

A plugin that raises, or answers what its hook does not allow, is disabled by name for that hook,
and the built-in takes over: see plugins/README.md. Each hook has a page in plugins/docs/hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import pluggy

if TYPE_CHECKING:
    import click
    from starlette.routing import Route

    from nexus_ext.codecs import Codec
    from nexus_ext.policies import (
        CachePolicy,
        EvictionPolicy,
        ExpertPredictor,
        FormatReader,
        FormatWriter,
        IoPolicy,
        KernelProvider,
        MetricsCollector,
        ModelInfo,
        ModelStore,
        PlacementSolver,
        QuantizationAllocator,
        RequestInfo,
        RequestStart,
        RouterObserver,
        ServerInfo,
        StorePlaces,
    )

PROJECT = "nexus_ext"

# Counts up when a hook, an argument or a field of what is handed over is added. Nothing is ever
# removed: a plugin that was written for a lower version works.
PLUGIN_API: Final = 1

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def nexus_placement_solver() -> PlacementSolver | None:
    """Return the object whose `solve(catalog, hardware, request)` places tensors in memories."""


@hookspec(firstresult=True)
def nexus_io_policy() -> IoPolicy | None:
    """Return the object whose `choose(info)` says how streamed weights are read."""


@hookspec(firstresult=True)
def nexus_cache_policy() -> CachePolicy | None:
    """Return the object whose `choose(info)` says which experts leave the cache first."""


@hookspec(firstresult=True)
def nexus_expert_predictor() -> ExpertPredictor | None:
    """Return the object whose `choose(info)` says how experts are predicted and read ahead."""


@hookspec(firstresult=True)
def nexus_eviction_policy() -> EvictionPolicy | None:
    """Return the object that says which model of the multiplexer gives up memory for which."""


@hookspec(firstresult=True)
def nexus_quantization_allocator() -> QuantizationAllocator | None:
    """Return the object whose `allocate(items, budget_nbytes)` picks a type for each tensor."""


@hookspec
def nexus_codec() -> Codec | None:
    """Return a codec that NXF files can be written with and read; its name is kept in them."""


@hookspec
def nexus_format_reader() -> FormatReader | None:
    """Return an object that opens models in another container, whose weights can be streamed."""


@hookspec
def nexus_format_writer() -> FormatWriter | None:
    """Return an object that `nexus convert` writes models in another container with."""


@hookspec
def nexus_kernel_provider() -> KernelProvider | None:
    """Return an object with a C function that computes products of resident weights."""


@hookspec
def nexus_model_store(places: StorePlaces) -> ModelStore | None:
    """Return a place with named models. Our own store is asked first, plugins in their order."""


@hookspec
def nexus_server_routes(info: ServerInfo) -> Sequence[Route] | None:
    """Return Starlette routes for the server. They are guarded, and replace none that exists."""


@hookspec
def nexus_metrics() -> MetricsCollector | None:
    """Return an object whose `collect()` adds Prometheus metrics to those of the server."""


@hookspec
def nexus_register_commands(cli: click.Group) -> None:
    """Add commands to the `nexus` command line. A command that exists is never replaced."""


@hookspec
def nexus_model_loaded(info: ModelInfo) -> None:
    """See that a model was loaded and is ready for requests."""


@hookspec
def nexus_model_closed(info: ModelInfo) -> None:
    """See that a model was closed and its memory given back."""


@hookspec
def nexus_request_started(info: RequestStart) -> None:
    """See that a request is about to be computed. Called once a request, never once a token."""


@hookspec
def nexus_request_done(info: RequestInfo) -> None:
    """See that a request has ended. Called once a request, never once a token."""


@hookspec
def nexus_router_observer() -> RouterObserver | None:
    """Return an object whose `observe(routing)` sees, after each call, which experts were used."""
