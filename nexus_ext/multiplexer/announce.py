"""Tells plugins of models and their routers, from another thread: nobody waits for a plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nexus_ext.plugins import plugins
from nexus_ext.policies import ModelInfo
from nexus_ext.runtime.watching import RouterWatch, watch_routers

if TYPE_CHECKING:
    from nexus_ext.multiplexer.entry import Entry
    from nexus_ext.runtime.blueprint import Blueprint
    from nexus_ext.runtime.elastic import ElasticModel


def tell_loaded(entry: Entry) -> None:
    """Tell that a model is ready."""
    if plugins().watched("nexus_model_loaded"):
        info = _info(entry.plan, sum(entry.units[: entry.resident]))
        plugins().later(lambda: plugins().model_loaded(info))


def tell_closed(entry: Entry) -> None:
    """Tell that a model was unloaded."""
    if plugins().watched("nexus_model_closed"):
        info = _info(entry.plan, sum(entry.units[: entry.resident]))
        plugins().later(lambda: plugins().model_closed(info))


def watch_routers_of(model: ElasticModel) -> RouterWatch | None:
    """Return a watch of the routers of a model, if it has any and a plugin wants one."""
    catalog = model.blueprint.catalog
    if not catalog.shape.n_experts:
        return None
    info = _info(model.blueprint, 0)
    return watch_routers(model.core, catalog, info, model.blueprint.shape.n_ubatch)


def _info(plan: Blueprint, resident_bytes: int) -> ModelInfo:
    catalog = plan.catalog
    return ModelInfo(
        path=plan.path,
        fingerprint=catalog.fingerprint,
        architecture=catalog.shape.architecture,
        resident_bytes=plan.sizes.permanent + resident_bytes,
        # Of experts a token uses a few: at most so much.
        streamed_bytes_per_token=plan.units_bytes - resident_bytes,
        io_mode=None,  # which it is changes with what is resident
    )
