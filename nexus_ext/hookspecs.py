"""The hooks that a plugin can implement. Documentation only: nothing here does anything.

A plugin is a distribution with an entry point in the group "nexus_ext" that names a module (or an
object) whose functions carry `@nexus_ext.hookimpl` and the name of a hook below. A function takes
those of the arguments that it wants, by name.

Hooks that choose (`nexus_placement_solver`, `nexus_io_policy`, `nexus_cache_policy`,
`nexus_expert_predictor`) return an object, or None to leave the choice to others. They are asked
once and the object is kept: no hook runs while tokens are computed. A plugin wins over the
built-in. When several plugins answer, the one whose entry point name comes first in alphabetical
order wins, and a warning names the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import click

    from nexus_ext.codecs import Codec
    from nexus_ext.policies.base import (
        CachePolicy,
        ExpertPredictor,
        IoPolicy,
        ModelInfo,
        PlacementSolver,
        RequestInfo,
    )

PROJECT = "nexus_ext"

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


@hookspec
def nexus_codec() -> Codec | None:
    """Return a codec that NXF files can be written with and read; its name is kept in them."""


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
def nexus_request_done(info: RequestInfo) -> None:
    """See that a request has ended. Called once a request, never once a token."""
