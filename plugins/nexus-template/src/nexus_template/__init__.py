"""The hooks of this plugin, and nothing else: what they need is imported when they are called.

Delete what you do not need. A hook that is not here costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nexus_ext import hookimpl

if TYPE_CHECKING:
    import click
    from starlette.routing import Route

    from nexus_ext.hooks import (
        CachePolicy,
        Codec,
        ExpertPredictor,
        IoPolicy,
        MetricsCollector,
        ModelInfo,
        PlacementSolver,
        RequestInfo,
        ServerInfo,
    )

nexus_plugin_api = 1  # the version of the list of hooks that this was written for

# Hooks that choose: each returns an object, once.


@hookimpl
def nexus_placement_solver() -> PlacementSolver:
    """Which tensor lives in which memory."""
    from nexus_template.placement import KeepByName

    return KeepByName()


@hookimpl
def nexus_io_policy() -> IoPolicy:
    """Past the page cache, or through it."""
    from nexus_template.policies import WideMargin

    return WideMargin()


@hookimpl
def nexus_cache_policy() -> CachePolicy:
    """Which expert leaves the cache first."""
    from nexus_template.policies import RecencyWhenTight

    return RecencyWhenTight()


@hookimpl
def nexus_expert_predictor() -> ExpertPredictor:
    """Which experts are read before a router asks for them."""
    from nexus_template.policies import OnlyWithRoom

    return OnlyWithRoom()


# Hooks that add.


@hookimpl
def nexus_codec() -> Codec:
    """How chunks of an NXF can be stored."""
    from nexus_template.codec import ZlibCodec

    return ZlibCodec()


@hookimpl
def nexus_register_commands(cli: click.Group) -> None:
    """`nexus template MODEL`."""
    from nexus_template.command import command

    cli.add_command(command)


@hookimpl
def nexus_server_routes(info: ServerInfo) -> list[Route]:
    """`GET /template` of `nexus serve`."""
    from nexus_template.serving import routes

    return routes()


@hookimpl
def nexus_metrics() -> MetricsCollector:
    """What `GET /metrics` shows beside our own."""
    from nexus_template.serving import Metrics

    return Metrics()


# Hooks that watch.


@hookimpl
def nexus_model_loaded(info: ModelInfo) -> None:
    from nexus_template import observer

    observer.loaded(info)


@hookimpl
def nexus_request_done(info: RequestInfo) -> None:
    from nexus_template import observer

    observer.done(info)


@hookimpl
def nexus_model_closed(info: ModelInfo) -> None:
    from nexus_template import observer

    observer.closed(info)
